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
from offrl.data import build, sources
from offrl.data.dataset import Dataset, check, check_fits
from offrl.engine.evaluate import Evaluator, scenarios_of, width
from offrl.engine.method import Method, Policy, Spec, Task
from offrl.envs import ogbench
from offrl.envs.make import LONGEST, VERSIONS, cut_off, factory, own_actions, tasks
from offrl.envs.vector import resumes, sizes
from offrl.envs.workers import environments
from offrl.errors import ConfigError, Failed
from offrl.runs.validation import Losses
from offrl.seeding import derive


def make_env(resolved: Resolved, render: bool = False) -> Callable[..., Any]:
    """A picklable maker of the run's environment; ConfigError where it has none."""
    s = resolved.settings
    if resolved.free:
        raise ConfigError(
            f"a run of env=none has no environment; name one: env={ogbench.NAMES[0]}, env=hopper "
            "or a Gymnasium id"
        )
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
    low, high, world = s.action_low, s.action_high, None
    if not resolved.free:
        with closing(make_env(resolved)()) as env:
            world, first = sizes(env), getattr(own_actions(env), "start", None)
        if (low, high, first) == (None, None, 0) and source_of(resolved) == "files":
            low, high = 0, world[1] - 1  # some may not occur
    how: Any = {"episodes": method.episodes, "low": low, "high": high}
    data = sources.load(s.source, s.env, s.dataset, s.rows, **how)
    check(data, method.fields)
    if world is not None:
        check_fits(data, *world[:2], s.env)
    elif (wrong := misfit_of_actions(method, data.discrete)) and resolved.free:
        refuse(resolved, f"{wrong}, {data.name} has others", data.discrete)
    return data


def learned(resolved: Resolved, data: Dataset | None) -> Dataset | None:
    """What a run learns from: without an environment some episodes are held out."""
    return build.split(data, resolved.settings.validation)[0] if data and resolved.free else data


def source_of(resolved: Resolved) -> str:
    return sources.settled(resolved.settings.source, resolved.settings.dataset)


def misfit_of_actions(method: Method, discrete: bool) -> str:
    kind = "discrete" if discrete else "continuous"
    return "" if kind in method.actions else f"is for {' or '.join(method.actions)} actions"


def refuse(resolved: Resolved, wrong: str, discrete: bool | None = None) -> None:
    """Raises ConfigError: the method is not for a run without an environment.

    Args:
        discrete: the actions of the data, where they are known.
    """
    methods = {name: configuration.method(name) for name in configuration.algorithms()}
    kinds = [False, True] if discrete is None else [discrete]
    fitting = [
        name
        for name, method in methods.items()
        if not method.online and not all(misfit_of_actions(method, kind) for kind in kinds)
    ]
    known = ", ".join(fitting) or "none is here yet; see docs/add-a-method.md"
    raise ConfigError(f"{resolved.name} {wrong}; methods for these: {known}")


def check_free(resolved: Resolved) -> None:
    """Raises ConfigError if a method or data need an environment that the run does not have."""
    if resolved.method.online:
        refuse(resolved, "collects its own data and so needs an environment, env=none is for logs")
    if (source := source_of(resolved)) not in ("files", "given", "minari"):
        raise ConfigError(
            f"env=none is for data of your own: dataset=FILE, source=minari, or offrl.train(data=) "
            f"in Python; source={source} goes with an environment"
        )


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

    At most so many `workers` step the environments of an online method; `progress` shows a bar for
    long evaluations.
    """
    s = resolved.settings
    if resolved.free and data is not None:
        kept, held = build.split(data, s.validation)
        spec = spec_of(resolved, kept)
        losses = Losses(resolved, held, spec, axes_of(group), device) if held else None
        return Task(spec, kept, None, losses, None)
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
    source = source_of(resolved)
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
