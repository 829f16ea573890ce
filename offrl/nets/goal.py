"""Networks of goal-conditioned methods, with optional leading axes for seeds."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from offrl.nets.encoders import FEATURES, SIDE, Impala
from offrl.nets.gelu import GeluMLP


class Sight(nn.Module):
    """What a network is given of an observation and a goal: (*S, B, o), (*S, B, g) -> features.

    Args:
        images: how many of the two are images: 0, both are put side by side; 1, the observation,
            whose encoder's features stand beside the goal; 2, seen by one encoder together.
    """

    def __init__(self, obs_dim: int, goal_dim: int, images: int, generator: Generator | None):
        super().__init__()
        for size in (obs_dim, goal_dim)[:images]:
            if size != 3 * SIDE**2:
                raise ValueError(
                    f"images=true needs RGB images of {SIDE} x {SIDE} pixels as observations and "
                    f"goals, {3 * SIDE**2} numbers each, got {size}"
                )
        self.images = images
        self.encoder = Impala(3 * images, generator) if images else None
        self.size = (obs_dim + goal_dim, FEATURES + goal_dim, FEATURES)[images]

    def forward(self, obs: Tensor, goal: Tensor) -> Tensor:
        if self.encoder is None:
            return torch.cat([obs, goal], -1)
        if self.images == 1:
            return torch.cat([self.encoder(obs), goal], -1)
        return self.encoder(obs, goal)


class GoalRep(nn.Module):
    """phi([s; g]): obs (*S, B, o), goal (*S, B, g) -> (*S, B, d) of length sqrt(d)."""

    def __init__(
        self,
        obs_dim: int,
        goal_dim: int,
        rep_dim: int,
        hidden: tuple[int, ...],
        seeds: tuple[int, ...] = (),
        generator: Generator | None = None,
        images: bool = False,
    ):
        super().__init__()
        self.sight = Sight(obs_dim, goal_dim, 2 * images, generator)
        self.net = GeluMLP((self.sight.size, *hidden, rep_dim), seeds, generator=generator)

    def forward(self, obs: Tensor, goal: Tensor) -> Tensor:
        return normalized(self.net(self.sight(obs, goal)))


def normalized(z: Tensor) -> Tensor:
    """z sqrt(d) / |z| over the last axis of d entries; without an epsilon, as the original."""
    return z * (z.shape[-1] ** 0.5 / z.norm(dim=-1, keepdim=True))


class Values(nn.Module):
    """Independent values, stacked along `lead`: (*lead or shorter or 1s, B, n) -> (*lead, B)."""

    def __init__(
        self,
        inputs: int,
        hidden: tuple[int, ...],
        lead: tuple[int, ...],
        generator: Generator | None = None,
    ):
        super().__init__()
        self.net = GeluMLP((inputs, *hidden, 1), lead, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


class RepValues(nn.Module):
    """Independent values of observations and phi: heads of one level or of several.

    The heads of a level share its encoder of images.
    """

    def __init__(
        self,
        obs_dim: int,
        rep_dim: int,
        hidden: tuple[int, ...],
        levels: int,
        heads: int,
        seeds: tuple[int, ...] = (),
        generator: Generator | None = None,
        images: bool = False,
    ):
        super().__init__()
        sights = [Sight(obs_dim, rep_dim, int(images), generator) for _ in range(levels)]
        self.sights = nn.ModuleList(sights)
        lead = (*seeds, levels, heads) if levels > 1 else (*seeds, heads)
        self.net = GeluMLP((sights[0].size, *hidden, 1), lead, generator=generator)

    def forward(self, *levels: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        """All heads at several (obs, phi), as many for every level, in one call.

        Returns:
            As many (*S, heads, B), with several levels (*S, levels, heads, B).
        """
        seen = [
            sight(*(torch.cat(parts, -2) for parts in zip(*pairs, strict=True)))
            for sight, pairs in zip(self.sights, levels, strict=True)
        ]
        x = torch.stack(seen, -3) if len(seen) > 1 else seen[0]
        return self.net(x.unsqueeze(-3)).squeeze(-1).chunk(len(levels[0]), -1)


class GoalActor(nn.Module):
    """The mean of a Gaussian policy of standard deviation 1: obs, goal -> (*S, B, outputs).

    Args:
        images: see `Sight`.
    """

    def __init__(
        self,
        obs_dim: int,
        goal_dim: int,
        outputs: int,
        hidden: tuple[int, ...],
        seeds: tuple[int, ...] = (),
        generator: Generator | None = None,
        images: int = 0,
    ):
        super().__init__()
        self.sight = Sight(obs_dim, goal_dim, images, generator)
        dims = (self.sight.size, *hidden, outputs)
        # variance scaling of 1e-2 for the mean's layer
        self.net = GeluMLP(dims, seeds, norm=False, last_scale=0.1, generator=generator)

    def forward(self, obs: Tensor, goal: Tensor) -> Tensor:
        return self.net(self.sight(obs, goal))

    def act(self, obs: Tensor, goal: Tensor, explore: bool, generator: Generator | None) -> Tensor:
        """The mean, or a sample, clipped to [-1, 1]."""
        mean = self(obs, goal)
        if explore:
            mean = mean + torch.empty_like(mean).normal_(generator=generator)
        return mean.clamp(-1, 1)

    def log_prob(self, obs: Tensor, goal: Tensor, value: Tensor) -> Tensor:
        """Log-density of `value` (*S, B, outputs), (*S, B)."""
        return normal_log_prob(value, self(obs, goal))


def normal_log_prob(value: Tensor, mean: Tensor) -> Tensor:
    """Log-density of a unit Gaussian around `mean`, summed over the last axis."""
    square = (value - mean).square().sum(-1)
    return -0.5 * square - 0.5 * value.shape[-1] * math.log(2 * math.pi)


class GoalColumns(nn.Module):
    """What of an observation makes a goal: (..., o) -> (..., g); all of it for columns ()."""

    index: Tensor

    def __init__(
        self, obs_dim: int, columns: tuple[int, ...] = (), device: torch.device | None = None
    ):
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
