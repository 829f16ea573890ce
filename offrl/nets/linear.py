"""The affine map: its one home, so that a faster product serves every network."""

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

    def forward(self, x: Tensor, relu: bool = False, frozen: bool = False) -> Tensor:
        """Apply the map.

        Args:
            x: (..., B, in).
            relu: clamp the result at zero, fused where the device allows.
            frozen: gradients reach x only; no weight gradient is computed.
        """
        if frozen:
            return affine(x, self.weight.detach(), self.bias.detach(), relu)
        return affine(x, self.weight, self.bias, relu)


def affine(x: Tensor, weight: Tensor, bias: Tensor, relu: bool = False) -> Tensor:
    """x @ weight + bias, then optionally ReLU: (..., B, in), (*lead, in, out) -> (*lead, B, out).

    On a CPU the product runs member by member straight into one result, forward and backward: a
    batched product of two 256-cubed matrices is up to twice as slow there as two single ones, and
    the backward pass of the broadcast would write copies. `x` has at most the leading axes of
    `weight`, each equal or 1. Twice differentiable.
    """
    if x.is_cuda:
        out = x @ weight + bias if weight.dim() > 2 else torch.addmm(bias, x, weight)
        return out.relu_() if relu else out
    if weight.dim() == 2 and x.dim() > 2:  # one network on stacked rows
        return affine(x.flatten(0, -2), weight, bias, relu).unflatten(0, x.shape[:-1])
    if torch.is_grad_enabled():
        return Affine.apply(x, weight, bias, relu)
    return product(x, weight, bias, relu)


def product(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    out = x.new_empty(*weight.shape[:-2], x.shape[-2], weight.shape[-1])
    members = zip(matrices(x, weight), matrices(weight), matrices(bias), matrices(out), strict=True)
    for x_m, weight_m, bias_m, out_m in members:
        torch.addmm(bias_m, x_m, weight_m, out=out_m)
    return out.relu_() if relu else out


def matrices(x: Tensor, like: Tensor | None = None) -> list[Tensor]:
    """The matrices of a stack in order, views only; broadcast to the leading axes of `like`."""
    if like is not None and x.shape[:-2] != like.shape[:-2]:
        x = x.expand(*like.shape[:-2], *x.shape[-2:])
    out = [x]
    for _ in range(x.dim() - 2):
        out = [part for stack in out for part in stack.unbind(0)]
    return out


class Affine(torch.autograd.Function):
    """The product on a CPU with its gradients; see `affine`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        out = product(x, weight, bias, relu)
        ctx.relu = relu
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, out = ctx.saved_tensors
        if ctx.relu:
            grad = torch.ops.aten.threshold_backward(grad.contiguous(), out, 0)
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        dx = dweight = dbias = None
        if torch.is_grad_enabled():  # differentiated twice: ordinary autograd operators
            dx = (grad @ weight.mT).sum_to_size(x.shape) if wants_x else None
            dweight = x.mT @ grad if wants_weight else None
        else:
            dx = grad_input(grad, weight, x) if wants_x else None
            dweight = grad_weight(grad, weight, x) if wants_weight else None
        if wants_bias:
            dbias = grad.sum(-2, keepdim=True)
        return dx, dweight, dbias, None


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
        torch.mm(x_m.mT, g, out=o)
    return out
