"""The Mamba mixer: a gated causal convolution and a selective scan along time.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752.

    u, z       = x W_in
    u          = SiLU(causal depthwise convolution of u)
    r, B, C    = u W_x
    delta      = softplus(r W_delta + b_delta)
    y          = selective scan of u, delta, A = -exp(A_log), B, C, D
    out        = (y * SiLU(z)) W_out

Shapes: B batch, L steps, E inner channels, N states per channel.
"""

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from offrl.nets.kernels.scan import STATES, selective_scan, selective_step

REACH = 4  # steps that the convolution sees, the current one included
Memory = tuple[Tensor, Tensor]  # the last inputs of the convolution (B, REACH - 1, E), h (B, E, N)


class Selective(nn.Module):
    """What a mixer does along time, up to the gate: (B, L, E) -> (B, L, E); causal.

    A_log starts at log(1..16) in each channel, D at 1, the softplus of the step bias log-uniform in
    [0.001, 0.1], other weights uniform in +-1/sqrt(fan-in), the convolution's bias at 0. `A_log`
    and `D` stay in float32 under autocast, and so does the scan.

    Args:
        inner: E, channels. Step sizes are of rank E / 32, rounded up.
        generator: source of the initial weights; its device holds them.
    """

    def __init__(self, inner: int, generator: Generator | None = None):
        super().__init__()
        rank = math.ceil(inner / 32)
        self.sizes = rank, STATES, STATES
        device = generator.device if generator is not None else None
        self.conv = uniform(REACH, inner, fan_in=REACH, generator=generator)
        self.conv_bias = nn.Parameter(torch.zeros(inner, device=device))
        self.weight_x = uniform(inner, sum(self.sizes), fan_in=inner, generator=generator)
        self.weight_delta = uniform(rank, inner, fan_in=rank, generator=generator)
        low, high = math.log(1e-3), math.log(1e-1)
        steps = torch.empty(inner, device=device).uniform_(low, high, generator=generator).exp()
        steps.clamp_(min=1e-4)
        self.delta_bias = nn.Parameter(steps + (-torch.expm1(-steps)).log())  # softplus inverted
        rates = torch.arange(1, STATES + 1, device=device, dtype=torch.float32)
        self.A_log = nn.Parameter(rates.log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner, device=device))

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve and scan u (B, L, E); `mask` as in `Mixer`."""
        if mask is not None:
            mask = mask.unsqueeze(-1).to(u.dtype)
            u = u * mask
        length, reach = u.shape[1], len(self.conv)
        padded = functional.pad(u, (0, 0, reach - 1, 0))
        taps = (padded[:, k : k + length] * self.conv[k] for k in range(reach))
        u = functional.silu(sum(taps, self.conv_bias))
        delta, B, C = self.select(u)
        if mask is not None:
            delta = delta * mask
        return selective_scan(u, delta, -self.A_log.exp(), B, C, self.D)

    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes, input and output vectors of the scan, all chosen by its input."""
        rates, B, C = (u @ self.weight_x).split(self.sizes, -1)
        return functional.softplus(rates @ self.weight_delta + self.delta_bias), B, C

    def start(self, batch: int) -> Memory:
        """The memory of `batch` rows before their first step: zeros, so zeroed rows start anew."""
        inner, states = self.A_log.shape
        tail = self.A_log.new_zeros(batch, len(self.conv) - 1, inner)
        return tail, self.A_log.new_zeros(batch, inner, states)

    def step(self, u: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """One step (B, E) of `forward`, and the memory after it."""
        tail, h = memory
        window = torch.cat([tail, u.unsqueeze(1)], 1)  # (B, conv, E)
        u = functional.silu((window * self.conv).sum(1) + self.conv_bias)
        delta, B, C = self.select(u)
        y, h = selective_step(h, u, delta, -self.A_log.exp(), B, C, self.D)
        return y, (window[:, 1:], h)


class Mixer(nn.Module):
    """Mamba mixer (B, L, width) -> (B, L, width); causal. Initial weights as in `Selective`.

    Args:
        width: features of a step; the path along time has twice as many channels.
        generator: source of the initial weights; its device holds them.
    """

    def __init__(self, width: int, generator: Generator | None = None):
        super().__init__()
        inner = 2 * width
        self.weight_in = uniform(width, 2 * inner, fan_in=width, generator=generator)
        self.time = Selective(inner, generator=generator)
        self.weight_out = uniform(inner, width, fan_in=inner, generator=generator)

    def forward(self, x: Tensor, mask: Tensor | None = None, kept: int | None = None) -> Tensor:
        """Mix along time.

        Args:
            x: (B, L, width).
            mask: (B, L), 1 or True at real steps. Pads enter neither the convolution nor the
                state, so a window padded on the left gives the outputs of the unpadded one. None
                treats every step as real. What comes out at pads means nothing.
            kept: steps at the end whose outputs are wanted, with (B, kept, width) returned; None
                for all.
        """
        kept = kept or x.shape[1]
        u, z = (x @ self.weight_in).chunk(2, -1)  # (B, L, E)
        y = self.time(u, mask) * functional.silu(z)
        return y[:, -kept:] @ self.weight_out

    def start(self, batch: int) -> Memory:
        """The memory of `batch` rows before their first step: zeros, so zeroed rows start anew."""
        return self.time.start(batch)

    def step(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """One step of `forward` at a cost that does not grow with time.

        Args:
            x: (B, width).
            memory: what `start` or the last call returned.

        Returns:
            The output (B, width) and the memory after this step.
        """
        u, z = (x @ self.weight_in).chunk(2, -1)  # (B, E)
        y, memory = self.time.step(u, memory)
        return (y * functional.silu(z)) @ self.weight_out, memory


def uniform(*shape: int, fan_in: int, generator: Generator | None) -> nn.Parameter:
    """A parameter drawn in +-1/sqrt(fan_in), on the device of the generator."""
    device = generator.device if generator is not None else None
    bound = fan_in**-0.5
    value = torch.empty(*shape, device=device).uniform_(-bound, bound, generator=generator)
    return nn.Parameter(value)


def decayed(net: nn.Module, decay: float, everything: bool) -> list[tuple[list[Tensor], float]]:
    """Parameters with their weight decay: none for biases, norms, A_log and D.

    Args:
        everything: exempt only biases and LayerNorms, as the authors of Decision Mamba do.
    """
    norms: Any = nn.LayerNorm if everything else (nn.LayerNorm, nn.RMSNorm)
    exempt = () if everything else ("A_log", "D")
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for module in net.modules():
        for name, value in module.named_parameters(recurse=False):
            free = name.endswith("bias") or isinstance(module, norms) or name in exempt
            groups[not free].append(value)
    return [(groups[True], decay), (groups[False], 0.0)]
