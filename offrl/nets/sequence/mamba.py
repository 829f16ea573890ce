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
from torch import Tensor, nn
from torch.nn import functional

from offrl.nets.kernels.scan import STATES, selective_scan, selective_step
from offrl.nets.linear import Source, device_of, uniform

REACH = 4  # steps that the convolution sees, the current one included
Memory = tuple[Tensor, Tensor]  # the last inputs of the convolution (B, REACH - 1, E), h (B, E, N)


class Mixer(nn.Module):
    """Mamba mixer (B, L, width) -> (B, L, width); causal, of E = 2 width channels along time.

    A_log starts at log(1..16) in each channel, D at 1, the softplus of the step bias log-uniform in
    [0.001, 0.1], other weights uniform in +-1/sqrt(fan-in), the convolution's bias at 0. Step sizes
    are of rank E / 32, rounded up. `A_log` and `D` stay in float32 under autocast, and so does the
    scan.
    """

    def __init__(self, width: int, generator: Source = None):
        super().__init__()
        inner, rank, device = 2 * width, math.ceil(width / 16), device_of(generator)
        self.sizes = rank, STATES, STATES

        def draw(fan_in: int, fan_out: int) -> nn.Parameter:
            return uniform(fan_in, fan_out, fan_in=fan_in, generator=generator)

        weight_in, conv = draw(width, 2 * inner), draw(REACH, inner)
        weight_x, weight_delta = draw(inner, sum(self.sizes)), draw(rank, inner)
        low, high = math.log(1e-3), math.log(1e-1)
        steps = torch.empty(inner, device=device).uniform_(low, high, generator=generator).exp()
        steps.clamp_(min=1e-4)
        rates = torch.arange(1, STATES + 1, device=device, dtype=torch.float32)
        self.weight_in, self.weight_out = weight_in, draw(inner, width)
        self.conv, self.conv_bias = conv, nn.Parameter(torch.zeros(inner, device=device))
        self.weight_x, self.weight_delta = weight_x, weight_delta
        self.delta_bias = nn.Parameter(steps + (-torch.expm1(-steps)).log())  # softplus inverted
        self.A_log = nn.Parameter(rates.log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner, device=device))

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
        length = x.shape[1]
        u, z = (x @ self.weight_in).chunk(2, -1)  # (B, L, E)
        if mask is not None:
            mask = mask.unsqueeze(-1).to(u.dtype)
            u = u * mask
        padded = functional.pad(u, (0, 0, REACH - 1, 0))
        taps = (padded[:, k : k + length] * self.conv[k] for k in range(REACH))
        u = functional.silu(sum(taps, self.conv_bias))
        delta, B, C = self.select(u)
        if mask is not None:
            delta = delta * mask
        y = selective_scan(u, delta, -self.A_log.exp(), B, C, self.D) * functional.silu(z)
        return y[:, -(kept or length) :] @ self.weight_out

    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes, input and output vectors of the scan, all chosen by its input."""
        rates, B, C = (u @ self.weight_x).split(self.sizes, -1)
        return functional.softplus(rates @ self.weight_delta + self.delta_bias), B, C

    def start(self, batch: int) -> Memory:
        """The memory of `batch` rows before their first step: zeros, so zeroed rows start anew."""
        zeros, (inner, states) = self.A_log.new_zeros, self.A_log.shape
        return zeros(batch, REACH - 1, inner), zeros(batch, inner, states)

    def step(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """One step (B, width) of `forward` -> (B, width), memory; at a cost that does not grow."""
        tail, h = memory
        u, z = (x @ self.weight_in).chunk(2, -1)  # (B, E)
        window = torch.cat([tail, u.unsqueeze(1)], 1)  # (B, REACH, E)
        u = functional.silu((window * self.conv).sum(1) + self.conv_bias)
        delta, B, C = self.select(u)
        y, h = selective_step(h, u, delta, -self.A_log.exp(), B, C, self.D)
        return (y * functional.silu(z)) @ self.weight_out, (window[:, 1:], h)


def decayed(net: nn.Module, decay: float, everything: bool) -> list[tuple[list[Tensor], float]]:
    """Parameters with their weight decay: none for biases, norms, A_log and D.

    With `everything` only biases and LayerNorms have none, as the authors of Decision Mamba do.
    """
    norms: Any = nn.LayerNorm if everything else (nn.LayerNorm, nn.RMSNorm)
    exempt = () if everything else ("A_log", "D")
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for module in net.modules():
        for name, value in module.named_parameters(recurse=False):
            free = name.endswith("bias") or isinstance(module, norms) or name in exempt
            groups[not free].append(value)
    return [(groups[True], decay), (groups[False], 0.0)]
