"""The selective scan of Mamba.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        h_0 = 0
    y_t = C_t . h_t + D u_t

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
arXiv:2312.00752. Shapes: batch, L steps, E channels, N states per channel.
"""

import torch
from torch import Tensor


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Run the recurrence over all steps, at least in float32, also inside autocast.

    Args:
        u: input (batch, L, E).
        delta: step sizes (batch, L, E), at least 0; where 0, the state is left as it was.
        A: decay rates (E, N), negative.
        B, C: input and output vectors of each step (batch, L, N), shared by the channels.
        D: weight of the direct path (E,).

    Returns:
        y (batch, L, E). All six arguments receive gradients.
    """
    with torch.autocast(u.device.type, enabled=False):
        wide = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (u, delta, A, B, C, D))
        return loop(*wide)


def advance(
    h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """One step: h (batch, E, N), u and delta (batch, E), B and C (batch, N) -> y (batch, E), h."""
    decay = (delta.unsqueeze(-1) * A).exp()
    h = torch.addcmul((delta * u).unsqueeze(-1) * B.unsqueeze(-2), decay, h)  # (batch, E, N)
    return (h @ C.unsqueeze(-1)).squeeze(-1) + D * u, h


def loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The definition, step by step; autograd keeps every state."""
    h = u.new_zeros(len(u), *A.shape)
    ys = []
    for step in zip(u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        u_t, delta_t, B_t, C_t = step
        y, h = advance(h, u_t, delta_t, A, B_t, C_t, D)
        ys.append(y)
    return torch.stack(ys, 1)
