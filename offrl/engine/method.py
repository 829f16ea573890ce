"""What an algorithm tells the loop: the shape of the task, and the stages of its run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

Batch = dict[str, Tensor]
Metrics = dict[str, Tensor]
Sampler = Callable[[Generator], Batch]


@dataclass(frozen=True)
class Spec:
    """Shape of a task and the observation statistics of its training data.

    Attributes:
        obs_dim, act_dim: sizes of one observation and one action (number of actions if discrete).
        obs_mean, obs_std: float32 (obs_dim,) of the training data, or None to leave observations
            as they are. The std already holds the small constant that keeps it away from zero.
        discrete: actions are int64 in [0, act_dim) rather than floats in [-1, 1].
    """

    obs_dim: int
    act_dim: int
    obs_mean: Tensor | None = None
    obs_std: Tensor | None = None
    discrete: bool = False


class Policy(Protocol):
    """What evaluation and roll-outs ask: actions from what may be known now.

    `now` holds obs (*S, B, o), start (*S, B), 1 where an episode begins, and in evaluation reward
    (*S, B) of the action before, scenario (*S, B), int64 index into the algorithm's `scenarios`,
    and goal (*S, B, g), an observation, where the environment names one.
    Actions lie in [-1, 1], or are int64 (*S, B) if discrete; `explore` samples as in training;
    random draws come from `generator` only.

    A method may also have `estimate(now, act)`, its own guess of the return discounted by
    `config.discount` that follows, (*S, B): evaluation then reports its bias.
    """

    def act(
        self,
        now: Batch,
        memory: Any = None,
        explore: bool = False,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Any]: ...


class Algorithm(Policy, Protocol):
    """What the engine asks of a method; nothing inherits from it.

    `update` must be capturable: fixed shapes, no host synchronization, no branch on a tensor's
    value, every random draw from the run's generator. Its pattern repeats every `cycle` updates.
    `state` holds everything needed to continue and to evaluate.
    """

    generator: Generator
    cycle: int

    def update(self, batch: Batch, step: int) -> Metrics: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


def scenarios(algo: Policy) -> tuple[str, ...]:
    """Names of the situations that a method wants to be scored in, such as target returns.

    A method that has several says so by an attribute `scenarios`; the others are scored once.
    """
    return getattr(algo, "scenarios", ())


class Part(Protocol):
    """Anything beside the algorithm that a resumed run needs: a replay, a collector."""

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Stage:
    """One phase of training.

    Attributes:
        name: appears in the metrics.
        steps: number of updates, or None to run until `stop` says so.
        start: builds the sampler when the stage begins, on a fresh run and on a resumed one.
        update: (batch, step) -> metrics.
        cycle: the update's pattern repeats after this many updates.
        between: (period, function) pairs of eager work, done before every update whose number is
            a multiple of the period: environment steps, model roll-outs.
        before: eager work done once when the stage begins and not on resume: random warm-up.
        stop: of a stage without `steps`: asked before each `cycle`; True ends the stage.
        offset: added to the update's number wherever a step is shown; an online method's
            environment steps before its first update.
        stride: steps that are shown per update; environment steps of an online method.
        measure: values (*S,) that are logged at every point of the learning curve, such as ranks of
            a representation; draws nothing from the run's generator.
        parts: state beside the algorithm's, saved in every checkpoint.
    """

    name: str
    steps: int | None
    start: Callable[[], Sampler]
    update: Callable[[Batch, int], Metrics]
    cycle: int = 1
    between: Sequence[tuple[int, Callable[[], None]]] = ()
    before: Callable[[], None] | None = None
    stop: Callable[[], bool] | None = None
    offset: int = 0
    stride: int | Fraction = 1
    measure: Callable[[], Metrics] | None = None
    parts: dict[str, Part] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What a method's `stages` may ask of the run.

    Attributes:
        steps: updates of an offline method, environment steps of an online one.
        seeds: stacked seed axes, () for a single run.
        device: where parameters and batches live.
        cache: folder for what a method precomputes from a data set, keyed by its digest.
        progress: shows a progress bar over an iterable: (iterable, total, label) -> iterable.
    """

    steps: int
    seeds: tuple[int, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cache: str | None = None
    progress: bool = True


def modules_state(owner: Any, names: Sequence[str]) -> dict[str, Any]:
    """State of the named networks and optimizers of an algorithm, and of its generator."""
    state = {name: getattr(owner, name).state_dict() for name in names}
    return state | {"generator": owner.generator.get_state()}


def load_modules(owner: Any, names: Sequence[str], state: dict[str, Any]) -> None:
    """Inverse of `modules_state`.

    Raises:
        ValueError: if the state was made by another method or with other sizes.
    """
    if set(state) != {*names, "generator"}:
        raise ValueError(
            f"the checkpoint holds {', '.join(sorted(state))}; "
            f"{type(owner).__name__} needs {', '.join(sorted({*names, 'generator'}))}"
        )
    for name in names:
        try:
            getattr(owner, name).load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"the checkpoint's {name} does not fit: {error}") from error
    for name in names:
        if isinstance(optimizer := getattr(owner, name), torch.optim.Optimizer):
            for group in optimizer.param_groups:  # torch leaves a loaded rate where the file was
                if isinstance(group["lr"], Tensor):
                    group["lr"] = group["lr"].to(group["params"][0].device)
    owner.generator.set_state(state["generator"].cpu())
