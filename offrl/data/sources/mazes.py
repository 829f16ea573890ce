"""Pointmaze data by OGBench's recipe: a noisy walk along the maze's own shortest paths.

    action     clip(unit vector to the next cell's centre + N(0, 0.5^2) per coordinate, -1, 1)
    start      the noisy centre of a free cell, all cells alike
    navigate   goals in the cells that are not corridors, a new one whenever one is reached
    stitch     one goal, four cells away from the start's cell
    episodes   of T + 1 rows, never ended by a goal; a tenth more of them for validation

The shortest path is the oracle of the ogbench package (see `offrl.envs.ogbench` for the citation);
recipe and sizes are those of its released generator. Differences: episodes are played in chunks
with seeds of their own, so that any number of processes makes the same rows.
"""

import functools
from collections import deque
from typing import Any

import numpy as np

from offrl.data.dataset import Arrays
from offrl.envs import ogbench

NOISE = 0.5
KINDS = ("navigate", "stitch")


def size(maze: str, kind: str) -> tuple[int, int]:
    """Episodes of training, and the transitions of each.

    >>> size("giant", "navigate"), size("giant", "stitch")
    ((500, 2000), (5000, 200))
    """
    if kind == "stitch":
        return 5000, 200
    return (500, 2000) if maze == "giant" else (1000, 1000)


def play(maze: str, kind: str, episodes: int, length: int, seed: int) -> Arrays:
    """One chunk of walks; draws from NumPy's global generator, as the environment does.

    Of the `length` T; an episode has T + 1 rows, the last of which is a state without a successor.
    Returns observations, actions, qpos, qvel (n, 2) float32, terminals (n,) bool.
    """
    import gymnasium

    ogbench.register()
    env: Any = gymnasium.make(
        f"pointmaze-{maze}-{ogbench.VERSION}", terminate_at_goal=False, disable_env_checker=True
    ).unwrapped
    env.reset(seed=seed)
    env.action_space.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random = np.random
    cells = [(i, j) for i, j in np.argwhere(env.maze_map == 0).tolist()]
    junctions = [cell for cell in cells if not corridor(env.maze_map, cell)]
    pick = lambda among: among[random.randint(len(among))]  # noqa: E731

    @functools.cache
    def next_center(cell: tuple[int, int], goal: tuple[int, int]) -> np.ndarray:
        return env.get_oracle_subgoal(env.ij_to_xy(cell), env.ij_to_xy(goal))[0]

    names = ("observations", "actions", "qpos", "qvel")
    out = {name: np.zeros((episodes, length + 1, 2), np.float32) for name in names}
    for episode in range(episodes):
        start = pick(cells)
        goal = pick(junctions) if kind == "navigate" else pick(four_away(env.maze_map, start))
        obs, _ = env.reset(options={"task_info": {"init_ij": start, "goal_ij": goal}})
        for step in range(length + 1):
            xy = env.get_xy()
            way = next_center(env.xy_to_ij(xy), env.xy_to_ij(env.cur_goal_xy)) - xy
            noise = random.normal(0, NOISE, 2)
            action = np.clip(way / (np.linalg.norm(way) + 1e-6) + noise, -1, 1)
            next_obs, _, _, _, info = env.step(action)
            row = (obs, action, info["prev_qpos"], info["prev_qvel"])
            for name, value in zip(names, row, strict=True):
                out[name][episode, step] = value
            if kind == "navigate" and info["success"]:
                env.cur_goal_xy = env.add_noise(env.ij_to_xy(pick(junctions)))
            obs = next_obs
    env.close()
    flat = {name: value.reshape(-1, 2) for name, value in out.items()}
    return flat | {"terminals": np.arange(episodes * (length + 1)) % (length + 1) == length}


def corridor(free: np.ndarray, cell: tuple[int, int]) -> bool:
    """Whether one can only go straight through a cell of a map whose walls are 1."""
    i, j = cell
    vertical = (free[i - 1, j], free[i + 1, j])
    horizontal = (free[i, j - 1], free[i, j + 1])
    return (vertical, horizontal) in (((0, 0), (1, 1)), ((1, 1), (0, 0)))


def four_away(walls: np.ndarray, start: tuple[int, int]) -> list[tuple[int, int]]:
    """Cells whose shortest path from `start` is four cells long; the start where there is none."""
    distance, queue = {start: 0}, deque([start])
    while queue:
        i, j = queue.popleft()
        for cell in ((i - 1, j), (i, j - 1), (i + 1, j), (i, j + 1)):
            if walls[cell] == 0 and cell not in distance:
                distance[cell] = distance[i, j] + 1
                queue.append(cell)
    return [cell for cell, far in distance.items() if far == 4] or [start]
