"""Observations as one row of numbers, the same from environments and in data.

Boxes and MultiBinary are flattened, Discrete and MultiDiscrete become one-hot, as Gymnasium does
it. The parts of a Tuple lie side by side; those of a Dict by sorted keys, but for goal tasks:
observation, achieved_goal, desired_goal, and in AntMaze achieved_goal, observation, desired_goal,
so that its first 29 numbers are laid out as D4RL's.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from offrl.errors import ConfigError

GOAL = ("observation", "achieved_goal", "desired_goal")
LEAVES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def ordered(space: Any, name: str = "") -> spaces.Space:
    """The space with the keys of its dictionaries in order.

    Args:
        name: of the environment or the data set.

    Raises:
        ConfigError: for a part that is no row of numbers, such as Text, Graph or Sequence.
    """
    if isinstance(space, spaces.Dict):
        keys = sorted(space.spaces, key=str)
        if set(keys) == set(GOAL):
            first = 1 if "antmaze" in name.lower() else 0
            keys = [GOAL[first], GOAL[1 - first], GOAL[2]]
        return spaces.Dict(OrderedDict((key, ordered(space[key], name)) for key in keys))
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([ordered(part, name) for part in space.spaces])
    if isinstance(space, LEAVES):
        return space
    raise ConfigError(
        f"{name} has observations of {space}; known are Box, Discrete, MultiDiscrete, MultiBinary, "
        "and Tuple and Dict of these"
    )


class FlatObservation(gymnasium.ObservationWrapper):
    """One row of numbers instead of anything but a Box; a goal in the info likewise."""

    def __init__(self, env: gymnasium.Env, name: str = ""):
        super().__init__(env)
        self.space = ordered(env.observation_space, name)
        self.observation_space = spaces.flatten_space(self.space)  # type: ignore[assignment]

    def observation(self, observation: Any) -> Any:
        return spaces.flatten(self.space, observation)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        obs, info = super().reset(seed=seed, options=options)
        if "goal" in info:
            info = info | {"goal": self.observation(info["goal"])}
        return obs, info


def layout(space: spaces.Space, path: str = "") -> Iterator[tuple[str, int]]:
    """Path of every part of an ordered space, such as "desired_goal", and its width."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        named: Any = space.spaces
        for key, part in named.items() if isinstance(named, dict) else enumerate(named):
            yield from layout(part, f"{path}/{key}" if path else str(key))
    else:
        yield path, spaces.flatdim(space)


def rows(space: spaces.Space, values: Any) -> np.ndarray:
    """What `spaces.flatten` makes of each of T observations that lie side by side, float32 (T, o).

    Args:
        values: of an ordered space; dictionaries and tuples of arrays with T rows. What a key with
            "/" names may lie in a dictionary within, as it does in HDF5 files.
    """
    if isinstance(space, spaces.Dict):
        parts = [rows(part, entry(values, key)) for key, part in space.spaces.items()]
        return np.concatenate(parts, -1)
    if isinstance(space, spaces.Tuple):
        return np.concatenate([rows(*pair) for pair in zip(space.spaces, values, strict=True)], -1)
    array = np.asarray(values)
    if isinstance(space, spaces.Discrete):
        return one_hot(array.reshape(-1) - space.start, int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        flat = (array - space.start).reshape(len(array), -1)
        return np.concatenate(
            [one_hot(*pair) for pair in zip(flat.T, space.nvec.ravel(), strict=True)], -1
        )
    return array.reshape(len(array), -1).astype(np.float32)


def entry(values: Any, key: Any) -> Any:
    if key in values or not isinstance(key, str):
        return values[key]
    first, _, rest = key.partition("/")
    return entry(values[first], rest) if rest else values[first]


def nested(space: Any) -> Any:
    """The space as HDF5 keeps it: "a/b" is the entry b of the dictionary a."""
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([nested(part) for part in space.spaces])
    if not isinstance(space, spaces.Dict):
        return space
    groups: dict[str, Any] = {}
    for key, part in space.spaces.items():
        *path, last = key.split("/")
        group = groups
        for name in path:
            group = group.setdefault(name, {})
        group[last] = nested(part)
    return dictionary(groups)


def dictionary(groups: dict[str, Any]) -> spaces.Dict:
    inner = {k: dictionary(v) if isinstance(v, dict) else v for k, v in groups.items()}
    return spaces.Dict(inner)


def one_hot(values: np.ndarray, count: int) -> np.ndarray:
    """Raises IndexError for a value outside of [0, count)."""
    if ((values < 0) | (values >= count)).any():
        raise IndexError(f"an observation lies outside of its {count} values")
    return np.eye(count, dtype=np.float32)[values.astype(np.int64)]
