"""A grid world whose optimal values are known, `env=grid-world`: where estimates can be judged.

Four moves on a square without walls; the corner of the last row and column pays 1 and ends the
episode, which starts anywhere else. A step against the border stays. The grid world of BEER's paper
(arXiv:2404.12754) is not described in what is public: size and rewards are our choice.
"""

from typing import Any

import gymnasium
import numpy as np

from offrl.envs.vector import generator_state, set_generator_state

NAME, ID = "grid-world", "offrl/GridWorld-v0"
MOVES = ((0, 1), (0, -1), (1, 0), (-1, 0))
HORIZON = 100


class GridWorld(gymnasium.Env):
    """The observation is the place (row, column), each in [-1, 1]."""

    def __init__(self, size: int = 8, render_mode: str | None = None):
        self.size = size
        self.observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(MOVES))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.place = np.array(divmod(int(self.np_random.integers(self.size**2 - 1)), self.size))
        return self.seen(self.place), {}

    def step(self, action: int):
        self.place = self.moved(self.place, action)
        over = bool((self.place == self.size - 1).all())
        return self.seen(self.place), float(over), over, False, {}

    def seen(self, place: np.ndarray) -> np.ndarray:
        return (2 * place / (self.size - 1) - 1).astype(np.float32)

    def moved(self, place: np.ndarray, action: int) -> np.ndarray:
        return np.clip(place + MOVES[action], 0, self.size - 1)

    def optimal(self, discount: float) -> tuple[np.ndarray, np.ndarray]:
        """Observations (n, 2) of all places but the goal, and their optimal values (n, 4)."""
        places = [np.array(divmod(i, self.size)) for i in range(self.size**2 - 1)]
        ahead = np.array([[self.moved(p, a) for a in range(len(MOVES))] for p in places])
        distance = (2 * (self.size - 1) - ahead.sum(-1)).astype(np.float64)
        return np.stack([self.seen(p) for p in places]), discount**distance

    def snapshot(self) -> dict[str, Any]:
        return {"place": self.place.tolist(), "generator": generator_state(self.np_random)}

    def restore(self, state: dict[str, Any]) -> None:
        self.place = np.array(state["place"])
        set_generator_state(self.np_random, state["generator"])


gymnasium.register(ID, "offrl.envs.grid:GridWorld", max_episode_steps=HORIZON)
