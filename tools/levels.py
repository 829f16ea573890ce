"""Which of two levels fails in a pointmaze: the one that names subgoals or the one that walks.

The low policy is led along the maze's shortest path instead of by the high policy, by points as far
ahead as the data come in the steps of a subgoal: what it wins then, a better high policy could win.
And the high policy's subgoals along an expert's path are read as points of the maze, the ones whose
phi is nearest among those that twice a subgoal's steps come to, which lie nearer to the goal than
the state or do not.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offrl.config import Resolved
from offrl.engine.method import Algorithm, Now, Policy
from offrl.nets.goal import normalized
from offrl.runs.task import make_env, make_evaluator

SPEED = 0.16  # of the data along their paths, per step: 0.2 E[min(1 + N(0, 0.5^2), 1)]
SIDE = 3  # points along the side of a cell that a subgoal is read as


class Routes:
    """Shortest ways of a pointmaze, from cell to cell."""

    def __init__(self, core: Any):
        self.core = core
        self.next = functools.cache(self.next_cell)

    def next_cell(self, cell: tuple[int, int], goal: tuple[int, int]) -> tuple[int, int]:
        at = self.core.ij_to_xy
        return self.core.xy_to_ij(self.core.get_oracle_subgoal(at(cell), at(goal))[0])

    def way(self, xy: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Corners (n, 2) from a point to the goal: both, and the centers of the cells between.

        A straight line where the goal cannot be reached.
        """
        cell, end = self.core.xy_to_ij(xy), self.core.xy_to_ij(goal)
        corners = [xy]
        while cell != end:
            before, cell = cell, self.next(cell, end)
            if cell in (before, end):
                break
            corners.append(self.core.ij_to_xy(cell))
        return np.array([*corners, goal], float)

    def distance(self, xy: np.ndarray, goal: np.ndarray) -> float:
        """Length of the way."""
        return float(np.linalg.norm(np.diff(self.way(xy, goal), axis=0), axis=-1).sum())

    def ahead(self, xy: np.ndarray, goal: np.ndarray, reach: float) -> np.ndarray:
        """The point (2,) of the way that is so far along, at most the goal."""
        way = self.way(xy, goal)
        for start, end in pairwise(way):
            length = np.linalg.norm(end - start)
            if reach < length:
                return start + (end - start) * reach / length
            reach -= float(length)
        return way[-1]

    def points(self) -> np.ndarray:
        """SIDE x SIDE points (n, 2) in each free cell."""
        inside = self.core._maze_unit * ((np.arange(SIDE) + 0.5) / SIDE - 0.5)
        square = np.stack(np.meshgrid(inside, inside), -1).reshape(-1, 2)
        cells = np.argwhere(self.core.maze_map == 0)
        return np.concatenate([np.array(self.core.ij_to_xy(cell)) + square for cell in cells])


class Led:
    """The low policy of a hierarchy, led along the shortest path: a policy to be evaluated."""

    def __init__(self, algo: Any, routes: Routes, reach: float):
        self.algo, self.routes, self.reach = algo, routes, reach

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        pairs = zip(now["obs"].numpy(), now["goal"].numpy(), strict=True)
        points = [self.routes.ahead(xy, goal, self.reach) for xy, goal in pairs]
        waypoint = self.algo.goal(torch.tensor(np.stack(points), dtype=torch.float32))
        z = self.algo.rep(now["obs"], waypoint)
        return self.algo.low.act(now["obs"], z, now["explore"], now["generator"]), memory


@torch.no_grad()
def gains(algo: Any, routes: Routes, states: Tensor, goal: Tensor, reach: float) -> np.ndarray:
    """How much nearer to the goal, along the maze, the subgoals lie than the states (T,).

    Args:
        states: (T, 2).
        goal: (1, 2).
        reach: how far away along the maze a subgoal may lie.
    """
    points, end = routes.points(), goal[0].numpy()
    left = np.array([routes.distance(point, end) for point in points])
    candidates = algo.goal(torch.tensor(points, dtype=torch.float32))
    found = []
    for state in states:
        named = normalized(algo.high(state[None], algo.goal(goal)))
        at = state.numpy()
        near = np.linalg.norm(points - at, axis=-1) <= reach  # no way is shorter
        near[near] = [routes.distance(at, point) <= reach for point in points[near]]
        reps = algo.rep(state.expand(int(near.sum()), 2), candidates[near])
        best = int((reps @ named[0]).argmax())
        found.append(routes.distance(at, end) - left[near][best])
    return np.array(found)


def examine(
    algo: Algorithm,
    resolved: Resolved,
    paths: Sequence[tuple[Tensor, Tensor]],
    steps: int,
    episodes: int,
    seed: int,
) -> dict[str, Any]:
    """Per task: success by itself and led, share of subgoals that lie nearer, and their mean gain.

    Args:
        paths: an expert's states (T, 2) and goal (1, 2) of every task.
        steps: of a subgoal.
        episodes: per task.
    """
    world = make_env(resolved)()
    routes = Routes(world.unwrapped)
    player = make_evaluator(resolved, (), (episodes,), seed)
    reach = steps * SPEED
    found: dict[str, Any] = {"reach": reach, "episodes": episodes}
    policies: dict[str, Policy] = {"success": algo, "led": Led(algo, routes, reach)}
    for name, policy in policies.items():
        played = player(policy, episodes)
        found[name] = [float(played[key].mean()) for key in played if key.startswith("return/")]
    named = [gains(algo, routes, path[::steps], goal, 2 * reach) for path, goal in paths]
    found["nearer"] = [float((gain > 0).mean()) for gain in named]
    found["gain"] = [float(gain.mean()) for gain in named]
    player.close()
    world.close()
    return found
