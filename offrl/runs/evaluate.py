"""Scoring a finished or running training, and filming it."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from tqdm import tqdm

from offrl import config as configuration
from offrl.config import Resolved
from offrl.engine import checkpoint
from offrl.engine.evaluate import Evaluator, scenarios_of
from offrl.engine.method import Algorithm
from offrl.engine.ranges import Count, Whole
from offrl.envs.make import engines, env_id
from offrl.errors import ConfigError, Failed
from offrl.runs.policy import checkpoints, load_algorithm
from offrl.runs.record import UNITS, played_in, rows, scenarios, scored, summary
from offrl.runs.task import axes_of, make_env, make_evaluator, version
from offrl.runs.workers import prepare
from offrl.seeding import derive


@dataclass(frozen=True)
class Options:
    """Options of scripts/evaluate.py."""

    run: str  # a run directory, a seed's folder, a checkpoint or a snapshot
    episodes: Count = 100  # per seed
    seed: Whole = 0  # of the environments
    env: str | None = None  # to be scored in, where it is not the run's own
    explore: bool = False  # sample actions as in training instead of the deterministic policy
    video: str | None = None  # film one episode to this .gif or .mp4 (extra `video`)
    out: str | None = None  # file that receives the returns and the score as JSON


def evaluate_run(options: Options) -> dict[str, Any]:
    """Score every checkpoint of a run, print and return what was found."""
    folder, files = checkpoints(Path(options.run))
    resolved = configuration.of_run(folder)
    if options.env:
        resolved = replace(resolved, settings=replace(resolved.settings, env=options.env))
    s, robots = resolved.settings, version(resolved)
    headline = checkpoint.load(files[0]).get("headline") or "return"  # absent in older files
    played: list[dict[str, torch.Tensor]] = []
    seeds: list[int] = []
    for file in files:
        algo, group = load_algorithm(resolved, file)
        player = make_evaluator(resolved, axes_of(group), (options.episodes,), options.seed)
        with closing(player):
            played.append(player(algo, options.episodes, explore=options.explore))
        if headline not in played[0]:
            raise Failed(f"{folder} is scored by {headline}, which episodes do not give")
        seeds += group
    with closing(make_env(resolved)()) as env:
        versions = engines(env)

    def scores(key: str) -> tuple[str, np.ndarray, dict[str, Any]]:
        """Unit and values (seeds, episodes), and what is kept of them."""
        returns = rows([values[key] for values in played])
        unit, values = scored(resolved, returns, headline)
        return unit, values, {"score": summary(values.mean(-1)), "returns": returns.tolist()}

    unit, values, about = scores(headline)
    found = {
        "run": str(options.run),
        "checkpoints": [str(file) for file in files],
        "env": s.env,
        "env_version": robots,
        "versions": versions,
        "legacy_mass": s.legacy_mass,
        "seeds": seeds,
        "episodes": options.episodes,
        "explore": options.explore,
        "unit": UNITS.get(unit, unit),
        **about,
    }
    for name in scenarios(played[0], headline):
        apart = scores(f"{headline}/{name}")[2]
        found.setdefault("scenarios", {})[name] = apart
        print(f"{name}: {unit} {apart['score']['iqm']:.1f}")
    for seed, row in zip(seeds, values, strict=True):
        print(f"seed {seed}: {unit} {row.mean():.1f}, std {row.std():.1f} over {len(row)} episodes")
    world = {"id": env_id(s.env, robots), "legacy_mass": s.legacy_mass}
    iqm, place = found["score"]["iqm"], played_in(world, versions)
    print(f"IQM of {len(seeds)} seed(s): {found['unit']} {iqm:.1f} ({place})")
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1))
    if options.video:
        names = resolved.method.scenarios(resolved.config())
        loaded = load_algorithm(resolved, files[0])
        frames = film(resolved, loaded, names, options.seed, options.explore)
        write_video(Path(options.video), frames)
        print(f"{len(frames)} frames in {options.video}")
    return found


def player(folder: Path, device: torch.device) -> Callable[[Path], dict[str, torch.Tensor]]:
    """Plays checkpoints of a run as the run itself does at a point of its curve."""
    resolved = configuration.of_run(folder)
    s = resolved.settings
    prepare(resolved, folder, device)
    episodes = (s.eval_episodes, s.final_episodes)
    evaluator = cache(lambda axes: make_evaluator(resolved, axes, episodes, 0, device))

    def play(path: Path) -> dict[str, torch.Tensor]:
        algo, group = load_algorithm(resolved, path, device)
        return evaluator(axes_of(group))(algo, s.eval_episodes)

    return play


class Camera(gymnasium.Wrapper):
    """Takes a frame before every step of the first episode."""

    def __init__(self, env: gymnasium.Env, bar: tqdm):
        super().__init__(env)
        self.bar, self.frames, self.over = bar, list[Any](), False

    def step(self, action: Any):
        if not self.over:
            try:
                self.frames.append(self.env.render())
            except Exception as error:  # every GL backend raises its own type
                raise Failed(
                    f"cannot render here ({error}); on a machine without a screen set "
                    "MUJOCO_GL=egl or MUJOCO_GL=osmesa"
                ) from error
            self.bar.update()
        found = self.env.step(action)
        self.over = self.over or found[2] or found[3]
        return found


def film(
    resolved: Resolved,
    loaded: tuple[Algorithm, list[int]],
    names: Sequence[str],
    seed: int,
    explore: bool = False,
) -> list[Any]:
    """RGB frames of one episode of the first seed, in the first of the scenarios or tasks.

    Raises Failed if the machine cannot render.
    """
    algo, group = loaded
    make = make_env(resolved, render=True)
    first = scenarios_of(names, make)[:1]
    player = Evaluator(make, axes_of(group), 1, derive(seed, "film"), scenarios=first)
    with closing(player):
        env = player.envs.envs[0]
        horizon = env.spec.max_episode_steps if env.spec else None
        with tqdm(total=horizon, desc="filming", unit="frame", leave=False) as bar:
            player.envs.envs[0] = camera = Camera(env, bar)
            player(algo, 1, explore)
    return camera.frames


def write_video(path: Path, frames: list[Any]) -> None:
    """Write frames as .gif (25 per second, every second one) or .mp4 (50 per second).

    Raises ConfigError for another suffix, and Failed if the extra `video` is missing.
    """
    if path.suffix not in (".gif", ".mp4"):
        raise ConfigError(f"video must end in .gif or .mp4, got {path}")
    try:
        import imageio
    except ImportError as error:
        raise Failed("filming needs the extra: pip install 'offrl[video]'") from error
    if path.suffix == ".gif":
        imageio.mimsave(path, frames[::2], duration=40, loop=0)
    else:
        imageio.mimsave(path, frames, fps=50)
