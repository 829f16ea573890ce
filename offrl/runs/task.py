"""What a run is about: environment, data and device, and what of these does not fit together."""

from collections.abc import Callable
from contextlib import closing
from typing import Any

import gymnasium
import torch
from torch import Tensor
from tqdm import tqdm

from offrl import config as configuration
from offrl.config import Resolved
from offrl.data import sources
from offrl.data.dataset import Dataset, check, check_fits
from offrl.engine.evaluate import Evaluator, scenarios_of, width
from offrl.engine.method import Method, Policy, Spec, Task
from offrl.envs import ogbench
from offrl.envs.make import LONGEST, VERSIONS, cut_off, factory, tasks
from offrl.envs.vector import resumes, sizes
from offrl.envs.workers import environments
from offrl.errors import ConfigError, Failed
from offrl.seeding import derive


def make_env(resolved: Resolved, render: bool = False) -> Callable[..., Any]:
    """A picklable maker of the run's environment; see `offrl.envs.make.factory`."""
    s = resolved.settings
    robots, repeat = version(resolved), s.action_repeat
    return factory(s.env, robots, s.legacy_mass, render, repeat, s.episode_limit)


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
    best = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(best if name == "auto" else name)


def load_data(resolved: Resolved) -> Dataset | None:
    """The data set on disk or in memory, checked against the method and the environment."""
    method, s = resolved.method, resolved.settings
    if method.online:
        return None
    data = sources.load(s.source, s.env, s.dataset, s.rows, episodes=method.episodes)
    check(data, method.fields)
    world = spec_of(resolved)
    check_fits(data, world.obs_dim, world.act_dim, s.env)
    return data


def spec_of(resolved: Resolved, data: Dataset | None = None) -> Spec:
    """Shapes of the data, or of the environment where there are none."""
    if data is not None:
        return Spec(data.obs_dim, data.act_dim, *data.statistics(), data.discrete)
    with closing(make_env(resolved)()) as env:
        obs_dim, act_dim, discrete = sizes(env)
        players = tuple(getattr(env.unwrapped, "players", ()))
    return Spec(obs_dim, act_dim, discrete=discrete, players=players)


def make_task(
    resolved: Resolved,
    data: Dataset | None,
    group: list[int],
    device: torch.device,
    workers: int = 1,
    progress: bool = False,
) -> Task:
    """The task of one group of seeds.

    Args:
        workers: most processes that step the environments of an online method.
        progress: show a bar for long evaluations.
    """
    s = resolved.settings
    counts = s.eval_episodes, s.final_episodes
    player = make_evaluator(resolved, axes_of(group), counts, 0, device)

    def envs() -> Any:
        starts = [derive(seed, "training", i) for seed in group for i in range(s.envs)]
        return environments([make_env(resolved)] * len(starts), starts, s.env_workers, workers)

    def evaluate(algo: Policy, episodes: int) -> dict[str, Tensor]:
        total = player.total(episodes)
        label = "evaluation" if episodes <= s.eval_episodes else "final evaluation"
        about = {"desc": label, "unit": "episode", "leave": False, "delay": 2}
        with tqdm(total=total, disable=not progress, **about) as bar:
            return player(algo, episodes, tick=bar.update)

    return Task(spec_of(resolved, data), data, envs, evaluate)


def axes_of(group: list[int]) -> tuple[int, ...]:
    """Stacked seed axes of a group: none for a single seed."""
    return (len(group),) if len(group) > 1 else ()


def make_evaluator(
    resolved: Resolved,
    axes: tuple[int, ...],
    episodes: tuple[int, ...],
    seed: int,
    device: torch.device | str = "cpu",
) -> Evaluator:
    """Roll-outs in the method's scenarios, or in the environment's tasks where it has none."""
    names = resolved.method.scenarios(resolved.config())
    make, seed = make_env(resolved), derive(seed, "evaluator")
    situations, wide = scenarios_of(names, make), width(*episodes)
    return Evaluator(make, axes, wide, seed, device, situations, "best" if names else "all")


def notes_on(resolved: Resolved, env: gymnasium.Env) -> list[str]:
    """What a user should know of the environment before the run begins."""
    s, notes = resolved.settings, []
    if cut_off(env):
        notes.append(
            f"{s.env} states no time limit: episodes are cut off after {LONGEST} actions; "
            "choose another limit with episode_limit="
        )
    if resolved.method.online and not resumes(env):
        notes.append(
            f"the state of {s.env} cannot be stored: a resumed run starts its running episodes "
            "anew. With snapshot() and restore(state), made of plain values and tensors, an "
            "environment goes on exactly"
        )
    return notes


def check_task(resolved: Resolved, env: gymnasium.Env) -> None:
    """Raises ConfigError if the method is not for such an environment or such data.

    Generated data come from the v5 robots: scores of other robots would be of another task.
    """
    s, mine = resolved.settings, resolved.method
    kind = "discrete" if sizes(env)[2] else "continuous"
    goals = bool(tasks(env))
    source = sources.settled(s.source, s.dataset)
    no_rewards = source in ("generated", "ogbench") and ogbench.known(s.env)

    def misfit(method: Method) -> str:
        if kind not in method.actions:
            return f"is for {' or '.join(method.actions)} actions, {s.env} has {kind} ones"
        if method.goals and not goals:
            like = f"as OGBench's do (env={ogbench.NAMES[0]})"
            return f"needs an environment that names goals, {like}, not {s.env}"
        if "reward" in method.fields and no_rewards:
            return f"learns from rewards, which OGBench's data of {s.env} do not have"
        return ""

    if wrong := misfit(mine):
        methods = {name: configuration.method(name) for name in configuration.algorithms()}
        fitting = [name for name, method in methods.items() if not misfit(method)]
        same = [name for name in fitting if methods[name].online == mine.online]
        known = ", ".join(same or fitting)
        raise ConfigError(f"{resolved.name} {wrong}; methods for these: {known}")
    other = version(resolved) != "v5" or s.legacy_mass
    if other and source == "generated" and not mine.online:
        raise ConfigError(
            "generated data come from the v5 robots with their own masses; "
            "env_version=v4 and legacy_mass=true go with source=d4rl or files"
        )
