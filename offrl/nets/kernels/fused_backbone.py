"""Decision Mamba's blocks on a CPU where no gradient is wanted, compiled as one pass over a window.

`offrl.nets.sequence.multigrained.Backbone` is the definition. Float32, causal groups, separate
gates only.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from offrl.nets.kernels.fused_scan import compiled, pointer
from offrl.nets.kernels.opaque import opaque
from offrl.nets.kernels.scan import STATES

SOURCE = Path(__file__).with_suffix(".c")
WIDTH = 16  # widths are multiples of it: of a vector
WEIGHTS = 23  # pointers in the C file's Block


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
        and not torch.compiler.is_exporting()
        and not torch.is_autocast_enabled("cpu")
        and library() is not None
    )


@torch.compiler.disable
def forward(
    x: Tensor, mask: Tensor | None, blocks: Sequence[Sequence[Tensor]], norm: Tensor, kept: int
) -> Tensor:
    """What the blocks and the last `norm` give for x (B, 3K, width) at the last `kept` steps.

    The mask is (B, K) or None. The weights of each of the blocks come in the order of the C file,
    where those of the fine path are the last.
    """
    loops = library()
    if loops is None:
        raise RuntimeError("the compiled blocks are not available; call Backbone instead")
    batch, tokens, width = x.shape
    layers, each = len(blocks), len(blocks[0])
    reach, channels = blocks[0][2].shape  # of the convolution
    sizes = Sizes(width, channels, len(blocks[0][5]), reach)
    mask = x.new_ones(batch, tokens // 3) if mask is None else mask.float().contiguous()

    def run(x: Tensor, mask: Tensor, norm: Tensor, *parts: Tensor) -> tuple[Tensor]:
        x = x.clone(memory_format=torch.contiguous_format)
        y = x.new_empty(batch, 3 * kept, width)
        addresses = (ctypes.c_void_p * (layers * WEIGHTS))()  # null where a block has none
        for i, part in enumerate(parts):
            addresses[i // each * WEIGHTS + i % each] = part.data_ptr()
        shape = *map(ctypes.c_long, (batch, tokens // 3)), ctypes.c_int(torch.get_num_threads())
        given = *map(ctypes.c_long, (layers, kept)), *map(pointer, (x, mask))
        if loops.backbone(*shape, sizes, *given, addresses, *map(pointer, (norm, y))):
            raise MemoryError(f"no memory for one window of {tokens} tokens of width {width}")
        return (y,)

    return opaque(run, x, mask, norm, *(part for block in blocks for part in block))[0]
