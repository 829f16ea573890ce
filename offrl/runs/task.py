"""What a run is about: environment, data and device, and what of these does not fit together."""

import math
from collections.abc import Callable
from typing import Any

import gymnasium
import torch

from offrl import config as configuration
from offrl.config import ConfigError, Resolved
from offrl.data import sources
from offrl.data.dataset import Dataset, check, check_fits
from offrl.envs import ogbench
from offrl.envs.make import VERSIONS, factory, tasks
from offrl.envs.vector import sizes
from offrl.runs.workers import Failed


def make_env(resolved: Resolved) -> Callable[[], Any]:
    """A picklable maker of the run's environment."""
    s = resolved.settings
    return factory(s.env, version(resolved), s.legacy_mass, action_repeat=s.action_repeat)


def version(resolved: Resolved) -> str:
    """The robots' version: D4RL's scores belong to v4's dynamics, generated data to v5."""
    s = resolved.settings
    if s.env_version != "auto":
        return s.env_version
    if (named := s.env.rpartition("-")[2]) in VERSIONS:
        return named
    return "v4" if s.source == "d4rl" else "v5"


def pick_device(name: str) -> torch.device:
    """Raises Failed if CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise Failed("device=cuda, but torch sees no CUDA device; use device=cpu or device=auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_data(resolved: Resolved) -> Dataset | None:
    """The data set on disk or in memory, checked against the method and the environment."""
    if configuration.online(resolved.algo):
        return None
    s = resolved.settings
    data = sources.load(s.source, s.env, s.dataset, s.rows)
    check(data, configuration.module(resolved.algo).FIELDS)
    env = make_env(resolved)()
    check_fits(data, math.prod(env.observation_space.shape or ()),
               math.prod(env.action_space.shape or ()), s.env)
    env.close()
    return data


def check_task(resolved: Resolved, env: gymnasium.Env) -> None:
    """Raises ConfigError if the method is not for such an environment or such data.

    A method says by `ACTIONS` if it takes others than continuous ones, by `GOALS` that it needs
    goals.
    """
    s, algo = resolved.settings, resolved.algo
    kind = "discrete" if sizes(env)[2] else "continuous"
    goals = bool(tasks(env))
    made = sources.settled(s.source, s.dataset) in ("generated", "ogbench")
    no_rewards = made and ogbench.known(s.env)

    def fits(name: str) -> bool:
        rewards = "reward" in configuration.module(name).FIELDS
        return (
            kind in actions(name)
            and (goals or not goal_conditioned(name))
            and not (rewards and no_rewards)
        )

    if fits(algo):
        return
    if kind not in actions(algo):
        wrong = f"is for {' or '.join(actions(algo))} actions, {s.env} has {kind} ones"
    elif goal_conditioned(algo) and not goals:
        wrong = (
            f"needs an environment that names goals, as OGBench's do (env={ogbench.NAMES[0]}), "
            f"not {s.env}"
        )
    else:
        wrong = f"learns from rewards, which OGBench's data of {s.env} do not have"
    fitting = [name for name in configuration.algorithms() if fits(name)]
    alike = configuration.online(algo)
    same = [name for name in fitting if configuration.online(name) == alike]
    raise ConfigError(f"{algo} {wrong}; methods for these: {', '.join(same or fitting)}")


def actions(algo: str) -> tuple[str, ...]:
    return getattr(configuration.module(algo), "ACTIONS", ("continuous",))


def goal_conditioned(algo: str) -> bool:
    return getattr(configuration.module(algo), "GOALS", False)


def check_robot(resolved: Resolved) -> None:
    """Generated data come from the v5 robots: scores of other robots would be of another task.

    Raises:
        ConfigError: if other robots are asked for.
    """
    s = resolved.settings
    generated = sources.settled(s.source, s.dataset) == "generated"
    if configuration.online(resolved.algo) or not generated:
        return
    if version(resolved) != "v5" or s.legacy_mass:
        raise ConfigError(
            "generated data come from the v5 robots with their own masses; "
            "env_version=v4 and legacy_mass=true go with source=d4rl or files"
        )
