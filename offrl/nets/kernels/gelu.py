"""Affine maps with tanh-GELU and LayerNorm between them as one node of the graph."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from offrl.nets.kernels import matmul
from offrl.nets.kernels.chain import EPS, again, matrices, through

LINEAR, CUBIC = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715
ROWS = 512  # of a pass without gradient at a time, so that its activations stay in a core's cache
Layer = Sequence[Tensor]  # weight, bias and, where a norm follows, its scale and shift


def network(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """(..., B, in) -> (*lead, B, out); the last map is bare.

    On a CPU a stack is computed network by network: its activations leave the cache if they are
    computed layer by layer, which takes twice as long. Twice differentiable.

    Args:
        x: has at most the leading axes of the weights, each equal or 1.
        layers: weight (*lead, in, out), bias (*lead, 1, out) of each map and, if norms follow,
            their scale and shift (*lead, 1, out).
    """
    if x.is_cuda or torch.compiler.is_exporting():
        return through(x, layers, gelu)
    lead = layers[0][0].shape[:-2]
    if not lead and x.dim() > 2:  # one network on stacked rows
        return network(x.flatten(0, -2), layers).unflatten(0, x.shape[:-1])
    if torch.is_grad_enabled():
        return Members.apply(x, len(layers[0]) > 2, *[p for layer in layers for p in layer])
    out = x.new_empty(*lead, x.shape[-2], layers[-1][0].shape[-1])
    for x_m, member, out_m in zip(
        matrices(x, layers[0][0]), members(layers), matrices(out), strict=True
    ):
        for rows, result in zip(x_m.split(ROWS), out_m.split(ROWS), strict=True):
            result.copy_(run(rows, member))
    return out


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def members(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers of each network of a stack."""
    apart = [list(zip(*[matrices(p) for p in layer], strict=True)) for layer in layers]
    return [list(member) for member in zip(*apart, strict=True)]


def run(x: Tensor, layers: Sequence[Layer], kept: list[Tensor] | None = None) -> Tensor:
    """One network on rows (B, in); appends to `kept` what `gradients` asks for.

    The GELU in its tanh approximation is (1 + tanh u) / 2 = sigmoid(2 u) times x, which takes half
    the time of torch's own on a CPU, forward and backward.
    """
    *hidden, (weight, bias) = layers
    for weight_h, bias_h, *scale in hidden:
        before = torch.addmm(bias_h, x, weight_h)
        share = gate(before)
        y = before * share if kept is not None else before.mul_(share)
        out, mean, deviation = y, y, y
        if scale:
            flat = (scale[0][0], scale[1][0])
            out, mean, deviation = torch.native_layer_norm(y, y.shape[-1:], *flat, eps=EPS)
        if kept is not None:
            kept += [x, before, share, y, mean, deviation]
        x = out
    if kept is not None:
        kept.append(x)
    result = x.new_empty(len(x), weight.shape[-1])
    matmul.multiply(x, weight, result, bias)
    return result


def gate(x: Tensor) -> Tensor:
    """sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return (x * x).mul_(CUBIC).add_(LINEAR).mul_(x).sigmoid_()


def gelu_gradient(grad: Tensor, x: Tensor, share: Tensor) -> Tensor:
    """The gradient before the GELU of x, whose `gate` is share."""
    slope = (x * x).mul_(3 * CUBIC).add_(LINEAR).mul_(x)  # x times the derivative of 2 u
    return slope.mul_(1 - share).add_(1).mul_(share).mul_(grad)


class Members(torch.autograd.Function):
    """A stack on a CPU, network by network, with its gradients; see `network`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: bool, *params: Tensor) -> Tensor:
        layers = grouped(params, norm)
        lead = params[0].shape[:-2]
        out = x.new_empty(*lead, x.shape[-2], params[-1].shape[-1])
        kept: list[Tensor] = []
        for x_m, member, out_m in zip(
            matrices(x, params[0]), members(layers), matrices(out), strict=True
        ):
            out_m.copy_(run(x_m, member, kept))
        ctx.norm, ctx.count = norm, len(params)
        ctx.save_for_backward(x, *params, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        params, kept = rest[: ctx.count], rest[ctx.count :]
        if torch.is_grad_enabled():  # differentiated twice
            asked_x, _, *asked = ctx.needs_input_grad
            whole = lambda x, *params: through(x, grouped(params, ctx.norm), gelu)  # noqa: E731
            of_x, *others = again(whole, (x, *params), (asked_x, *asked), grad)
            return of_x, None, *others
        wanted, weights_wanted = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:])
        x_grad = torch.zeros_like(x, memory_format=torch.contiguous_format) if wanted else None
        x_grads: list[Tensor | None] = [None] * len(matrices(params[0]))
        if x_grad is not None:
            x_grads[:] = matrices(x_grad, params[0])  # broadcast members add into the same matrix
        grads = [torch.empty_like(p) for p in params] if weights_wanted else []
        stack = members(grouped(params, ctx.norm))
        out = members(grouped(grads, ctx.norm)) if grads else [[]] * len(stack)
        each = len(kept) // len(stack)
        for i, (member, grad_m) in enumerate(zip(stack, matrices(grad), strict=True)):
            gradients(grad_m, member, kept[each * i : each * (i + 1)], out[i], x_grads[i])
        if not grads:
            return x_grad, None, *[None] * ctx.count
        return x_grad, None, *grads


def grouped(params: Sequence[Tensor], norm: bool) -> list[Layer]:
    """The layers of a flat list of parameters."""
    each = 4 if norm else 2
    return [params[i : i + each] for i in range(0, len(params), each)]


def gradients(
    grad: Tensor,
    layers: Sequence[Layer],
    kept: Sequence[Tensor],
    out: Sequence[Layer],
    x_grad: Tensor | None,
) -> None:
    """The gradients of one network, from its output's (B, out).

    Args:
        kept: what `run` kept.
        out: the layers' gradients are written here; empty if they are not asked for.
        x_grad: the gradient of x is added to this.
    """
    for i in reversed(range(len(layers))):
        weight, x = layers[i][0], kept[6 * i]
        if i < len(layers) - 1:
            before, share, y, mean, deviation = kept[6 * i + 1 : 6 * i + 6]
            if len(layers[i]) > 2:
                scale, shift = (p[0] for p in layers[i][2:])
                asked = [True, bool(out), bool(out)]
                grad, *slopes = torch.ops.aten.native_layer_norm_backward(
                    grad, y, y.shape[-1:], mean, deviation, scale, shift, asked
                )
                for slope, place in zip(slopes, out[i][2:] if out else (), strict=False):
                    place.copy_(slope)
            grad = gelu_gradient(grad, before, share)
        if out:
            matmul.weight_gradient(x, grad, out[i][0])
            torch.sum(grad, 0, keepdim=True, out=out[i][1])
        if i > 0:
            grad = matmul.input_gradient(grad, weight)
        elif x_grad is not None:
            x_grad.addmm_(grad, weight.T)
