"""What a method tells the rest of the library, and what it is told: nothing here to inherit from.

A method is one file that ends with `METHOD = Method(...)`. Its class has `update` and `act`; the
engine finds the networks, optimizers, tensors and numbers to save on the object itself
(`offrl.engine.state`). What a run is about is a `Task`, what it does are `Stage`s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

Batch = dict[str, Tensor]
Seeds = tuple[int, ...]  # stacked seed axes, () for one
Metrics = dict[str, Tensor]
Sampler = Callable[[Generator], Batch]
Now = dict[str, Any]  # what a policy may know at a moment, and how it shall act

TRANSITION = ("obs", "act", "reward", "next_obs", "terminal")


@dataclass(frozen=True)
class Spec:
    """Shape of a task and the observation statistics of its training data.

    Attributes:
        obs_dim, act_dim: sizes of one observation and one action (number of actions if discrete).
        obs_mean, obs_std: float32 (obs_dim,) of the training data, or None to leave observations
            as they are. The std already holds the small constant that keeps it away from zero.
        discrete: actions are int64 in [0, act_dim) rather than floats in [-1, 1].
        players: widths of each player's part of an action, which sum to act_dim; () for one player.
    """

    obs_dim: int
    act_dim: int
    obs_mean: Tensor | None = None
    obs_std: Tensor | None = None
    discrete: bool = False
    players: tuple[int, ...] = ()


class Policy(Protocol):
    """Actions in [-1, 1] (*S, B, a), or int64 (*S, B) if discrete, from what may be known now.

    `now` holds obs (*S, B, o), start (*S, B), 1 where an episode begins, and reward (*S, B) of the
    action before (0 at a start); in evaluation scenario (*S, B), int64 index into the scenarios;
    goal (*S, B, g), an observation, where the environment names one; target (*S, B), a return to
    ask for where `config.targets` names those of the scenarios, if it shall be another one;
    `explore`, True to act as in training; and `generator`, from which all random draws come. Called
    without gradients.

    `memory` is what the last call returned, None at first: tensors in dicts, lists or tuples, each
    with the rows of obs. A policy with memory resets the rows where start is 1.

    A method may also have `estimate(now, act)`, its own guess of the return discounted by
    `config.discount` that follows, (*S, B): evaluation then reports its bias.
    """

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]: ...


class Algorithm(Policy, Protocol):
    """What the engine asks of a method.

    `update` must be capturable: fixed shapes, no host synchronization, no branch on a tensor's
    value, every random draw from the run's generator. `turn` says which of its few patterns it
    makes; a method with several has `turn(step)`, which names the pattern of an update by number.
    """

    generator: Generator

    def update(self, batch: Batch, turn: int) -> Metrics: ...


class Part(Protocol):
    """What a resumed run needs beside the algorithm: a replay, environments, a roll-out.

    `save` returns what belongs into the checkpoint and appends what is large to files of its own
    whose names begin with `place`; `load` continues from both. Files may hold more than the
    checkpoint knows, from a process that was killed; what it knows must stay readable until `save`
    is called for the second time after it.
    """

    def save(self, place: Path) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any], place: Path) -> None: ...


@dataclass(frozen=True)
class Stage:
    """One phase of training.

    Attributes:
        name: appears in the metrics.
        steps: number of updates, or None to run until `stop` says so.
        start: builds the sampler when the stage begins, on a fresh run and on a resumed one, so it
            draws nothing from the run's generator.
        update: (batch, turn) -> metrics.
        turn: number of an update -> which of its few patterns it makes; each is captured once.
        between: (period, work) pairs of eager work, done before every update whose number is a
            multiple of the period: environment steps, model roll-outs, a fit by `minimize`. Metrics
            that a work returns are logged with the stage's own.
        before: eager work done once when the stage begins and not on resume: random warm-up.
        finish: makes what later stages use after the last update; a run killed in it does it again.
        stop: of a stage without `steps`: asked before each update; True ends the stage.
        evaluate: whether its points belong to the learning curve; False where there is no policy.
        clock: updates made -> steps that people see; environment steps of an online method. Stages
            add up: a later one goes on from the last step of the one before.
        measure: values (*S,) that are logged at every point of the learning curve, such as ranks of
            a representation; draws nothing from the run's generator.
        parts: state beside the algorithm's, by name; stages that share one give it the same name.
    """

    name: str
    steps: int | None
    start: Callable[[], Sampler]
    update: Callable[[Batch, int], Metrics]
    turn: Callable[[int], int] = lambda step: 0
    between: Sequence[tuple[int, Callable[[], Metrics | None]]] = ()
    before: Callable[[], None] | None = None
    finish: Callable[[], None] | None = None
    stop: Callable[[], bool] | None = None
    evaluate: bool = True
    clock: Callable[[int], int] = lambda step: step
    measure: Callable[[], Metrics] | None = None
    parts: dict[str, Part] = field(default_factory=dict)


Evaluate = Callable[[Any, int], dict[str, Tensor]]  # (algorithm, episodes) -> name -> (*S, n)


@dataclass(frozen=True)
class Task:
    """What a run is about. An environment is one way to score a policy, logged rows another.

    Attributes:
        spec: shapes and statistics.
        data: the `offrl.data.Dataset` to learn from, or None.
        envs: makes the environments (`offrl.envs.vector.Vector`) that a method steps in
            training, or None.
        evaluate: scores a policy: (algorithm, episodes) -> raw values (*S, n) by name, of episodes
            or of estimates on logged rows; None for a run without a score.
        headline: name of the values whose mean is the score; None if none is.
    """

    spec: Spec
    data: Any = None
    envs: Callable[[], Any] | None = None
    evaluate: Evaluate | None = None
    headline: str | None = "return"


@dataclass(frozen=True)
class Run:
    """What a method's `stages` may ask of the run.

    Attributes:
        steps: updates of an offline method, environment steps of an online one.
        seeds: stacked seed axes, () for a single run.
        device: where parameters and batches live.
        fields: of the data that the method reads, as its METHOD says.
        cache: folder for what a method precomputes from a data set, keyed by its digest.
        progress: shows a progress bar over an iterable: (iterable, total, label) -> iterable.
    """

    steps: int
    seeds: Seeds = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    fields: tuple[str, ...] = TRANSITION
    cache: str | None = None
    progress: bool = True


@dataclass(frozen=True)
class Method:
    """What the command line and the loop need to know of a method, stated once in its file.

    Attributes:
        make: (config, spec, generator, seeds) -> the algorithm; its class, as a rule.
        config: dataclass of the options, each with a default; `steps` among them.
        stages: (algorithm, task, run) -> what a run does, such as `offrl.data.stages.offline`.
        fields: that it reads of a data set; () for a method that collects its own data.
        actions: kinds that it is for, "continuous", "discrete".
        goals: the environment must name goals.
        episodes: it reads whole episodes in order and not single transitions, so rows without a
            successor are kept: D4RL's rule for Q-learning drops them.
        stacks: whether its parameters carry seed axes; asked with the config where that decides.
        scheduled: whether something runs over all of its steps, such as a learning rate that
            falls to zero: a run that is extended then differs from one that was as long at first.
        scenarios: config -> names of the situations that it is to be scored in, such as target
            returns; () to be scored once, or in the environment's own tasks.
    """

    make: Callable[..., Any]
    config: type
    stages: Callable[[Any, Task, Run], list[Stage]]
    fields: tuple[str, ...] = ()
    actions: tuple[str, ...] = ("continuous",)
    goals: bool = False
    episodes: bool = False
    stacks: Callable[[Any], bool] = lambda config: True
    scheduled: bool = False
    scenarios: Callable[[Any], tuple[str, ...]] = lambda config: ()

    @property
    def online(self) -> bool:
        """Whether the method collects its own data."""
        return not self.fields


def turns_of(algo: Any) -> Callable[[int], int]:
    """`algo.turn`, or always 0 for a method whose updates are all alike."""
    return getattr(algo, "turn", lambda step: 0)
