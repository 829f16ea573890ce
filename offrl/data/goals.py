"""Goals for goal-conditioned methods: states of the data, drawn by their place in a trajectory.

Trajectories lie one after the other with their last states, which have no transition, so that a
state is an index: i the anchor, f(i) the last state of its trajectory. Everything is drawn and
gathered on the device, with fixed shapes.

    trajectory goal   geometric: min(i + G, f), G ~ Geom(1 - discount) on {1, 2, ...}
                      uniform: round(min(i + 1, f) u + f (1 - u)), u ~ U[0, 1); the two end points
                      are half as likely as the others
    random goal       any state that has a transition
    success           the goal is the state itself: equality of indices, never of values

Sources: OGBench's reference sampler (Park et al., ICLR 2025, arXiv:2410.20092) and the options of
OTA (Ahn et al., NeurIPS 2025, arXiv:2505.12737). There f is the last state that has a transition,
one before ours, so a state may be its own trajectory goal at a trajectory's end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from offrl.data.dataset import Dataset, episode_of
from offrl.data.samplers import BUDGET, gatherer
from offrl.data.table import Device
from offrl.engine.method import Batch, Run, Sampler, Stage, Task
from offrl.errors import DataError
from offrl.nets.encoders import cropped

STATES = ("obs", "act", "next_obs")  # fields of a data set that its trajectories are made of
GOALS: dict[str, Any] = {  # what a METHOD says of itself that learns from goals
    "fields": STATES,
    "goals": True,
    "stacks": lambda config: not config.images,
}
BLOCK = 16_384  # rows that are checked at once
Mixture = tuple[float, ...]  # probabilities of the state itself, a trajectory goal, a random goal


@dataclass(frozen=True)
class Trajectories:
    """The states of a data set by index; indices are int64 of any shape (*I)."""

    rows: Callable[[Tensor], Batch]  # of an index: obs (*I, o), act (*I, a), 0 at last states
    valid: Tensor  # (N,) states that have a transition, which are the anchors, ascending
    last: Tensor  # (M,) f, the last state of every state's trajectory

    def anchors(self, shape: tuple[int, ...], generator: Generator) -> Tensor:
        """Uniform states that have a transition."""
        size, device = len(self.valid), self.valid.device
        return self.valid[torch.randint(size, shape, generator=generator, device=device)]

    def ahead(self, i: Tensor, steps: int | Tensor) -> Tensor:
        """min(i + steps, f)."""
        return torch.minimum(i + steps, self.last[i])

    def geometric(self, i: Tensor, discount: float, generator: Generator) -> Tensor:
        """A trajectory goal, on average 1 / (1 - discount) steps ahead."""
        steps = torch.empty(i.shape, dtype=torch.float64, device=i.device)
        steps = steps.geometric_(1 - discount, generator=generator).long()
        return self.ahead(i, steps)

    def uniform(self, i: Tensor, generator: Generator) -> Tensor:
        """A trajectory goal from the rest of the trajectory."""
        near, far = self.ahead(i, 1), self.last[i]
        u = torch.rand(i.shape, dtype=torch.float64, generator=generator, device=i.device)
        return (near * u + far * (1 - u)).round().long()

    def goals(
        self, i: Tensor, mixture: Mixture, generator: Generator, discount: float | None = None
    ) -> Tensor:
        """Goals from a mixture; trajectory goals are geometric with a discount, else uniform."""
        current, trajectory, _ = mixture
        if discount is None:
            goal = self.uniform(i, generator)
        else:
            goal = self.geometric(i, discount, generator)
        if current < 1:
            within = chance(i, trajectory / (1 - current), generator)
            goal = torch.where(within, goal, self.anchors(i.shape, generator))
        return torch.where(chance(i, current, generator), i, goal)

    def options(
        self, i: Tensor, length: int, mixture: Mixture, discount: float, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Where an option of OTA ends, and the goal it is judged by; where equal, it succeeds.

        An option lasts `length` steps unless the trajectory, or the goal where that lies on it,
        ends it before. The offset of a goal is not scaled by `length`; the "current" goal is the
        option's end.
        """
        current, trajectory, _ = mixture
        within = chance(i, trajectory / (1 - current + 1e-6), generator)
        ahead = self.geometric(i, discount, generator)
        end = self.ahead(i, length)
        end = torch.where(within, torch.minimum(end, ahead), end)
        goal = torch.where(within, ahead, self.anchors(i.shape, generator))
        return end, torch.where(chance(i, current, generator), end, goal)

    def subgoals(
        self, i: Tensor, steps: int, mixture: Mixture, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """A high-level actor's goal, and the state `steps` ahead that it should name.

        That is min(i + steps, goal) for trajectory goals, which are uniform, else min(i + steps,
        f). The state itself has no subgoal: a ValueError if it is asked for as a goal.
        """
        if mixture[0] > 0:
            raise ValueError(f"actor_goals of a high policy must begin with 0, got {list(mixture)}")
        within = chance(i, mixture[1], generator)
        later = self.uniform(i, generator)
        end = self.ahead(i, steps)
        target = torch.where(within, torch.minimum(end, later), end)
        return torch.where(within, later, self.anchors(i.shape, generator)), target

    def gather(self, *indices: Tensor) -> tuple[list[Tensor], Tensor]:
        """Observations of several index sets, and the actions of the first, in one gather."""
        found = self.rows(torch.stack(indices))
        return list(found["obs"].unbind(0)), found["act"][0]


Draw = Callable[[Any, Trajectories, Tensor, Generator], tuple[Batch, Batch]]  # see `goal_stages`


def chance(like: Tensor, probability: float, generator: Generator) -> Tensor:
    """Independent flags of the shape of `like`."""
    draw = torch.rand(like.shape, dtype=torch.float64, generator=generator, device=like.device)
    return draw < probability


def check_mixture(name: str, mixture: Mixture) -> None:
    """Raises ValueError unless there are three probabilities that sum to 1."""
    if len(mixture) != 3 or min(mixture) < 0 or abs(sum(mixture) - 1) > 1e-6:
        raise ValueError(
            f"{name} must be three probabilities that sum to 1 (the state itself, its trajectory, "
            f"any state), got {list(mixture)}"
        )


def trajectories(data: Dataset, device: Device = "cpu", budget: int = BUDGET) -> Trajectories:
    """The states of any data set with obs, act and next_obs, on the device if they fit.

    Raises DataError if a row's next_obs is not the following row's obs inside an episode. For the
    `budget` see `transitions`.
    """
    size, starts, lengths = len(data), data.starts.cpu(), data.lengths.cpu()
    valid = torch.arange(size) + episode_of(starts, size)  # state of every row
    ends = starts + lengths - 1
    finals = valid[ends] + 1  # last state of every episode
    last = finals.repeat_interleave(lengths + 1)
    fields = {}
    for name in ("obs", "act"):
        value = data[name].cpu()
        fields[name] = value.new_zeros(size + data.episodes, *value.shape[1:])
        fields[name][valid] = value
    following = data["next_obs"].cpu()
    fields["obs"][finals] = following[ends]
    stray = torch.zeros(size, dtype=torch.bool)
    for rows in torch.arange(size).split(BLOCK):  # of images all at once would fill the memory
        stray[rows] = (fields["obs"][valid[rows] + 1] != following[rows]).flatten(1).any(-1)
    if stray.any():
        raise DataError(
            f"{data.name}: next_obs differs from the following row's obs in {int(stray.sum())} "
            f"rows inside of episodes, first in row {int(stray.nonzero()[0, 0])}; goals are drawn "
            "along trajectories, so the rows of an episode must follow each other"
        )
    device = torch.device(device)
    gather = gatherer(fields, device, budget=budget)
    return Trajectories(gather, valid.to(device), last.to(device))


def two_goals(
    c: Any, states: Trajectories, i: Tensor, generator: Generator, discount: float | None = None
) -> tuple[Batch, Batch]:
    """Indices next_obs, value_goal and, drawn apart, goal, that of the policy; flags success.

    `c.value_goals` is a mixture with geometric trajectory goals of `c.discount`, unless another is
    given, `c.actor_goals` one with uniform ones. Success is 1 where value_goal is the state itself.
    """
    discount = c.discount if discount is None else discount
    value_goal = states.goals(i, c.value_goals, generator, discount)
    goal = states.goals(i, c.actor_goals, generator)
    success = {"success": (value_goal == i).float()}
    return {"next_obs": i + 1, "value_goal": value_goal, "goal": goal}, success


def goal_stages(draw: Draw = two_goals) -> Callable[[Any, Task, Run], list[Stage]]:
    """The `stages` of a goal-conditioned method: one, on states of the data and what `draw` adds.

    Batches hold obs, act, the states that are drawn, all as whole observations (*S, batch, o), and
    the flags (*S, batch). The method's config has `batch`, `images`, `crop_share` (see
    `offrl.nets.encoders.cropped`) and mixtures of goals. `draw` maps (config, states, anchors
    (*S, batch), generator) to indices of further states and flags.
    """

    def stages(algo: Any, task: Task, run: Run) -> list[Stage]:
        c = algo.config
        for name in ("value_goals", "actor_goals"):
            check_mixture(name, getattr(c, name, (0.0, 1.0, 0.0)))

        def start() -> Sampler:
            states = trajectories(task.data, run.device)

            def sample(generator: Generator) -> Batch:
                i = states.anchors((*run.seeds, c.batch), generator)
                places, flags = draw(c, states, i, generator)
                found, act = states.gather(i, *places.values())
                found = cropped(found, c.images * c.crop_share, generator)
                return dict(zip(("obs", *places), found, strict=True)) | {"act": act} | flags

            return sample

        return [Stage("train", run.steps, start, algo.update)]

    return stages
