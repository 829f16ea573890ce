"""The affine map: its one home, so that a faster product serves every network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn


class Linear(nn.Module):
    """Affine map x @ weight + bias with optional leading axes for seeds and ensembles.

    weight (*lead, in, out), bias (*lead, 1, out); x (*lead or shorter or 1s, B, in) broadcasts
    against `lead`. Initialization: uniform in +-1/sqrt(in) for both, the default of
    torch.nn.Linear, drawn from `generator` on its device.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        lead: tuple[int, ...] = (),
        generator: Generator | None = None,
    ):
        super().__init__()
        device = generator.device if generator is not None else None

        def draw(rows: int) -> nn.Parameter:
            value = torch.empty(*lead, rows, fan_out, device=device)
            return nn.Parameter(value.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator))

        self.weight = draw(fan_in)
        self.bias = draw(1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., B, in) -> (*lead, B, out)."""
        return chain(x, [(self.weight, self.bias)])


def chain(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
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
    """
    if x.is_cuda:
        return plain(x, layers)
    if layers[0][0].dim() == 2 and x.dim() > 2:  # one network on stacked rows
        return chain(x.flatten(0, -2), layers).unflatten(0, x.shape[:-1])
    if torch.is_grad_enabled():
        return Chain.apply(x, *[p for layer in layers for p in layer])
    for i, (weight, bias) in enumerate(layers):
        x = product(x, weight, bias, relu=i < len(layers) - 1)
    return x


def plain(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The chain in ordinary operators."""
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight + bias if weight.dim() > 2 else torch.addmm(bias, x, weight)
        x = x.relu() if i < len(layers) - 1 else x
    return x


def product(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    out = x.new_empty(*weight.shape[:-2], x.shape[-2], weight.shape[-1])
    members = zip(matrices(x, weight), matrices(weight), matrices(bias), matrices(out), strict=True)
    for x_m, weight_m, bias_m, out_m in members:
        multiply(x_m, weight_m, out_m, bias_m)
    return out.relu_() if relu else out


def multiply(x: Tensor, y: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """out <- x @ y + bias for matrices (n, k), (k, m), (n, m) and (1, m).

    A narrow result, such as a policy's actions or the gradient of its last weight, is computed
    transposed and copied: 256 x 256 times 256 x 6 takes 23 instead of 80 microseconds, its
    transposed product 20 instead of 91 (torch 2.13 with MKL, AMD Zen 4); wider ones and few
    rows gain nothing.
    """
    if 1 < out.shape[-1] < 16 and len(x) >= 64:
        flat = torch.mm(y.T, x.T) if bias is None else torch.addmm(bias.T, y.T, x.T)
        out.copy_(flat.T)
    elif bias is None:
        torch.mm(x, y, out=out)
    else:
        torch.addmm(bias, x, y, out=out)


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
    def forward(ctx: Any, x: Tensor, *params: Tensor) -> Tensor:
        inputs, last = [x], len(params) - 2
        for i in range(0, last, 2):
            inputs.append(product(inputs[-1], params[i], params[i + 1], relu=True))
        ctx.save_for_backward(*inputs, *params)
        return product(inputs[-1], params[last], params[last + 1], relu=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        count = len(ctx.saved_tensors) // 3
        inputs, params = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if torch.is_grad_enabled():  # differentiated twice: ordinary autograd operators
            return again(ctx.needs_input_grad, inputs[0], params, grad)
        needs = ctx.needs_input_grad
        out: list[Tensor | None] = [None] * (1 + 2 * count)
        lowest = next(i for i in range(count) if any(needs[: 2 * i + 3]))
        for i in reversed(range(lowest, count)):
            weight, x = params[2 * i], inputs[i]
            if needs[2 * i + 1]:
                out[2 * i + 1] = grad_weight(grad, weight, x)
            if needs[2 * i + 2]:
                out[2 * i + 2] = grad.sum(-2, keepdim=True)
            if i > lowest or needs[0]:
                grad = grad_input(grad, weight, x)
            if i > lowest:  # the gradient is this function's own: masked where it lies
                torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)
        out[0] = grad if needs[0] else None
        return tuple(out)


def again(
    needs: Sequence[bool], x: Tensor, params: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of the chain as functions of its inputs."""
    with torch.enable_grad():
        layers = list(zip(params[::2], params[1::2], strict=True))
        y = plain(x, layers)
    asked = [value for value, need in zip((x, *params), needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, asked, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needs)


def grad_input(grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    if x.shape[:-2] == weight.shape[:-2]:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for g, w, o in zip(matrices(grad), matrices(weight), matrices(out), strict=True):
            torch.mm(g, w.mT, out=o)
        return out
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    targets = matrices(out, weight)  # broadcast members add into the same matrix
    for g, w, o in zip(matrices(grad), matrices(weight), targets, strict=True):
        o.addmm_(g, w.mT)
    return out


def grad_weight(grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    out = torch.empty_like(weight)
    for x_m, g, o in zip(matrices(x, weight), matrices(grad), matrices(out), strict=True):
        multiply(x_m.mT, g, o)
    return out
