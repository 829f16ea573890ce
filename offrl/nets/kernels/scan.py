"""The selective scan of Mamba in interchangeable exact forms.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        h_0 = 0
    y_t = C_t . h_t + D u_t

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
arXiv:2312.00752. Shapes: batch, L steps, E channels, N states per channel.

    loop       the definition; autograd keeps all states
    recompute  the same with states kept at segment borders only     CPU without a compiler
    fused      one compiled loop per channel (fused_scan.py)         CPU
    chunked    chunks in parallel, then carried over                 GPU
    mamba_ssm  the kernel of that package                            CUDA with the package

The choice depends on the device and on what is installed, never on a timing, so it is the same
in every run of a machine. The forms of the CPU were chosen by `scripts/scan.py`; those of the GPU
by the number of kernels that they launch: they have not been timed.
"""

import logging
import math
from collections.abc import Callable
from functools import cache, partial, reduce
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from offrl.nets.kernels import fused_scan

STATES = 16  # per channel of Mamba's mixers; the compiled blocks are for so many
Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

logger = logging.getLogger(__name__)


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Run the recurrence over all steps in the form that suits the device.

    Computes y (batch, L, E) in float32 at least, inside autocast too. All six arguments receive
    gradients. Raises ValueError for shapes that do not fit, or several devices.

    Args:
        u: input (batch, L, E).
        delta: step sizes (batch, L, E), at least 0; where 0, the state is left as it was.
        A: decay rates (E, N), negative.
        B, C: input and output vectors of each step (batch, L, N), shared by the channels.
        D: weight of the direct path (E,).
    """
    states = A.shape[-1]
    shapes = [u.shape, u.shape, (u.shape[-1], states), *2 * [(*u.shape[:-1], states)], u.shape[-1:]]
    inputs = u, delta, A, B, C, D
    if u.dim() != 3 or [tuple(x.shape) for x in inputs] != [tuple(shape) for shape in shapes]:
        raise ValueError(
            "selective_scan takes u and delta (batch, L, E), A (E, N), B and C (batch, L, N), "
            f"D (E,); got {', '.join(str(tuple(x.shape)) for x in inputs)}"
        )
    if len(set(devices := [str(x.device) for x in inputs])) > 1:
        raise ValueError(f"selective_scan takes tensors of one device, got {devices}")
    with torch.autocast(u.device.type, enabled=False):
        u, *rest = at_least_float32(*inputs)
        return fastest(u.device, u.dtype, states)(u, *rest)


def selective_step(
    h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of `selective_scan`, whose u, delta (batch, E), B and C (batch, N) lack the time.

    From the state h (batch, E, N) that the last step left, zeros before the first, to y (batch, E)
    and the new state.
    """
    with torch.autocast(u.device.type, enabled=False):
        return advance(*at_least_float32(h, u, delta, A, B, C, D))


def at_least_float32(*inputs: Tensor) -> tuple[Tensor, ...]:
    """All inputs in one precision: the highest among them and float32."""
    dtype = reduce(torch.promote_types, (x.dtype for x in inputs), torch.float32)
    return tuple(x.to(dtype) for x in inputs)


@torch.compiler.disable
def fastest(device: torch.device, dtype: torch.dtype, states: int) -> Form:
    """The form that `selective_scan` takes."""
    if torch.compiler.is_exporting():
        return chunked
    if device.type == "cpu":
        return fused_scan.fused if fused_scan.library(states, dtype) else recompute
    if device.type == "cuda" and dtype == torch.float32 and agrees(mamba_ssm, device):
        return mamba_ssm
    return chunked_again


def advance(
    h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """`selective_step` in the precision of its inputs."""
    decay = (delta.unsqueeze(-1) * A).exp()
    h = torch.addcmul((delta * u).unsqueeze(-1) * B.unsqueeze(-2), decay, h)  # (batch, E, N)
    return (h @ C.unsqueeze(-1)).squeeze(-1) + D * u, h


def segment(
    h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """All steps from the state h, one by one."""
    ys = []
    for u_t, delta_t, B_t, C_t in zip(*(x.unbind(1) for x in (u, delta, B, C)), strict=True):
        y, h = advance(h, u_t, delta_t, A, B_t, C_t, D)
        ys.append(y)
    return torch.stack(ys, 1), h


def loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The definition, step by step; autograd keeps every state."""
    return segment(u.new_zeros(u.shape[0], *A.shape), u, delta, A, B, C, D)[0]


def recompute(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`loop` in segments of about sqrt(L) steps; the backward pass runs a segment again.

    Autograd then keeps the state between segments, and all states of one segment at a time.
    """
    h, ys = u.new_zeros(len(u), *A.shape), []
    size = math.isqrt(u.shape[1])
    for u_s, delta_s, B_s, C_s in zip(*(x.split(size, 1) for x in (u, delta, B, C)), strict=True):
        y, h = again(segment, h, u_s, delta_s, A, B_s, C_s, D)
        ys.append(y)
    return torch.cat(ys, 1)


def chunked(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """About sqrt(L) steps in all chunks at once, then about sqrt(L) steps from chunk to chunk.

    A chunk starts from zero; what its true start adds, decayed by all steps since, follows.
    Products of decays only, no exponential of a sum that is divided out, so nothing overflows.
    """
    length = u.shape[1]
    size = math.isqrt(length - 1) + 1
    fill = -length % size  # steps of size 0 at the end change nothing
    parts = (torch.nn.functional.pad(x, (0, 0, 0, fill)) for x in (u, delta, B, C))
    u_c, delta_c, B_c, C_c = (x.unflatten(1, (-1, size)).unbind(2) for x in parts)
    h = u.new_zeros(*u_c[0].shape, A.shape[1])  # (batch, chunks, E, N), from a zero start
    reach = torch.ones_like(h)  # product of the decays since the start of the chunk
    inside = []
    for u_t, delta_t, B_t in zip(u_c, delta_c, B_c, strict=True):
        decay = (delta_t.unsqueeze(-1) * A).exp()
        h = torch.addcmul((delta_t * u_t).unsqueeze(-1) * B_t.unsqueeze(-2), decay, h)
        reach = decay * reach
        inside.append((h, reach))
    start = torch.zeros_like(h[:, 0])
    starts = []
    for h_end, reach_end in zip(h.unbind(1), reach.unbind(1), strict=True):
        starts.append(start)
        start = torch.addcmul(h_end, reach_end, start)
    start = torch.stack(starts, 1)  # (batch, chunks, E, N)
    ys = [
        (torch.addcmul(h, reach, start) @ C_t.unsqueeze(-1)).squeeze(-1)
        for (h, reach), C_t in zip(inside, C_c, strict=True)
    ]
    return torch.stack(ys, 2).flatten(1, 2)[:, :length] + D * u


def chunked_again(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`chunked`, run again in the backward pass, so that layers keep their inputs only."""
    return again(chunked, u, delta, A, B, C, D)


def again(function: Callable, *inputs: Tensor):
    """Call a function that draws nothing; run it again in the backward pass, keeping inputs."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def mamba_ssm(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The CUDA kernel of the package mamba-ssm, whose tensors have time last."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(u.mT, delta.mT, A, B.mT, C.mT, D).mT


@cache
def agrees(form: Form, device: torch.device) -> bool:
    """Whether a form runs and equals `loop`: values to 1e-4, gradients to 1e-3."""
    how: dict[str, Any] = {"generator": Generator(device).manual_seed(0), "device": device}
    draw = partial(torch.randn, **how)
    with torch.inference_mode(False), torch.enable_grad():
        u, delta, A = draw(2, 9, 8), draw(2, 9, 8).sigmoid(), -draw(8, 16).exp()
        parts = u, delta, A, draw(2, 9, 16), draw(2, 9, 16), draw(8)
        inputs = [x.requires_grad_() for x in parts]
        try:
            found, wanted = form(*inputs), loop(*inputs)
            seed = torch.randn_like(wanted)
            grads = [torch.autograd.grad(y, inputs, seed) for y in (found, wanted)]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
        except ImportError:
            return False
        except (AssertionError, RuntimeError) as error:
            logger.warning("%s is not used, for it fails its check: %s", form.__name__, error)
            return False
    return True
