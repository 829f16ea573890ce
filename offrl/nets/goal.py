"""Networks of goal-conditioned methods, with optional leading axes for seeds."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offrl.nets.encoders import FEATURES, SIDE, Impala
from offrl.nets.linear import Dims, Source
from offrl.nets.mlp import MLP


class Sight(nn.Module):
    """What a network is given of several parts, rows (*S, B, n) each: features (*S, B, size).

    Args:
        sizes: n of every part, such as an observation, a goal and an action.
        images: how many of the first parts are images, which one encoder sees together; the others
            are put beside its features.

    Raises ValueError for images of another size, or with seed axes, which encoders do not carry.
    """

    def __init__(self, sizes: Dims, images: int = 0, seeds: Dims = (), generator: Source = None):
        super().__init__()
        if wrong := set(sizes[:images]) - {3 * SIDE**2}:
            raise ValueError(
                f"images=true needs RGB images of {SIDE} x {SIDE} pixels as observations and "
                f"goals, {3 * SIDE**2} numbers each, got {wrong.pop()}"
            )
        if images and seeds:
            raise ValueError("encoders of images carry no seed axis: make one method per seed")
        self.images = images
        self.encoder = Impala(3 * images, generator) if images else None
        self.size = sum(sizes[images:]) + (FEATURES if images else 0)

    def forward(self, *parts: Tensor) -> Tensor:
        if self.encoder is not None:
            parts = (self.encoder(*parts[: self.images]), *parts[self.images :])
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


class GoalRep(nn.Module):
    """phi([s; g]): obs (*S, B, o), goal (*S, B, g), of `sizes` -> (*S, B, d) of length sqrt(d)."""

    def __init__(
        self, sizes: Dims, rep_dim: int, hidden: Dims, seeds: Dims, generator: Source, images: bool
    ):
        super().__init__()
        self.sight = Sight(sizes, 2 * images, seeds, generator)
        self.net = MLP((self.sight.size, *hidden, rep_dim), seeds, generator, "gelu", norm=True)

    def forward(self, obs: Tensor, goal: Tensor) -> Tensor:
        return normalized(self.net(self.sight(obs, goal)))


def normalized(z: Tensor) -> Tensor:
    """z sqrt(d) / |z| over the last axis of d entries; without an epsilon, as the original."""
    return z * (z.shape[-1] ** 0.5 / z.norm(dim=-1, keepdim=True))


class Values(nn.Module):
    """Values of parts such as obs, goal and act: (*S, B, n) each -> (*S, B) or (*S, heads, B).

    Args:
        sizes, images: see `Sight`; the heads, independent otherwise, share its encoder.
        heads: 0 for one value without an axis of its own.
    """

    def __init__(
        self, sizes: Dims, hidden: Dims, heads: int, seeds: Dims, generator: Source, images: int
    ):
        super().__init__()
        self.heads = heads
        self.sight = Sight(sizes, images, seeds, generator)
        lead = (*seeds, heads) if heads else seeds
        self.net = MLP((self.sight.size, *hidden, 1), lead, generator, "gelu", norm=True)

    def forward(self, *parts: Tensor) -> Tensor:
        x = self.sight(*parts)
        return self.net(x.unsqueeze(-3) if self.heads else x).squeeze(-1)


class RepValues(nn.Module):
    """Independent values of observations and phi: heads of one level or of several.

    Args:
        sizes: of an observation and phi.
        lead: (levels, heads), or (heads,) of one level, which share its encoder of images.
    """

    def __init__(
        self, sizes: Dims, hidden: Dims, lead: Dims, seeds: Dims, generator: Source, images: bool
    ):
        super().__init__()
        levels = range(lead[0] if len(lead) > 1 else 1)
        sights = [Sight(sizes, images, seeds, generator) for _ in levels]
        self.sights, dims = nn.ModuleList(sights), (sights[0].size, *hidden, 1)
        self.net = MLP(dims, (*seeds, *lead), generator, "gelu", norm=True)

    def forward(self, *levels: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        """All heads at several (obs, phi), as many for every level, in one call.

        As many (*S, heads, B), with several levels (*S, levels, heads, B).
        """
        seen = [
            sight(*(torch.cat(parts, -2) for parts in zip(*pairs, strict=True)))
            for sight, pairs in zip(self.sights, levels, strict=True)
        ]
        x = torch.stack(seen, -3) if len(seen) > 1 else seen[0]
        return self.net(x.unsqueeze(-3)).squeeze(-1).chunk(len(levels[0]), -1)


class GoalActor(nn.Module):
    """The mean of a unit Gaussian policy: obs, goal, as `Sight` has them -> (*S, B, outputs)."""

    def __init__(
        self, sizes: Dims, outputs: int, hidden: Dims, seeds: Dims, generator: Source, images: int
    ):
        super().__init__()
        self.sight = Sight(sizes, images, seeds, generator)
        # variance scaling of 1e-2 for the mean's layer
        self.net = MLP((self.sight.size, *hidden, outputs), seeds, generator, "gelu", last=0.1)

    def forward(self, obs: Tensor, goal: Tensor) -> Tensor:
        return self.net(self.sight(obs, goal))

    def log_prob(self, obs: Tensor, goal: Tensor, value: Tensor) -> Tensor:
        """Log-density of `value` (*S, B, outputs), (*S, B)."""
        return normal_log_prob(value, self(obs, goal))


def sampled(mean: Tensor, now: dict[str, Any]) -> Tensor:
    """The mean, or where now["explore"] is true a draw from the unit Gaussian around it."""
    if not now.get("explore"):
        return mean
    return mean + torch.empty_like(mean).normal_(generator=now["generator"])


def normal_log_prob(value: Tensor, mean: Tensor) -> Tensor:
    """Log-density of a unit Gaussian around `mean`, summed over the last axis."""
    square = (value - mean).square().sum(-1)
    return -0.5 * square - 0.5 * value.shape[-1] * math.log(2 * math.pi)


class GoalColumns(nn.Module):
    """What of an observation makes a goal: (..., o) -> (..., g); all of it for columns ()."""

    index: Tensor

    def __init__(self, obs_dim: int, columns: Dims = (), device: torch.device | None = None):
        super().__init__()
        if columns and not 0 <= min(columns) <= max(columns) < obs_dim:
            raise ValueError(
                f"goal_columns={list(columns)} must lie in [0, {obs_dim}), the observation's size"
            )
        self.size = len(columns) or obs_dim
        index = torch.tensor(columns or range(obs_dim), device=device)
        self.register_buffer("index", index, persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        return obs if self.size == obs.shape[-1] else obs.index_select(-1, self.index)


def held(module: nn.Module, *inputs: Tensor) -> Tensor:
    """The module's output with its weights held fixed: gradients reach the inputs only."""
    weights = {name: value.detach() for name, value in module.named_parameters()}
    return torch.func.functional_call(module, weights, inputs)
