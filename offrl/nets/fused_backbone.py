"""Decision Mamba's blocks on a CPU where no gradient is wanted, compiled as one pass over a window.

`offrl.nets.multigrained.Backbone` is the definition. Float32, causal groups, separate gates only.
"""

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offrl.nets.fused_scan import compiled, pointer
from offrl.nets.mamba import STATES, Mixer
from offrl.opaque import opaque

if TYPE_CHECKING:
    from offrl.nets.multigrained import Backbone, Block

SOURCE = Path(__file__).with_suffix(".c")
WIDTH = 16  # widths are multiples of it: of a vector


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("width", "channels", "rank", "reach")]


def library() -> ctypes.CDLL | None:
    return compiled(SOURCE, f"-DSTATES={STATES}")


@torch.compiler.disable
def serves(x: Tensor) -> bool:
    """Whether `forward` may take the place of operators that autograd follows."""
    return (
        (x.device.type, x.dtype) == ("cpu", torch.float32)
        and x.shape[-1] % WIDTH == 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and library() is not None
    )


@torch.compiler.disable
def forward(backbone: "Backbone", x: Tensor, mask: Tensor | None, kept: int) -> Tensor:
    """What `backbone` gives for x (B, 3K, width) at the last `kept` steps; mask (B, K) or None."""
    loops = library()
    if loops is None:
        raise RuntimeError("the compiled blocks are not to be had here; call Backbone instead")
    batch, tokens, width = x.shape
    time = backbone.blocks[0].coarse.time
    sizes = Sizes(width, len(time.D), time.sizes[0], len(time.conv))
    mask = None if mask is None else mask.float().contiguous()
    parts = [part for block in backbone.blocks for part in weights(block)]
    inputs = [x, mask, backbone.norm.weight, *parts]
    there = [part is not None for part in inputs]

    def run(*given: Tensor) -> tuple[Tensor]:
        left = iter(given)
        held = [next(left) if one else None for one in there]
        x, (mask, norm, *parts) = given[0].clone(memory_format=torch.contiguous_format), held[1:]
        y = x.new_empty(batch, 3 * kept, width)
        failed = loops.backbone(
            *map(ctypes.c_long, (batch, tokens // 3)),
            ctypes.c_int(torch.get_num_threads()),
            sizes,
            *map(ctypes.c_long, (len(backbone.blocks), kept)),
            *map(pointer, (x, mask)),
            (ctypes.c_void_p * len(parts))(*map(pointer, parts)),
            *map(pointer, (norm, y)),
        )
        if failed:
            raise MemoryError(f"no memory for one window of {tokens} tokens of width {width}")
        return (y,)

    return opaque(run, *(part for part in inputs if part is not None))[0]


def weights(block: "Block") -> list[Tensor | None]:
    """Of a block, in the order of the C file."""
    if not block.has_fine:
        return [block.norm.weight, *mixer(block.coarse), *13 * [None]]
    last = [block.group.weight, block.group.bias, block.fine_norm.weight, block.fine_norm.bias]
    return [block.norm.weight, *mixer(block.coarse), *mixer(block.fine), *last]


def mixer(m: Mixer) -> list[Tensor]:
    time = m.time
    step = time.weight_delta, time.delta_bias, time.A_log.mT.contiguous().exp(), time.D
    return [m.weight_in, time.conv, time.conv_bias, time.weight_x, *step, m.weight_out]
