"""Affine maps with ReLU between them as one node of the graph, member by member of a stack."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from offrl.nets.kernels import matmul

EPS = 1e-6  # of norms: flax's, where torch has 1e-5


def chain(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]], rectified: bool = False) -> Tensor:
    """Affine maps with ReLU between them: (..., B, in) -> (*lead, B, out).

    On a CPU the products run member by member straight into one result, forward and backward: a
    batched product of two 256-cubed matrices is up to twice as slow there as two single ones, and
    the backward pass of the broadcast would write copies. All layers are one node of the graph,
    whose backward pass masks gradients in place and computes no more than is asked for. Twice
    differentiable.

    Args:
        x: has at most the leading axes of the weights, each equal or 1.
        layers: (weight (*lead, in, out), bias (*lead, 1, out)) of each map; detached ones receive
            no gradient.
        rectified: ReLU after the last map too.
    """
    if layers[0][0].dim() == 2 and x.dim() > 2:  # one network on stacked rows
        return chain(x.flatten(0, -2), layers, rectified).unflatten(0, x.shape[:-1])
    if x.is_cuda or torch.compiler.is_exporting():
        return plain(x, layers, rectified)
    if torch.is_grad_enabled():
        return Chain.apply(x, rectified, *[p for layer in layers for p in layer])
    return forward(x, layers, rectified)[0]


def plain(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]], rectified: bool = False) -> Tensor:
    """The chain in ordinary operators."""
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight + bias if weight.dim() > 2 else torch.addmm(bias, x, weight)
        x = x.relu() if rectified or i < len(layers) - 1 else x
    return x


def forward(
    x: Tensor, layers: Sequence[tuple[Tensor, Tensor]], rectified: bool = False
) -> tuple[Tensor, list[list[Tensor]]]:
    """The chain's result, and what every member's maps but the last return, in turn."""
    split = [[matrices(part) for part in layer] for layer in layers]
    (weights, biases), lead = split[-1], layers[0][0].shape[:-2]
    out = x.new_empty(*lead, x.shape[-2], layers[-1][0].shape[-1])
    inner: list[list[Tensor]] = []
    for m, (x_m, out_m) in enumerate(zip(matrices(x, layers[0][0]), matrices(out), strict=True)):
        inner.append([])
        for weight, bias in split[:-1]:
            x_m = matmul.forward(x_m, weight[m], bias[m])
            inner[-1].append(x_m)
        if rectified:
            out_m.copy_(matmul.forward(x_m, weights[m], biases[m]))
        else:
            matmul.multiply(x_m, weights[m], out_m, biases[m])
    return out, inner


def matrices(x: Tensor, like: Tensor | None = None) -> list[Tensor]:
    """The matrices of a stack in order, views only; broadcast to the leading axes of `like`."""
    if like is not None and x.shape[:-2] != like.shape[:-2]:
        x = x.expand(*like.shape[:-2], *x.shape[-2:])
    out = [x]
    for _ in range(x.dim() - 2):
        out = [part for stack in out for part in stack.unbind(0)]
    return out


class Chain(torch.autograd.Function):
    """The chain on a CPU with its gradients; see `chain`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rectified: bool, *params: Tensor) -> Tensor:
        out, inner = forward(x, paired(params), rectified)
        ctx.rectified, kept = rectified, [value for values in inner for value in values]
        ctx.save_for_backward(x, *params, *kept, *([out] if rectified else []))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        asked_x, _, *asked = ctx.needs_input_grad
        needs = (asked_x, *asked)
        count = len(needs) // 2  # of maps
        x, params, inner = (
            ctx.saved_tensors[part]
            for part in (0, slice(1, 2 * count + 1), slice(2 * count + 1, None))
        )
        (last,) = grads
        if torch.is_grad_enabled():  # differentiated twice: ordinary autograd operators
            whole = lambda x, *params: plain(x, paired(params), ctx.rectified)  # noqa: E731
            of_x, *others = again(whole, (x, *params), needs, last)
            return of_x, None, *others
        if ctx.rectified:
            *inner, result = inner
            last = torch.ops.aten.threshold_backward(last, result, 0)
        weights = params[::2]
        out = [
            torch.empty_like(p, memory_format=torch.contiguous_format) if need else None
            for p, need in zip((x, *params), needs, strict=True)
        ]
        shared = x.shape[:-2] != weights[0].shape[:-2]  # members add to one gradient of x
        if shared and out[0] is not None:
            out[0].zero_()
        of = [
            None if o is None else matrices(o, like)
            for o, like in zip(out, (weights[0], *params), strict=True)
        ]
        w, lowest = list(map(matrices, weights)), lowest_asked(needs)
        for m, (x_m, grad) in enumerate(zip(matrices(x, weights[0]), matrices(last), strict=True)):
            values = [x_m, *inner[m * (count - 1) : (m + 1) * (count - 1)]]
            for i in reversed(range(lowest, count)):
                if (of_weight := of[2 * i + 1]) is not None:
                    matmul.weight_gradient(values[i], grad, of_weight[m])
                if (of_bias := of[2 * i + 2]) is not None:
                    torch.sum(grad, -2, keepdim=True, out=of_bias[m])
                if i > lowest:
                    grad = matmul.input_gradient(grad, w[i][m])
                    torch.ops.aten.threshold_backward.grad_input(
                        grad, values[i], 0, grad_input=grad
                    )
                elif (of_input := of[0]) is not None:
                    if shared:
                        of_input[m].addmm_(grad, w[i][m].mT)
                    else:
                        matmul.multiply(grad, w[i][m].mT, of_input[m])
        return out[0], None, *out[1:]


def lowest_asked(needs: Sequence[bool]) -> int:
    """The first map for which a gradient is wanted, of x or of its own parameters."""
    return next(i for i in range(len(needs) // 2) if any(needs[: 2 * i + 3]))


def through(
    x: Tensor,
    layers: Sequence[Sequence[Tensor]],
    activation: Callable[[Tensor], Tensor],
    bare: int = 1,
) -> Tensor:
    """Affine maps, each with the activation and, where it has one, a LayerNorm behind it.

    Args:
        layers: weight, bias and, if norms follow, their scale and shift, shaped as the bias.
        bare: maps at the end that have neither behind them.
    """
    for i, (weight, bias, *scale) in enumerate(layers):
        x = chain(x, [(weight, bias)])
        if i < len(layers) - bare:
            x = activation(x)
        if scale:
            x = torch.addcmul(scale[1], F.layer_norm(x, x.shape[-1:], eps=EPS), scale[0])
    return x


def paired(params: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each map, from a flat list."""
    return list(zip(params[::2], params[1::2], strict=True))


def again(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of function(*inputs) that are needed, by operators that autograd follows."""
    with torch.enable_grad():
        y = function(*inputs)
    asked = [value for value, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, asked, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needs)
