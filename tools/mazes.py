"""What a goal-conditioned method knows of a maze: order along expert paths, maps, trajectories.

The order-consistency ratio is the share of steps t of an expert's path for which the value grows
towards the goal, V(s_{t+k}, g) > V(s_t, g), after a trailing moving average of V along the path.
It is what a high-level policy learns from: where it fails, subgoals point the wrong way. Ahn et
al., NeurIPS 2025, arXiv:2505.12737; their windows are 150 for the humanoid, 30 for the ant and 10
for cubes. Of a hierarchy both levels are examined apart, see `tools.levels`.
"""

import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offrl import cli
from offrl import config as configuration
from offrl.cli import readable_errors
from offrl.config import Resolved
from offrl.engine.method import Algorithm
from offrl.envs.make import factory, tasks
from offrl.errors import ConfigError
from offrl.runs.evaluate import checkpoints, load_algorithm
from offrl.seeding import derive, generator
from tools import levels

WINDOW = 30  # of the moving average, in steps
FINE = 10  # points of a map along the side of a cell
COLORS = ("tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")  # of the tasks


@dataclass(frozen=True)
class Options:
    """Options of scripts/mazes.py.

    runs=[DIR,DIR,...]     run directories in pointmazes; runs of one method and task are its seeds
    window=30              of the moving average, in steps; 1 for none
    task=1                 whose goal the map shows
    episodes=4             per task, played and drawn
    seed=0                 of expert paths and trajectories
    out=PATH               writes PATH.json and PATH.png, a column per method
    """

    runs: tuple[str, ...]
    out: str
    window: int = WINDOW
    task: int = 1
    episodes: int = 4
    seed: int = 0


def main() -> None:
    with readable_errors():
        look(cli.options(Options, sys.argv[1:]))


def look(options: Options) -> list[dict[str, Any]]:
    """Ratios of all runs, and a picture of the first run of every method.

    Raises:
        ConfigError: for a run whose environment is no pointmaze, whose method has no value, or
            that belongs to another maze than the first one.
    """
    rows: list[dict[str, Any]] = []
    shown: dict[str, tuple[Resolved, Algorithm]] = {}
    mazes = set()
    for run in options.runs:
        folder, files = checkpoints(Path(run))
        resolved = configuration.of_run(folder)
        mazes.add(resolved.settings.env)
        if len(mazes) > 1 or not resolved.settings.env.startswith("pointmaze-"):
            raise ConfigError(
                f"the runs must be of one pointmaze, found {', '.join(sorted(mazes))}"
            )
        for file in files:
            algo, seeds = load_algorithm(resolved, file)
            if len(seeds) > 1 or not hasattr(algo, "value"):
                raise ConfigError(f"{file} holds stacked seeds, or {resolved.algo} has no value")
            shown.setdefault(resolved.algo, (resolved, algo))
            steps = resolved.options.get("subgoal_steps", 25)
            row = {"algo": resolved.algo, "task": resolved.task, "seed": seeds[0], "k": steps}
            paths = expert_paths(resolved.settings.env, options.seed)
            row |= consistency(algo, paths, steps, options.window)
            if hasattr(algo, "high"):
                row |= levels.examine(algo, resolved, paths, steps, options.episodes, options.seed)
            rows.append(row)
            print(said(row))
    Path(options.out).with_suffix(".json").write_text(json.dumps(rows, indent=1))
    draw(Path(options.out).with_suffix(".png"), shown, options)
    return rows


def said(row: dict[str, Any]) -> str:
    """A line for people."""
    mean = {name: np.mean(value) for name, value in row.items() if isinstance(value, list)}
    text = (
        f"{row['algo']} seed {row['seed']}: order consistency {mean['smoothed']:.3f} "
        f"(window {row['window']}), {mean['raw']:.3f} (none)"
    )
    if "led" in row:
        text += (
            f"; success {mean['success']:.0%}, led by the shortest path {mean['led']:.0%}; "
            f"{mean['nearer']:.0%} of the subgoals lie nearer to the goal, {mean['gain']:.1f} on "
            f"average ({row['reach']:.1f} if they were the data's)"
        )
    return text


def consistency(
    algo: Any, paths: list[tuple[Tensor, Tensor]], steps: int, window: int
) -> dict[str, Any]:
    """The ratio of every task along its expert path, with and without the moving average."""
    found: dict[str, Any] = {"window": window, "smoothed": [], "raw": [], "path": []}
    for path, goal in paths:
        value = algo.value(path, goal.expand_as(path))
        found["smoothed"].append(order_consistency(value, steps, window))
        found["raw"].append(order_consistency(value, steps, 1))
        found["path"].append(len(path))
    return found


def order_consistency(value: Tensor, steps: int, window: int = 1) -> float:
    """Share of t with V_{t + steps} > V_t, after a trailing moving average.

    Args:
        value: (T,) along a path to the goal, T > steps.
        window: entries of the average, fewer at the beginning.

    Returns:
        1 where the value grows all along the path, about 0.5 for noise.

    >>> order_consistency(torch.arange(9.0), 2), order_consistency(-torch.arange(9.0), 2)
    (1.0, 0.0)
    """
    total = value.double().cumsum(0)
    before = torch.cat([torch.zeros(window, dtype=torch.float64), total])[: len(value)]
    count = torch.arange(1, len(value) + 1).clamp(max=window)
    smooth = (total - before) / count
    return float((smooth[steps:] > smooth[:-steps]).double().mean())


@functools.cache
def expert_paths(env: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    """States (T, 2) of the maze's own oracle without noise, and the goal (1, 2), of each task."""
    world = factory(env)()
    core: Any = world.unwrapped
    paths = []
    for option in tasks(world):
        obs, info = world.reset(seed=derive(seed, "expert"), options=option)
        path, over = [obs], False
        while not over:
            way = core.get_oracle_subgoal(core.get_xy(), core.cur_goal_xy)[0] - core.get_xy()
            action = (way / (np.linalg.norm(way) + 1e-6)).astype(np.float32)
            obs, _, reached, late, _ = world.step(action)
            path.append(obs)
            over = reached or late
        goal = torch.as_tensor(info["goal"], dtype=torch.float32).unsqueeze(0)
        paths.append((torch.as_tensor(np.stack(path), dtype=torch.float32), goal))
    world.close()
    return paths


@torch.no_grad()
def trajectories(
    algo: Algorithm, env: str, option: dict[str, Any], episodes: int, seed: int
) -> list[tuple[np.ndarray, bool]]:
    """Paths (T, 2) of the deterministic policy, and whether each came to its goal."""
    world, out = factory(env)(), []
    for episode in range(episodes):
        obs, info = world.reset(seed=derive(seed, "trajectory", episode), options=option)
        goal = torch.as_tensor(info["goal"], dtype=torch.float32).unsqueeze(0)
        stream, memory, path, over = generator(seed, "policy"), None, [obs], False
        while not over:
            row = torch.as_tensor(obs, dtype=torch.float32).unsqueeze(0)
            now = {"obs": row, "goal": goal, "explore": False, "generator": stream}
            act, memory = algo.act(now, memory)
            obs, _, reached, late, _ = world.step(act[0].numpy())
            path.append(obs)
            over = reached or late
        out.append((np.stack(path), bool(reached)))
    world.close()
    return out


def value_map(algo: Any, core: Any, goal: Tensor) -> np.ndarray:
    """V(s, goal) on a grid of points, rows from low to high y, NaN inside of walls."""
    rows, columns = core.maze_map.shape
    at = lambda n: (np.arange(n * FINE) + 0.5) / FINE - 0.5  # noqa: E731  in cells
    i, j = np.meshgrid(at(rows), at(columns), indexing="ij")
    unit = core._maze_unit
    xy = np.stack([j * unit - core._offset_x, i * unit - core._offset_y], -1).reshape(-1, 2)
    obs = torch.as_tensor(xy, dtype=torch.float32)
    value = algo.value(obs, goal.expand_as(obs)).numpy().reshape(i.shape)
    walls = np.kron(core.maze_map, np.ones((FINE, FINE)))
    return np.where(walls == 1, np.nan, value)


def draw(path: Path, shown: dict[str, tuple[Resolved, Algorithm]], options: Options) -> None:
    """A column per method: the value of one goal above, trajectories to all goals below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(shown), figsize=(6 * len(shown), 8.5), squeeze=False, layout="constrained"
    )
    for column, (name, (resolved, algo)) in zip(axes.T, shown.items(), strict=True):
        env = resolved.settings.env
        world = factory(env)()
        core: Any = world.unwrapped
        paths = expert_paths(env, options.seed)
        expert, goal = paths[options.task - 1]
        extent = frame(core)
        seen = column[0].imshow(
            value_map(algo, core, goal), origin="lower", extent=extent, cmap="viridis"
        )
        figure.colorbar(seen, ax=column[0], shrink=0.7)
        column[0].set_facecolor("0.6")
        column[0].plot(*expert.T, color="white", lw=0.8, ls=":")
        column[0].plot(*goal.T, "r*", ms=12)
        column[0].set_title(f"{name} on {resolved.task}: V(s, goal of task {options.task})")
        walls = np.ma.masked_equal(core.maze_map, 0)
        column[1].imshow(walls, origin="lower", extent=extent, cmap="Greys", vmin=0, vmax=2)
        for color, option in zip(COLORS, tasks(world), strict=True):
            walks = trajectories(algo, env, option, options.episodes, options.seed)
            for walk, reached in walks:
                column[1].plot(*walk.T, color=color, lw=1, ls="-" if reached else ":")
                column[1].plot(*walk[0], "o", color=color, ms=4)
            won = sum(reached for _, reached in walks)
            label = f"task {option['task_id']}: {won} of {len(walks)}"
            column[1].plot([], [], color=color, label=label)
        column[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, frameon=False)
        column[1].set_title("trajectories: solid where they reach the goal")
        for ax in column:
            ax.set_xticks([])
            ax.set_yticks([])
        world.close()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def frame(core: Any) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of a maze in its coordinates."""
    (rows, columns), unit = core.maze_map.shape, core._maze_unit
    left, bottom = -core._offset_x - unit / 2, -core._offset_y - unit / 2
    return left, left + columns * unit, bottom, bottom + rows * unit
