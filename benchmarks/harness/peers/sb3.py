"""The `train` method of Stable-Baselines3's TD3 and SAC, on a replay that is already filled.

Both have its defaults for everything that the library's own files do not fix: two hidden layers
of 256 units, batch as given, one gradient step per update. Needs the extra `peers`.
"""

from collections.abc import Callable

import gymnasium
import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.logger import Logger


class Shapes(gymnasium.Env):
    """Spaces without a process: the replay is filled from data."""

    def __init__(self, obs_dim: int, act_dim: int):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (act_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        return np.zeros(self.observation_space.shape, np.float32), {}


def filled(
    algo: str, fields: dict[str, np.ndarray], batch: int, device: torch.device
) -> Callable[[int], None]:
    """`run` over raw transitions: obs, act, reward, next_obs, terminal, (N, ...) each.

    Args:
        algo: "TD3" or "SAC".
    """
    size, obs_dim = fields["obs"].shape
    model = getattr(stable_baselines3, algo)(
        "MlpPolicy",
        Shapes(obs_dim, fields["act"].shape[-1]),
        learning_rate=3e-4,
        buffer_size=size,
        batch_size=batch,
        policy_kwargs={"net_arch": [256, 256]},
        device=device,
        seed=0,
    )
    model.set_logger(Logger(folder=None, output_formats=[]))
    replay = model.replay_buffer
    places = {
        "obs": replay.observations,
        "act": replay.actions,
        "reward": replay.rewards,
        "next_obs": replay.next_observations,
        "terminal": replay.dones,
    }
    for name, array in places.items():
        array[:, 0] = fields[name]
    replay.full, replay.pos = True, 0
    return lambda updates: model.train(updates, batch)
