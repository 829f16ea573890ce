"""OGBench's goal-conditioned tasks (extra `ogbench`): names, sizes, and their random draws.

Park, Frans, Eysenbach and Levine, "OGBench: Benchmarking Offline Goal-Conditioned RL", ICLR 2025,
arXiv:2410.20092. Every environment has five tasks, chosen by `reset(options={"task_id": 1})` to 5;
the reset's info holds the `goal`, an observation; a step pays 1 and ends the episode at the goal.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np

VERSION = "v0"
MAZES: dict[str, tuple[str, ...]] = {
    "pointmaze": ("medium", "large", "giant", "teleport"),
    "antmaze": ("medium", "large", "giant", "teleport"),
    "humanoidmaze": ("medium", "large", "giant"),
    "antsoccer": ("arena", "medium"),
}
MANIPULATION: dict[str, tuple[str, ...]] = {
    "cube": ("single", "double", "triple", "quadruple", "octuple"),
    "scene": (),
    "puzzle": ("3x3", "4x4", "4x5", "4x6"),
}
STATE_NAMES = tuple(
    f"{family}-{size}".removesuffix("-")
    for family, sizes in (MAZES | MANIPULATION).items()
    for size in sizes or ("",)
)
NAMES = STATE_NAMES + tuple(
    f"visual-{name}" for name in STATE_NAMES if not name.startswith(("pointmaze", "antsoccer"))
)


def known(name: str) -> bool:
    """Whether `name` is one of OGBench's environments, such as `pointmaze-giant`."""
    return name in NAMES


def default_dataset(name: str) -> str:
    """`play` for the manipulation tasks, `navigate` for the mazes."""
    return "play" if family(name) in MANIPULATION else "navigate"


def family(name: str) -> str:
    """`cube` of `visual-cube-single`."""
    return name.removeprefix("visual-").partition("-")[0]


def register() -> None:
    """Make OGBench's environments known to Gymnasium.

    Raises:
        ValueError: without the extra.
    """
    try:
        import ogbench  # noqa: F401
    except ImportError as error:
        extra = "pip install 'offrl[ogbench]'"
        raise ValueError(f"OGBench's environments need the extra: {extra}") from error
    # of a viewer that the manipulation tasks import and nobody opens
    warnings.filterwarnings("ignore", message=".*DISPLAY environment variable is missing")


class OwnRandomness(gymnasium.Wrapper):
    """Draws starts, goals and teleports from the environment's own stream.

    The package takes them from NumPy's global generator, which `reset(seed=)` leaves alone.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.stream = np.random.RandomState()
        # the others draw nothing in a step, and swapping generators would cost them 50 microseconds
        self.draws_in_steps = getattr(env.unwrapped, "_teleport_info", None) is not None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        if seed is not None:
            self.stream.seed(seed)
            self.env.action_space.seed(seed)  # of the steps that settle the robot in its goal
        with self.swapped():
            return self.env.reset(seed=seed, options=options)

    def step(self, action: Any):
        with self.swapped() if self.draws_in_steps else contextlib.nullcontext():
            return self.env.step(action)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        before = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self.stream.get_state())  # noqa: NPY002
        try:
            yield
        finally:
            self.stream.set_state(np.random.get_state())  # noqa: NPY002
            np.random.set_state(before)  # noqa: NPY002
