"""dm-control's suite (extra `dmc`) as Gymnasium environments `dmc-<domain>-<task>`.

Tassa et al., "dm_control: Software and tasks for continuous control", 2020, arXiv:2006.12983. The
observation is the task's own, flattened in its own order; rewards lie in [0, 1]; an episode has a
thousand steps, after which it is cut off, not ended.

An adapter of our own: the maintained one (shimmy) sorts the parts of an observation by name, lets
the suite count the time, which an action repeat or a resumed run cannot set, and has no exact
snapshot.
"""

import difflib
import warnings
from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np
import torch

from offrl.envs.vector import physics, set_physics

PREFIX = "dmc-"
HORIZON = 1000  # of every task of the suite but lqr, which has none of its own
UNLIMITED = 1e10  # the bound of a motor without one (lqr); counts as 1
# what tasks draw for their model, once (lqr) or at a reset: places and sizes of targets, tendons,
# terrain, springs
PLACES = ("body_pos", "body_quat", "geom_pos", "geom_quat", "site_pos", "light_pos")
SIZES = ("geom_size", "geom_rgba", "site_size", "wrap_prm", "hfield_data", "jnt_stiffness")


def suite() -> Any:
    """The suite's module; raises ValueError without the extra."""
    # of a viewer that nobody opens
    warnings.filterwarnings("ignore", message=".*DISPLAY environment variable is missing")
    try:
        from dm_control import suite
    except ImportError as error:
        raise ValueError("dm-control's tasks need the extra: pip install 'offrl[dmc]'") from error
    return suite


def register(name: str) -> str:
    """Make a task such as `dmc-ball_in_cup-catch` known to Gymnasium; returns its id.

    Raises ValueError for an unknown task, naming the nearest, and without the extra.
    """
    tasks = {f"{PREFIX}{domain}-{task}": (domain, task) for domain, task in suite().ALL_TASKS}
    if name not in tasks:
        known = ", ".join(tasks)
        raise ValueError(f"dm-control has no task {name!r}{nearest(name, tasks)} ({known})")
    id, (domain, task) = f"{name}-v0", tasks[name]
    if id not in gymnasium.registry:
        how: Any = {"max_episode_steps": HORIZON, "kwargs": {"domain": domain, "task": task}}
        gymnasium.register(id, "offrl.envs.dm_control:DMControl", **how)
    return id


def nearest(name: str, known: Iterable[str]) -> str:
    """What a misspelled name may have meant, as a part of a message."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


class DMControl(gymnasium.Env):
    """One task of the suite, without a time limit of its own."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, domain: str, task: str, render_mode: str | None = None):
        self.render_mode = render_mode
        self.env = suite().load(domain, task, {"time_limit": float("inf")})
        spec = self.env.action_spec()
        low, high = spec.minimum.astype(np.float32), spec.maximum.astype(np.float32)
        low, high = np.where(low <= -UNLIMITED, -1, low), np.where(high >= UNLIMITED, 1, high)
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        width = sum(int(np.prod(s.shape)) for s in self.env.observation_spec().values())
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.task.random.seed(seed)
        return row(self.env.reset()), {}

    def step(self, action: np.ndarray):
        now = self.env.step(action)
        # without a time limit the last step is one that a task ended itself
        return row(now), float(now.reward), now.last(), False, {}

    def render(self) -> Any:
        return self.env.physics.render(480, 480, camera_id=0)

    def snapshot(self) -> dict[str, Any]:
        """Simulator, model and random stream: what decides the future. For `restore`."""
        model, data = self.env.physics.model, self.env.physics.data
        _, keys, *draws = self.env.task.random.get_state()
        return {
            "physics": physics(model.ptr, data.ptr),
            "model": {name: torch.tensor(getattr(model, name)) for name in PLACES + SIZES},
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "draws": draws,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `snapshot`; the environment must have been reset before."""
        import mujoco

        model, data = self.env.physics.model, self.env.physics.data
        for name, value in state["model"].items():
            getattr(model, name)[:] = value.numpy()
        set_physics(model.ptr, data.ptr, state["physics"])
        mujoco.mj_step1(model.ptr, data.ptr)  # what a control step ends with
        self.env.task.random.set_state(("MT19937", state["keys"].numpy(), *state["draws"]))


def row(step: Any) -> np.ndarray:
    """The parts of an observation side by side."""
    parts = [np.ravel(part) for part in step.observation.values()]
    return np.concatenate(parts).astype(np.float32)
