"""Affine maps with activations between them as one node of the graph, member by member of a stack.

A layer is the weight (*lead, in, out) and bias (*lead, 1, out) of a map and, where a LayerNorm
stands behind its activation, the scale and shift (*lead, 1, out).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from offrl.nets.kernels import gelu, matmul

ROWS = 512  # of GELUs without gradient at a time, so that their results stay in a core's cache
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "gelu": gelu.gelu}
Layer = Sequence[Tensor]


class Kind(NamedTuple):
    activation: str
    last: bool  # see `chain`
    each: int  # parameters of a layer but the last


def chain(x: Tensor, layers: Sequence[Layer], last: bool = False, kind: str = "relu") -> Tensor:
    """Affine maps with activations and norms behind them: (..., B, in) -> (*lead, B, out).

    On a CPU the products run member by member straight into one result, forward and backward: a
    batched product of two 256-cubed matrices is up to twice as slow there as two single ones, the
    backward pass of the broadcast would write copies, and GELUs computed layer by layer leave the
    cache. All layers are one node of the graph, whose backward pass masks gradients in place and
    computes no more than is asked for; with tanh and with norms behind ReLU each map is one. Twice
    differentiable.

    Args:
        x: has at most the leading axes of the weights, each equal or 1.
        layers: detached ones receive no gradient.
        last: activation and norm stand behind the last map too.
        kind: the activation: relu, tanh or gelu, in its tanh approximation.
    """
    if layers[0][0].dim() == 2 and x.dim() > 2:  # one network on stacked rows
        return chain(x.flatten(0, -2), layers, last, kind).unflatten(0, x.shape[:-1])
    whole = Kind(kind, last, len(layers[0]))
    if x.is_cuda or torch.compiler.is_exporting():
        return through(x, layers, whole, affine)
    if len(layers) > (not last) and (kind == "tanh" or (kind == "relu" and whole.each > 2)):
        return through(x, layers, whole, lambda x, *layer: chain(x, [layer]))
    params = [p for layer in layers for p in layer]
    return Chain.apply(x, whole, *params) if torch.is_grad_enabled() else forward(x, params, whole)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight + bias if weight.dim() > 2 else torch.addmm(bias, x, weight)


def through(
    x: Tensor, layers: Sequence[Layer], kind: Kind, affine: Callable[..., Tensor]
) -> Tensor:
    """The chain in ordinary operators, its maps by `affine`."""
    for i, (weight, bias, *scale) in enumerate(layers):
        x = affine(x, weight, bias)
        if kind.last or i < len(layers) - 1:
            x = ACTIVATIONS[kind.activation](x)
        if scale:
            x = torch.addcmul(scale[1], F.layer_norm(x, x.shape[-1:], eps=gelu.EPS), scale[0])
    return x


def grouped(params: Sequence[Any], each: int) -> list[Sequence[Any]]:
    """The layers of a flat list of parameters."""
    return [params[i : i + each] for i in range(0, len(params), each)]


def matrices(x: Tensor, like: Tensor) -> list[Tensor]:
    """The matrices of a stack in order, views only; broadcast to the leading axes of `like`."""
    if like.dim() == 2:
        return [x]
    if x.shape[:-2] != like.shape[:-2]:
        x = x.expand(*like.shape[:-2], *x.shape[-2:])
    out = [x]
    for _ in range(x.dim() - 2):
        out = [part for stack in out for part in stack.unbind(0)]
    return out


def forward(
    x: Tensor, params: Sequence[Tensor], kind: Kind, kept: list[Tensor] | None = None
) -> Tensor:
    """The chain's result; appends to `kept` what `gradients` asks for, member by member."""
    first, last = params[0], params[-1]
    out = x.new_empty(*first.shape[:-2], x.shape[-2], last.shape[-1])
    for x_m, out_m, *own in zip(*[matrices(p, first) for p in (x, out, *params)], strict=True):
        layers = grouped(own, kind.each)
        if kept is not None or kind.activation != "gelu":
            run(x_m, layers, kind, out_m, kept)
            continue
        for rows, result in zip(x_m.split(ROWS), out_m.split(ROWS), strict=True):
            run(rows, layers, kind, result)
    return out


def run(
    x: Tensor, layers: Sequence[Layer], kind: Kind, out: Tensor, kept: list[Tensor] | None = None
) -> None:
    """One network on rows (B, in) into out (B, out)."""
    for layer in layers if kind.last else layers[:-1]:
        before, more = x, []
        if kind.activation == "relu":
            x = matmul.forward(x, *layer)
        else:
            x, *more = gelu.forward(x, layer, kept is not None)
        if kept is not None:
            kept += [before, *more]
    if kept is not None:
        kept.append(x)
    if kind.last:
        out.copy_(x)
    else:
        matmul.multiply(x, layers[-1][0], out, layers[-1][1])


class Chain(torch.autograd.Function):
    """The chain on a CPU with its gradients; see `chain`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Kind, *params: Tensor) -> Tensor:
        kept: list[Tensor] = []
        out = forward(x, params, kind, kept)
        ctx.kind, ctx.masked = kind, kind.last and kind.activation == "relu"
        ctx.save_for_backward(x, *params, *kept, *([out] if ctx.masked else []))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kind, (asked_x, _, *asked) = ctx.kind, ctx.needs_input_grad
        count = len(asked) + 1
        inputs, kept = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needs, (x, first, *_), (grad,) = [asked_x, *asked], inputs, grads
        if torch.is_grad_enabled():  # differentiated twice: ordinary autograd operators
            y = through(x, grouped(inputs[1:], kind.each), kind, affine)
            wanted = [value for value, need in zip(inputs, needs, strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            of_x, *others = (next(found) if need else None for need in needs)
            return of_x, None, *others
        if ctx.masked:
            *kept, result = kept
            grad = torch.ops.aten.threshold_backward(grad, result, 0)
        results = [
            torch.empty_like(p, memory_format=torch.contiguous_format) if need else None
            for p, need in zip(inputs, needs, strict=True)
        ]
        # members may share one gradient of x; GELU's adds in any case, which decides its rounding
        shared = x.shape[:-2] != first.shape[:-2] or kind.activation == "gelu"
        if shared and results[0] is not None:
            results[0].zero_()
        weights = [p for i, p in enumerate(inputs[1:]) if i % kind.each != 1]  # all but biases
        parts = [matrices(p, first) for p in (grad, *weights)]
        out = [[None] * len(parts[0]) if p is None else matrices(p, first) for p in results]
        size = len(kept) // len(parts[0])
        for m, (grad_m, *own) in enumerate(zip(*parts, strict=True)):
            of_x, *of = (part[m] for part in out)
            layers = zip(grouped(own, kind.each - 1), grouped(of, kind.each), strict=True)
            gradients(grad_m, list(layers), kind, kept[m * size : (m + 1) * size], of_x, shared)
        return results[0], None, *results[1:]


def gradients(
    grad: Tensor,
    layers: Sequence[tuple[Layer, Sequence[Tensor | None]]],
    kind: Kind,
    kept: Sequence[Tensor],
    of_x: Tensor | None,
    shared: bool,
) -> None:
    """The gradients of one network, from its output's (B, out) and what `run` kept.

    Layers are parameters but the bias, and where the gradients of all are written, None for those
    not asked for. The gradient of x is written to `of_x`, or added if `shared`.
    """
    active = len(layers) - (not kind.last)
    size = (len(kept) - 1) // max(active, 1)
    asked = (any(place is not None for place in out) for _, out in layers)
    lowest = 0 if of_x is not None else list(asked).index(True)
    for i in reversed(range(lowest, len(layers))):
        (weight, *scale), out = layers[i]
        x, *more = kept[i * size : (i + 1) * size] if i < active else kept[-1:]
        if i < active and kind.activation == "gelu":
            grad = gelu.backward(grad, more, scale, out)
        elif i < len(layers) - 1:
            after = kept[(i + 1) * size]
            torch.ops.aten.threshold_backward.grad_input(grad, after, 0, grad_input=grad)
        if out[0] is not None:
            matmul.weight_gradient(x, grad, out[0])
        if out[1] is not None:
            torch.sum(grad, -2, keepdim=True, out=out[1])
        if i > lowest:
            grad = matmul.input_gradient(grad, weight)
        elif of_x is not None and shared:
            of_x.addmm_(grad, weight.mT)
        elif of_x is not None:
            matmul.multiply(grad, weight.mT, of_x)
