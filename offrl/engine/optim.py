"""Steps shared by many updates: optimizers, target networks, targets; torch only."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn

Metrics = dict[str, Tensor]
Net = TypeVar("Net", bound=nn.Module)


makes = True  # optimizers; see `acting`


@contextmanager
def acting() -> Iterator[None]:
    """Within it methods are made without their optimizers, which are None.

    A policy that only acts has no use for them, and torch's first one loads its compiler, which
    takes longer than all else.
    """
    global makes
    makes = False
    try:
        yield
    finally:
        makes = True


def adam(
    params: nn.Module | Iterable[Tensor], lr: float, eps: float = 1e-8, weight_decay: float = 0.0
) -> torch.optim.Adam:
    """Fused Adam over a module's or the given parameters.

    On CUDA the learning rate and the step counters are tensors on the device, so that the step
    can be captured in a graph; on a CPU they are what the fused kernel there takes.
    """
    if not makes:
        return None  # type: ignore[return-value]
    params = list(params.parameters() if isinstance(params, nn.Module) else params)
    cuda = params[0].is_cuda
    return torch.optim.Adam(
        params,
        lr=torch.tensor(lr, device=params[0].device) if cuda else lr,
        eps=eps,
        weight_decay=weight_decay,
        fused=True,
        capturable=cuda,
    )


def adamw(
    groups: Iterable[tuple[Iterable[Tensor], float]], lr: float = 0.0, eps: float = 1e-8
) -> torch.optim.AdamW:
    """Fused AdamW over groups of (parameters, weight decay).

    Their learning rates are tensors that start from `lr`; `warm_up` raises them on the device.
    """
    if not makes:
        return None  # type: ignore[return-value]
    parts = [(list(params), decay) for params, decay in groups]
    device = parts[0][0][0].device
    return torch.optim.AdamW(
        [
            {"params": params, "weight_decay": decay, "lr": torch.tensor(lr, device=device)}
            for params, decay in parts
        ],
        eps=eps,
        fused=True,
        capturable=device.type == "cuda",
    )


def warm_up(optimizer: torch.optim.Optimizer, lr: float, steps: int) -> None:
    """Raise learning rates that are tensors by lr / steps, up to lr: linear, before every step."""
    for group in optimizer.param_groups:
        group["lr"].add_(lr / steps).clamp_(max=lr)


def descend(
    optimizer: torch.optim.Optimizer, loss: Tensor, metrics: Metrics, clip: float | None = None
) -> Metrics:
    """One optimizer step on `loss`; returns the metrics detached. Touches no other parameter.

    Args:
        optimizer: its parameters receive the gradient; those that `loss` does not use get zero.
        loss: (*S,), one entry per stacked seed; summed, since each seed owns its parameter slice.
        clip: largest gradient norm, taken per seed over all parameters of the optimizer.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads: Sequence[Tensor] = torch.autograd.grad(
        loss.sum(), params, allow_unused=True, materialize_grads=True
    )
    if clip is not None:
        grads = clipped(grads, clip, loss.dim())
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    optimizer.step()
    return {name: value.detach() for name, value in metrics.items()}


def clipped(grads: Sequence[Tensor], clip: float, lead: int) -> Sequence[Tensor]:
    """Gradients scaled so that each seed's joint norm is at most `clip`."""
    if lead == 0:  # many small tensors at once
        norm = torch.stack(torch._foreach_norm(list(grads))).norm()
        return torch._foreach_mul(list(grads), (clip / (norm + 1e-6)).clamp(max=1.0))
    square = sum(g.flatten(lead).square().sum(-1) for g in grads)
    scale = (clip / (torch.as_tensor(square).sqrt() + 1e-6)).clamp(max=1.0)  # (*S,)
    return [g * scale.view(*scale.shape, *[1] * (g.dim() - lead)) for g in grads]


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online, in place, for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


def target_copy(net: Net) -> Net:
    """A copy of a network that receives no gradient: a target, which `polyak` moves."""
    return deepcopy(net).requires_grad_(False)


def smoothed(act: Tensor, noise: float, clip: float, generator: Generator) -> Tensor:
    """Actions with Gaussian noise of std `noise`, itself clipped at `clip`; within [-1, 1].

    Source: target policy smoothing, Fujimoto et al., ICML 2018, arXiv:1802.09477.
    """
    draw = torch.empty_like(act).normal_(0, noise, generator=generator)
    return (act + draw.clamp(-clip, clip)).clamp(-1, 1)


def bootstrap(batch: Metrics, value: Tensor, discount: float) -> Tensor:
    """r + discount (1 - terminal) value, (*S, B): the target of a one-step backup."""
    return batch["reward"] + discount * (1 - batch["terminal"]) * value
