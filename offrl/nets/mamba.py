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

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from offrl.nets import fused_mixer
from offrl.nets.scan import selective_scan, selective_step

Memory = tuple[Tensor, Tensor]  # the last inputs of the convolution (B, conv - 1, E), h (B, E, N)


class Mixer(nn.Module):
    """Mamba mixer (B, L, width) -> (B, L, width); causal.

    A_log starts at log(1..N) in each channel, D at 1, the softplus of the step bias log-uniform in
    [0.001, 0.1], other weights uniform in +-1/sqrt(fan-in), other biases 0. `A_log` and `D` stay
    in float32 under autocast, and so does the scan.

    Args:
        width: features of a step.
        inner: channels E of the scan; None for 2 * width.
        states: N, states per channel.
        conv: steps that the convolution sees, the current one included.
        generator: source of the initial weights; its device holds them.
    """

    def __init__(
        self,
        width: int,
        inner: int | None = None,
        states: int = 16,
        conv: int = 4,
        generator: Generator | None = None,
    ):
        super().__init__()
        inner = inner or 2 * width
        rank = math.ceil(width / 16)  # of the step sizes
        self.sizes = rank, states, states
        device = generator.device if generator is not None else None

        def draw(*shape: int, bound: float) -> nn.Parameter:
            value = torch.empty(*shape, device=device)
            return nn.Parameter(value.uniform_(-bound, bound, generator=generator))

        self.weight_in = draw(width, 2 * inner, bound=width**-0.5)
        self.conv = draw(conv, inner, bound=conv**-0.5)
        self.conv_bias = nn.Parameter(torch.zeros(inner, device=device))
        self.weight_x = draw(inner, sum(self.sizes), bound=inner**-0.5)
        self.weight_delta = draw(rank, inner, bound=rank**-0.5)
        low, high = math.log(1e-3), math.log(1e-1)
        steps = torch.empty(inner, device=device).uniform_(low, high, generator=generator).exp()
        steps.clamp_(min=1e-4)
        self.delta_bias = nn.Parameter(steps + (-torch.expm1(-steps)).log())  # softplus inverted
        rates = torch.arange(1, states + 1, device=device, dtype=torch.float32)
        self.A_log = nn.Parameter(rates.log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner, device=device))
        self.weight_out = draw(inner, width, bound=inner**-0.5)

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
        length, reach, kept = x.shape[1], len(self.conv), kept or x.shape[1]
        if fused_mixer.serves(x):
            into, gate = self.weight_in.chunk(2, -1)
            u = fused_mixer.convolve(x @ into, mask, self.conv, self.conv_bias)
            z, selected, A = x[:, -kept:] @ gate, u @ self.weight_x, -self.A_log.exp()
            steps = self.weight_delta, self.delta_bias
            return fused_mixer.scan(u, z, selected, mask, *steps, A, self.D) @ self.weight_out
        u, z = (x @ self.weight_in).chunk(2, -1)  # (B, L, E)
        if mask is not None:
            mask = mask.unsqueeze(-1).to(u.dtype)
            u = u * mask
        padded = functional.pad(u, (0, 0, reach - 1, 0))
        taps = (padded[:, k : k + length] * self.conv[k] for k in range(reach))
        u = functional.silu(sum(taps, self.conv_bias))
        delta, B, C = self.select(u)
        if mask is not None:
            delta = delta * mask
        y = selective_scan(u, delta, -self.A_log.exp(), B, C, self.D)
        return (y * functional.silu(z))[:, -kept:] @ self.weight_out

    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes, input and output vectors of the scan, all chosen by its input."""
        rates, B, C = (u @ self.weight_x).split(self.sizes, -1)
        return functional.softplus(rates @ self.weight_delta + self.delta_bias), B, C

    def start(self, batch: int) -> Memory:
        """The memory of `batch` rows before their first step: zeros, so zeroed rows start anew."""
        inner, states = self.A_log.shape
        tail = self.A_log.new_zeros(batch, len(self.conv) - 1, inner)
        return tail, self.A_log.new_zeros(batch, inner, states)

    def step(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """One step of `forward` at a cost that does not grow with time.

        Args:
            x: (B, width).
            memory: what `start` or the last call returned.

        Returns:
            The output (B, width) and the memory after this step.
        """
        tail, h = memory
        u, z = (x @ self.weight_in).chunk(2, -1)  # (B, E)
        window = torch.cat([tail, u.unsqueeze(1)], 1)  # (B, conv, E)
        u = functional.silu((window * self.conv).sum(1) + self.conv_bias)
        delta, B, C = self.select(u)
        y, h = selective_step(h, u, delta, -self.A_log.exp(), B, C, self.D)
        return (y * functional.silu(z)) @ self.weight_out, (window[:, 1:], h)
