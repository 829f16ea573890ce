"""Random draws of environments that take them from a generator of the whole process."""

import contextlib
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np


class OwnRandomness(gymnasium.Wrapper):
    """Draws OGBench's starts, goals and teleports from the environment's own stream.

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
