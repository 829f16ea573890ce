"""OGBench's tasks: by name, with random draws of their own, scored task by task."""

import sys

import numpy as np
import pytest
import torch

from offrl import config
from offrl.engine.evaluate import Evaluator, scenarios_of
from offrl.envs import ogbench
from offrl.envs.make import env_id, factory, tasks


def test_names_are_those_of_the_benchmark():
    assert ogbench.known("pointmaze-giant")
    assert ogbench.known("visual-cube-triple")
    assert ogbench.known("scene")
    assert not ogbench.known("pointmaze")
    assert not ogbench.known("visual-pointmaze-giant")
    assert not ogbench.known("halfcheetah")


@pytest.mark.parametrize(
    ("env", "dataset"),
    [("pointmaze-giant", "navigate"), ("cube-double", "play"), ("visual-scene", "play")],
)
def test_each_family_has_its_default_data_set(env, dataset):
    resolved = config.resolve("bc", {"env": env})
    assert resolved.settings.dataset == dataset
    assert resolved.origins["dataset"] == f"env {env}"
    assert config.resolve("bc", {"env": env, "dataset": "stitch"}).settings.dataset == "stitch"


def test_the_default_of_the_robots_stays():
    assert config.resolve("bc", {"env": "hopper"}).settings.dataset == "medium"


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(ValueError, match=r"pip install 'offrl\[ogbench\]'"):
        env_id("pointmaze-giant")


def test_a_misspelled_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'pointmaze-giant'"):
        env_id("pointmaze-gaint")


@pytest.fixture
def giant():
    pytest.importorskip("ogbench")
    env = factory("pointmaze-giant")()
    yield env
    env.close()


def test_every_environment_has_five_tasks(giant):
    assert env_id("pointmaze-giant") == "pointmaze-giant-v0"
    assert tasks(giant) == tuple({"task_id": i} for i in range(1, 6))


def begin(env, seed, task):
    obs, info = env.reset(seed=seed, options={"task_id": task})
    return np.concatenate([obs, info["goal"]])


def test_a_seed_decides_start_and_goal_whatever_numpys_global_generator_does(giant):
    np.random.seed(1)  # noqa: NPY002
    first = begin(giant, 7, 1)
    again = giant.reset(options={"task_id": 1})[0]
    np.random.seed(2)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    np.testing.assert_array_equal(begin(giant, 7, 1), first)
    np.testing.assert_array_equal(giant.reset(options={"task_id": 1})[0], again)
    assert not np.array_equal(begin(giant, 8, 1), first)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_a_task_decides_the_cells_of_start_and_goal(giant):
    # large noise of one unit around the cells of the protocol: x = 4 column - 4, y = 4 row - 4
    for task, (start, goal) in {1: ((1, 1), (10, 14)), 5: ((5, 9), (3, 8))}.items():
        cells = [4 * start[1] - 4, 4 * start[0] - 4, 4 * goal[1] - 4, 4 * goal[0] - 4]
        for seed in range(3):
            assert np.abs(begin(giant, seed, task) - cells).max() <= 1


def test_teleports_follow_the_seed():
    pytest.importorskip("ogbench")
    env = factory("pointmaze-teleport")()
    ends = []
    for _ in range(2):
        landed = []
        for seed in range(12):
            env.reset(seed=seed, options={"task_id": 3})
            env.unwrapped.set_xy(np.array([20.0, 11.0]))  # just beside the entry of cell (4, 6)
            env.step(np.array([0.0, 1.0], np.float32))
            landed.append(tuple(np.round(env.unwrapped.get_xy())))
        ends.append(landed)
    assert ends[0] == ends[1]
    assert len(set(ends[0])) == 3  # the three exits
    env.close()


class Beeline:
    """Walks straight towards the goal; keeps what it was told."""

    def __init__(self):
        self.goals = []

    def act(self, now, memory=None):
        self.goals.append(now["goal"])
        way = now["goal"] - now["obs"]
        return way / way.norm(dim=-1, keepdim=True), memory


@pytest.mark.usefixtures("giant")
def test_tasks_are_played_apart_and_their_episodes_are_the_headline():
    policy = Beeline()
    make = factory("pointmaze-giant")
    player = Evaluator(make, width=2, scenarios=scenarios_of((), make)[3:])
    for env in player.envs.envs:
        env.unwrapped._goal_tol = 60.0  # wide enough for the first step
    found = player(policy, 2)
    assert found["return"].shape == (4,)
    assert set(found["return"].tolist()) == {1.0}
    assert [key for key in found if "return/" in key] == ["return/task-4", "return/task-5"]
    assert found["return/task-5"].shape == (2,)
    assert policy.goals[0].shape == (4, 2)
    np.testing.assert_allclose(policy.goals[0][:2], [[44, 16]] * 2, atol=1)
    np.testing.assert_allclose(policy.goals[0][2:], [[28, 8]] * 2, atol=1)
    player.close()


@pytest.mark.usefixtures("giant")
def test_goals_change_where_an_episode_begins_anew():
    policy = Beeline()
    make = factory("pointmaze-giant")
    player = Evaluator(make, width=1, scenarios=scenarios_of((), make)[:1])
    player.envs.envs[0].unwrapped._goal_tol = 1e3  # every step succeeds
    player(policy, 3)
    assert len(policy.goals) == 3
    assert len({tuple(goal[0].tolist()) for goal in policy.goals}) == 3
    player.close()


def test_success_is_shown_in_percent():
    from offrl.runs.record import scored

    resolved = config.resolve("bc", {"env": "pointmaze-giant"})
    unit, value = scored(resolved, torch.tensor([0.0, 1.0]))
    assert unit == "success"
    assert value.tolist() == [0.0, 100.0]
