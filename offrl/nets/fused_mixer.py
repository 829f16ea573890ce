"""A Mamba mixer on a CPU where no gradient is wanted: what lies between its products, compiled.

One pass each for the convolution and for the scan with its step sizes and its gate, in place of
some fifteen. `offrl.nets.mamba.Mixer` is the definition. Float32 only.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from offrl.nets.fused_scan import compiled, pointer, sizes
from offrl.opaque import opaque

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
    return call("convolve", x.shape, [len(weight)], x, mask, weight, bias)


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
    numbers = [A.shape[1], len(weight), z.shape[1]]
    return call("scan", z.shape, numbers, u, z, selected, mask, weight, bias, A.mT, D)


def call(name: str, shape: torch.Size, numbers: list[int], *parts: Tensor | None) -> Tensor:
    """A new tensor, filled by a compiled loop that takes the sizes of the first of `parts`."""
    loops = compiled(SOURCE)
    if loops is None:
        raise RuntimeError("the compiled mixer is not to be had here; call Mixer instead")

    def run(*given: Tensor) -> tuple[Tensor]:
        left = iter([part.float().contiguous() for part in given])
        held = [part if part is None else next(left) for part in parts]
        out = torch.empty(shape)
        loop = getattr(loops, name)
        loop(*sizes(given[0]), *map(ctypes.c_long, numbers), *map(pointer, (*held, out)))
        return (out,)

    return opaque(run, *(part for part in parts if part is not None))[0]
