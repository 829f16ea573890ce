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
    return hidden(x, layers)[-1]


def plain(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The chain in ordinary operators."""
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight + bias if weight.dim() > 2 else torch.addmm(bias, x, weight)
        x = x.relu() if i < len(layers) - 1 else x
    return x


def hidden(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """What every map returns, with ReLU but for the last; a member's maps follow each other."""
    outs = [x.new_empty(*w.shape[:-2], x.shape[-2], w.shape[-1]) for w, _ in layers]
    stacks = [[matrices(part) for part in (*layer, out)]
              for layer, out in zip(layers, outs, strict=True)]  # fmt: skip
    for m, x_m in enumerate(matrices(x, layers[0][0])):
        for i, (weight, bias, out) in enumerate(stacks):
            multiply(x_m, weight[m], out[m], bias[m])
            x_m = out[m].relu_() if i < len(layers) - 1 else out[m]
    return outs


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
        outs = hidden(x, list(zip(params[::2], params[1::2], strict=True)))
        ctx.save_for_backward(x, *outs[:-1], *params)
        return outs[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.saved_tensors) // 3
        inputs, params = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # differentiated twice: ordinary autograd operators
            return again(needs, inputs[0], params, *grads)
        weights = params[::2]
        out = [torch.empty_like(p, memory_format=torch.contiguous_format) if need else None
               for p, need in zip((inputs[0], *params), needs, strict=True)]  # fmt: skip
        shared = inputs[0].shape[:-2] != weights[0].shape[:-2]  # members add to one input gradient
        if shared and out[0] is not None:
            out[0].zero_()
        split = [None if o is None else matrices(o, like)
                 for o, like in zip(out, (weights[0], *params), strict=True)]  # fmt: skip
        x, w = ([matrices(part, like) for part, like in zip(parts, weights, strict=True)]
                for parts in (inputs, weights))  # fmt: skip
        lowest = next(i for i in range(count) if any(needs[: 2 * i + 3]))
        for m, grad in enumerate(matrices(grads[0])):
            for i in reversed(range(lowest, count)):
                if (of_weight := split[2 * i + 1]) is not None:
                    multiply(x[i][m].mT, grad, of_weight[m])
                if (of_bias := split[2 * i + 2]) is not None:
                    torch.sum(grad, -2, keepdim=True, out=of_bias[m])
                if i > lowest:
                    grad = torch.mm(grad, w[i][m].mT)
                    torch.ops.aten.threshold_backward.grad_input(grad, x[i][m], 0, grad_input=grad)
                elif (of_input := split[0]) is not None:
                    if shared:
                        of_input[m].addmm_(grad, w[i][m].mT)
                    else:
                        torch.mm(grad, w[i][m].mT, out=of_input[m])
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
