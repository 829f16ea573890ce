"""An affine map with tanh-GELU and LayerNorm behind it, and its gradient, on rows of a CPU."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LINEAR, CUBIC = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715
EPS = 1e-6  # of norms: flax's, where torch has 1e-5


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def forward(x: Tensor, layer: Sequence[Tensor], keep: bool) -> Sequence[Tensor]:
    """The result for x (B, in), and with `keep` what `backward` asks for.

    The GELU in its tanh approximation is (1 + tanh u) / 2 = sigmoid(2 u) times x, which takes half
    the time of torch's own on a CPU, forward and backward.
    """
    weight, bias, *scale = layer
    before = torch.addmm(bias, x, weight)
    share = gate(before)
    y = before * share if keep else before.mul_(share)
    if not scale:
        return y, before, share
    out, *moments = torch.native_layer_norm(y, y.shape[-1:], scale[0][0], scale[1][0], eps=EPS)
    return out, before, share, y, *moments


def gate(x: Tensor) -> Tensor:
    """sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return (x * x).mul_(CUBIC).add_(LINEAR).mul_(x).sigmoid_()


def backward(
    grad: Tensor, kept: Sequence[Tensor], scale: Sequence[Tensor], out: Sequence[Tensor | None]
) -> Tensor:
    """The gradient before the GELU; those of a norm's scale and shift go into `out`, if asked."""
    before, share, *rest = kept
    if scale:
        y, *moments = rest
        asked = [True, *[place is not None for place in out[2:]]]
        grad, *slopes = torch.ops.aten.native_layer_norm_backward(
            grad, y, y.shape[-1:], *moments, scale[0][0], scale[1][0], asked
        )
        for slope, place in zip(slopes, out[2:], strict=True):
            if place is not None:
                place.copy_(slope)
    slope = (before * before).mul_(3 * CUBIC).add_(LINEAR).mul_(before)  # before (2 u)'
    return slope.mul_(1 - share).add_(1).mul_(share).mul_(grad)
