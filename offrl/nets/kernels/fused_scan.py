"""The selective scan on a CPU as one loop per channel, compiled where it runs.

C files are compiled when first used, which takes under a second each: for this processor, and into
a folder that is gone once the result is loaded, so there is no cache to go stale.
"""

import ctypes
import logging
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from offrl.nets.kernels.opaque import opaque

SOURCE = Path(__file__).with_suffix(".c")
TYPES = {torch.float32: ("float", "expf"), torch.float64: ("double", "exp")}
# Sums may be reordered, which vectors need; infinities and NaN keep their meaning. -ffast-math
# would also let the library switch off denormal numbers in the whole process.
NUMBERS = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", *NUMBERS)

logger = logging.getLogger(__name__)


@cache
def compiled(source: Path, *definitions: str) -> ctypes.CDLL | None:
    """The loops of a C file, or None where they are not available, with a warning why."""
    try:
        with TemporaryDirectory() as folder:
            target = Path(folder) / "loops.so"
            command = ["gcc", *FLAGS, *definitions, str(source), "-o", str(target), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        told = "Mamba runs in its slower form, for gcc did not compile %s: %s"
        logger.warning(told, source.name, reason)
        return None


def library(states: int, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled scan, None where it is not available."""
    if dtype not in TYPES:
        return None
    real, exponential = TYPES[dtype]
    return compiled(SOURCE, f"-Dreal={real}", f"-Dexponential={exponential}", f"-DSTATES={states}")


class FusedScan(torch.autograd.Function):
    """The scan with its gradients. Nothing of size (batch, L, E, N) is ever stored."""

    @staticmethod
    def forward(ctx: Any, loops: ctypes.CDLL, *inputs: Tensor) -> Tensor:
        inputs = tuple(x.contiguous() for x in inputs)
        ctx.save_for_backward(*inputs)
        ctx.loops = loops

        def run(u: Tensor, *rest: Tensor) -> tuple[Tensor]:
            y = torch.empty_like(u)
            loops.forward(*sizes(u), *map(pointer, (u, *rest, y)))
            return (y,)

        (y,) = opaque(run, *inputs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        def run(*given: Tensor) -> tuple[Tensor, ...]:
            u, delta, A, B, C, D, _ = given
            dA, dD = u.new_empty(len(u), *A.shape), u.new_empty(len(u), *D.shape)
            du, ddelta, dB, dC = map(torch.empty_like, (u, delta, B, C))
            outputs = du, ddelta, dA, dB, dC, dD
            if ctx.loops.backward(*sizes(u), *map(pointer, (*given, *outputs))):
                raise MemoryError(f"no memory for the states of {u.shape[1]} steps of one channel")
            return outputs

        dy = dy.contiguous()  # a name of its own, for the loops see an address only
        du, ddelta, dA, dB, dC, dD = opaque(run, *ctx.saved_tensors, dy)
        return None, du, ddelta, dA.sum(0), dB, dC, dD.sum(0)


def sizes(u: Tensor) -> list[ctypes.c_long | ctypes.c_int]:
    return [*map(ctypes.c_long, u.shape), ctypes.c_int(torch.get_num_threads())]


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


@torch.compiler.disable
def fused(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`offrl.nets.kernels.scan.loop` on a CPU where `library` is there; differentiable once."""
    loops = library(A.shape[1], u.dtype)
    if loops is None:
        raise RuntimeError("the compiled scan is not available; call selective_scan instead")
    return FusedScan.apply(loops, u, delta, A, B, C, D)
