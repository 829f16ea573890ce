"""A Mamba mixer on a CPU where no gradient is wanted: what lies between its products, compiled.

One pass each for the convolution and for the scan with its step sizes and its gate, in place of
some fifteen. `offrl.nets.mamba.Mixer` is the definition. Float32 only.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from offrl.nets.fused_scan import compiled, pointer, sizes

SOURCE = Path(__file__).with_suffix(".c")


@torch.compiler.disable
def serves(x: Tensor) -> bool:
    """Whether `convolve` and `scan` may take the place of operators that autograd follows."""
    return (
        (x.device.type, x.dtype) == ("cpu", torch.float32)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and compiled(SOURCE) is not None
    )


@torch.compiler.disable
def convolve(x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of the causal depthwise convolution of x (B, L, E).

    Args:
        mask: (B, L), 0 at steps that are read as zeros; None for none.
        weight: (reach, E), that of the current step last. bias: (E,).
    """
    u = torch.empty(x.shape)
    call("convolve", u, [len(weight)], x, mask, weight, bias, u)
    return u


@torch.compiler.disable
def scan(
    u: Tensor, z: Tensor, selected: Tensor, mask: Tensor | None,
    weight: Tensor, bias: Tensor, A: Tensor, D: Tensor,
) -> Tensor:  # fmt: skip
    """SiLU(z) times the selective scan of u (B, L, E), at the steps that z has.

    Args:
        z: (B, k, E), of the last k steps.
        selected: (B, L, rank + 2 N): of each step the rates of its step size, B and C.
        mask: (B, L), 0 at steps that leave the state as it was; None for none.
        weight: (rank, E) and bias (E,): step sizes softplus(rates @ weight + bias).
        A: (E, N). D: (E,).
    """
    y = torch.empty(z.shape)
    numbers = [A.shape[1], len(weight), z.shape[1]]
    call("scan", u, numbers, u, z, selected, mask, weight, bias, A.mT, D, y)
    return y


def call(name: str, u: Tensor, numbers: list[int], *parts: Tensor | None) -> None:
    loops = compiled(SOURCE)
    if loops is None:
        raise RuntimeError("the compiled mixer is not to be had here; call Mixer instead")
    held = [part if part is None else part.float().contiguous() for part in parts]
    getattr(loops, name)(*sizes(u), *map(ctypes.c_long, numbers), *map(pointer, held))
