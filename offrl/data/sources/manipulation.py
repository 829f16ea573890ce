"""Manipulation data by OGBench's recipe: the package's own oracles at work on cubes and buttons.

    play       a plan of keyframes with smoothed noise in it, followed open loop
    noisy      a closed-loop controller; every episode draws a noise level xi ~ U(0, 0.1) and adds
               N(0, (xi, xi, xi, 3 xi, 10 xi)^2), and some actions are uniform
    targets    drawn by the environment, a new one whenever the oracle is done; cubes are stacked
               with a probability that depends on how many there are
    episodes   of T + 1 rows; of a scene whose cube left the camera's view, drawn again

Recipe and sizes are those of the released generator (see `offrl.envs.ogbench` for the citation),
read in a copy of it. Differences: episodes are played in chunks with seeds of their own, so that
any number of processes makes the same rows, and random actions come from NumPy's generator.
"""

import importlib
from typing import Any

import numpy as np

from offrl.data.dataset import Arrays
from offrl.envs import ogbench

KINDS = ("play", "noisy")
NOISE = 0.1
NOISE_SHAPE = np.array([1, 1, 1, 3, 10])  # of an action: position, yaw, gripper
# bounds of an episode's probability to stack a cube, by the number of cubes
STACKING = {"single": (0, 0), "double": (0, 0.25), "triple": (0.05, 0.35), "quadruple": (0.1, 0.5)}
EPISODES = {"cube-triple": 3000, "cube-quadruple": 5000, "puzzle-4x5": 3000, "puzzle-4x6": 5000}


def size(env: str, kind: str) -> tuple[int, int]:
    """Episodes of training, and the transitions of each.

    >>> size("cube-triple", "play"), size("scene", "noisy")
    ((3000, 1000), (1000, 1000))
    """
    return EPISODES.get(env.removeprefix("visual-"), 1000), 1000


def play(name: str, kind: str, episodes: int, length: int, seed: int) -> Arrays:
    """One chunk of episodes; draws from NumPy's global generator, as the oracles do.

    Of the `length` T; an episode has T + 1 rows, the last of which is a state without a successor.
    Returns observations (n, o) float32 or images (n, 64, 64, 3) uint8, actions (n, 5), qpos, qvel
    float32, terminals (n,) bool, and button_states (n, b) int64 where there are buttons.
    """
    import gymnasium

    ogbench.register()
    how: Any = {"terminate_at_goal": False, "mode": "data_collection", "disable_env_checker": True}
    env: Any = gymnasium.make(f"{name}-{ogbench.VERSION}", **how).unwrapped
    env.reset(seed=seed)
    np.random.seed(seed)  # noqa: NPY002
    name = name.removeprefix("visual-")
    agents = oracles(env, name, kind)
    rows: list[dict[str, Any]] = []
    while len(rows) < episodes * (length + 1):
        found = episode(env, agents, name, kind, length)
        if name != "scene" or in_view(np.stack([row["qpos"] for row in found])):
            rows += found
    env.close()
    out = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    for key, value in out.items():
        if value.dtype != np.uint8:  # of images
            out[key] = value.astype(np.int64 if key == "button_states" else np.float32)
    terminals = np.arange(len(rows)) % (length + 1) == length
    return out | {"terminals": terminals}


def oracles(env: Any, name: str, kind: str) -> dict[str, Any]:
    """The package's oracles by what they handle."""
    way, options = "markov", {}
    if kind == "play":
        way, options = "plan", {"noise": NOISE, "noise_smoothing": 0.5}
    every = {}
    for thing in ("cube", "button", "drawer", "window"):
        module = importlib.import_module(f"ogbench.manipspace.oracles.{way}.{thing}_{way}")
        oracle = getattr(module, f"{thing.title()}{way.title()}Oracle")
        closed = thing == "button" and name.startswith("puzzle")
        more = {"gripper_always_closed": True} if closed else {}
        every[thing] = oracle(env=env, **options, **more)
    return every


def episode(
    env: Any, agents: dict[str, Any], name: str, kind: str, length: int
) -> list[dict[str, Any]]:
    """The rows of one episode."""
    random = np.random
    obs, info = env.reset()
    family, _, count = name.partition("-")
    stacking = random.uniform(*STACKING.get(count, (0.5, 0.5)))
    level = random.uniform(0, NOISE)
    at_random = 0.0 if kind == "play" else 0.2 if family == "puzzle" else 0.1
    agent, rows = agents[info["privileged/target_task"]], []
    agent.reset(obs, info)
    for _ in range(length + 1):
        if random.rand() < at_random:
            action = random.uniform(-1, 1, 5)
        else:
            action = np.array(agent.select_action(obs, info))
            if kind == "noisy":
                action = action + random.normal(0, level * NOISE_SHAPE)
        action = np.clip(action, -1, 1)
        next_obs, _, _, _, info = env.step(action)
        if agent.done:
            target = env.set_new_target(p_stack=stacking)
            agent = agents[target[1]["privileged/target_task"]]
            agent.reset(*target)
        row = {"observations": obs, "actions": action}
        for key in ("qpos", "qvel", "button_states"):
            if f"prev_{key}" in info:
                row[key] = info[f"prev_{key}"]
        rows.append(row)
        obs = next_obs
    return rows


def in_view(qpos: np.ndarray) -> bool:
    """Whether a scene's cube stayed in the camera's view, or in the drawer, for all rows."""
    y, z = qpos[:, 15], qpos[:, 16]
    hidden = (y <= -0.3) & ((z < 0.06) | (z > 0.08))
    return not (hidden | (y >= 0.29)).any()
