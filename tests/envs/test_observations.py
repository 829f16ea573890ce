"""Observations of every kind as one row, from an environment and from data alike."""

import warnings
from collections import OrderedDict

import gymnasium
import minari as package
import numpy as np
import pytest
import torch
from gymnasium.spaces import (
    Box,
    Dict,
    Discrete,
    MultiBinary,
    MultiDiscrete,
    Sequence,
    Text,
    Tuple,
    flatdim,
    flatten,
)
from minari.data_collector import EpisodeBuffer

from offrl.data.sources import minari
from offrl.engine.evaluate import Evaluator
from offrl.envs import make, observations
from offrl.envs.observations import FlatObservation, layout, ordered, rows
from offrl.envs.vector import Vector
from offrl.errors import ConfigError, DataError
from tests.envs.spaces import Any

UNIT = Box(-1, 1, (2,), np.float32)


def seen(space, value, name=""):
    """What the library sees of an observation."""
    env = Any(space, UNIT)
    env.reset = lambda *, seed=None, options=None: (value, {"goal": value})
    env = FlatObservation(env, name)
    obs, info = env.reset()
    np.testing.assert_array_equal(info["goal"], obs)
    assert env.observation_space.shape == obs.shape
    return obs.tolist()


@pytest.mark.parametrize(
    ("space", "value", "row"),
    [
        (Discrete(4), 2, [0, 0, 1, 0]),
        (Discrete(3, start=-1), -1, [1, 0, 0]),
        (MultiDiscrete([2, 3]), [1, 0], [0, 1, 1, 0, 0]),
        (MultiDiscrete([2, 2], start=[5, 7]), [6, 7], [0, 1, 1, 0]),
        (MultiBinary(3), [1, 0, 1], [1, 0, 1]),
        (Tuple([Box(0, 9, (1, 2)), Discrete(2)]), ([[3.0, 4.0]], 1), [3, 4, 0, 1]),
        (Dict(b=Box(0, 9, (1,)), a=Discrete(2)), {"b": [7.0], "a": 0}, [1, 0, 7]),
        (Dict(OrderedDict(b=MultiBinary(1), a=Discrete(2))), {"b": [1], "a": 0}, [1, 0, 1]),
        (Dict({"a/b": MultiBinary(1), "a-b": Discrete(2)}), {"a/b": [1], "a-b": 1}, [0, 1, 1]),
        (Tuple([Dict(x=Discrete(2)), Discrete(2)]), ({"x": 1}, 0), [0, 1, 1, 0]),
    ],
    ids=str,
)
def test_the_order_is_as_documented(space, value, row):
    as_arrays = lambda v: np.array(v) if isinstance(v, list) else v  # noqa: E731
    if isinstance(value, dict):
        value = {key: as_arrays(v) for key, v in value.items()}
    elif isinstance(value, tuple):
        value = tuple(map(as_arrays, value))
    assert seen(space, as_arrays(value)) == row


def test_goal_tasks_have_the_order_of_their_data():
    space = Dict({name: Box(0, 99, (1,)) for name in observations.GOAL})
    value = {name: np.array([i]) for i, name in enumerate(observations.GOAL)}
    assert seen(space, value, "PointMaze_UMaze-v3") == [0, 1, 2]
    assert seen(space, value, "AntMaze_Large-v4") == [1, 0, 2]


NESTED = Dict(
    {
        "a/b": MultiDiscrete([3, 2]),
        "place": Box(-9, 9, (2, 2), np.float64),
        "flags": MultiBinary((2, 2)),
        "turn": Discrete(3, start=4),
        "inner": Dict(z=Box(0, 255, (2,), np.uint8), a=Tuple([Discrete(2), UNIT])),
    }
)


def batch(space, samples):
    """Samples side by side, as Minari has them."""
    if isinstance(space, Dict):
        return {k: batch(part, [s[k] for s in samples]) for k, part in space.spaces.items()}
    if isinstance(space, Tuple):
        pairs = zip(space.spaces, zip(*samples, strict=True), strict=True)
        return tuple(batch(*pair) for pair in pairs)
    return np.stack(samples)


KINDS = [NESTED, Discrete(5), MultiDiscrete([2, 4]), MultiBinary(3), Tuple([UNIT, Discrete(3)])]


@pytest.mark.parametrize("space", KINDS, ids=lambda space: type(space).__name__)
def test_many_rows_are_what_gymnasium_makes_of_each_and_what_minari_data_hold(
    space, tmp_path, monkeypatch
):
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    space.seed(0)
    samples, order = [space.sample() for _ in range(6)], ordered(space)
    expected = np.stack([flatten(order, sample) for sample in samples]).astype(np.float32)
    assert expected.shape[1] == flatdim(space) == sum(dict(layout(order)).values())
    np.testing.assert_array_equal(rows(order, batch(space, samples)), expected)
    shown = np.float32([seen(space, sample) for sample in samples])
    np.testing.assert_array_equal(shown, expected)
    ends = np.arange(5) == 4
    buffer = EpisodeBuffer(
        observations=batch(space, samples),
        actions=np.zeros((5, 2), np.float32),
        rewards=np.arange(5.0),
        terminations=ends,
        truncations=~ends & False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package.create_dataset_from_buffers(
            "toy/kinds-v0", [buffer], observation_space=space, action_space=UNIT
        )
    data = minari.load("toy/kinds-v0")
    np.testing.assert_array_equal(data["obs"], expected[:-1])
    np.testing.assert_array_equal(data["next_obs"], expected[1:])


def test_a_value_outside_of_a_discrete_observation_is_an_error_in_data_too():
    for value in (-1, 3):
        with pytest.raises(IndexError, match="outside of its 3 values"):
            rows(Discrete(3), np.array([0, value]))


@pytest.mark.parametrize("space", [Text(5), Sequence(UNIT), Dict(word=Text(5), x=UNIT)], ids=str)
def test_what_is_no_row_of_numbers_is_refused_by_name(space):
    with pytest.raises(ConfigError, match=r"toy has observations of (Text|Sequence)"):
        ordered(space, "toy")
    with pytest.raises(DataError, match=r"toy has observations of (Text|Sequence)"):
        minari.observations(space, "toy")


class Still:
    def act(self, now, memory=None):
        return torch.zeros(now["obs"].shape[:-1], dtype=torch.int64), memory


@pytest.mark.parametrize("name", ["Blackjack-v1", "FrozenLake-v1", "Taxi-v4"])
def test_gymnasiums_toy_texts_are_played(name):
    env = make.factory(name)()
    width = flatdim(gymnasium.make(name).observation_space)
    envs = Vector([lambda: env], [0])
    assert (envs.obs_dim, envs.reset().shape) == (width, (1, width))
    assert envs.reset().sum() == (3 if name == "Blackjack-v1" else 1)
    assert Evaluator(make.factory(name), width=1)(Still(), 1)["length"] > 0
