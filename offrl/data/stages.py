"""The usual stages: learning from a data set, and from a replay that the method fills itself."""

from collections.abc import Callable
from typing import Any

from torch import Generator

from offrl.data.collector import Collector
from offrl.data.samplers import prepare, transitions
from offrl.engine.method import Metrics, Run, Stage, Task, turns_of


def offline(algo: Any, task: Task, run: Run) -> list[Stage]:
    """One stage on uniform transitions of the data, with standardized observations.

    Of algorithms with `standardize`, `config.batch`, and `config.reward_scale` and
    `config.reward_shift` if they read rewards.
    """
    c = algo.config

    def start():
        rewards = (c.reward_scale, c.reward_shift) if "reward" in run.fields else ()
        ready = prepare(algo.standardize, *rewards)
        return transitions(task.data, c.batch, run.seeds, run.device, run.fields, ready)

    return [Stage("train", run.steps, start, algo.update, turns_of(algo))]


def off_policy(algo: Any, task: Task, run: Run) -> list[Stage]:
    """One stage on the method's own replay: an update per environment step after a warm-up.

    Of algorithms with `config.warmup` random environment steps, counted in `run.steps`,
    `config.batch`, `config.capacity`, and `measure`.
    """
    c, data = algo.config, Collector.of(task, run)
    data.keep(min(c.capacity, run.steps))
    return [
        Stage(
            "train",
            run.steps - c.warmup,
            start=lambda: data.replay.sampler(c.batch),
            update=algo.update,
            turn=turns_of(algo),
            before=lambda: data.random(c.warmup, algo.generator),
            between=[(data.group, lambda: data.step_policy(algo))],
            clock=lambda step: c.warmup + step,
            measure=measured(algo, data),
            parts={"collector": data},
        )
    ]


def measured(algo: Any, data: Collector, rows: int = 2048) -> Callable[[], Metrics]:
    """What `algo.measure` says of rows of the replay, always drawn by the same numbers.

    They are at least four times the width of a representation whose rank is measured.
    """
    return lambda: algo.measure(data.replay.sampler(rows)(Generator(data.device).manual_seed(0)))
