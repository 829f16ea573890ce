"""Goal-conditioned training on data and an environment of one's own, from the command line."""

import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from offrl import cli


class Line(gymnasium.Env):
    """A point on a line; beside its place an observation holds a number that means nothing."""

    num_tasks = 2
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.goal = 0.0, (1.0, -1.0)[(options or {"task_id": 1})["task_id"] - 1]
        return self.seen(self.place), {"goal": self.seen(self.goal)}

    def seen(self, place):
        return np.array([place, 10 * self.np_random.normal()], np.float32)

    def step(self, action):
        self.place += 0.1 * float(np.clip(action[0], -1, 1))
        won = abs(self.place - self.goal) < 0.15
        return self.seen(self.place), float(won), won, False, {}


class Picture(Line):
    """The same point as a white bar in a picture."""

    observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)

    def seen(self, place):
        return picture(place)


def picture(place):
    frame = np.zeros((64, 64, 3), np.uint8)
    frame[:, int(np.clip(32 + 10 * place, 0, 60)) :][:, :4] = 255
    return frame


@pytest.fixture
def line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    gymnasium.register("Line-v0", Line, max_episode_steps=60)
    gymnasium.register("Picture-v0", Picture, max_episode_steps=3)
    rng = np.random.default_rng(0)
    act = rng.choice([-1.0, 1.0], (60, 201))
    place = np.concatenate([np.zeros((60, 1)), act[:, :-1].cumsum(1) / 10], 1)
    obs = np.stack([place, 10 * rng.normal(size=place.shape)], -1)
    np.savez(
        "walks.npz",
        observations=obs.reshape(-1, 2).astype(np.float32),
        actions=act.reshape(-1, 1).astype(np.float32),
        terminals=np.tile(np.arange(201) == 200, 60),
    )
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in ("Line-v0", "Picture-v0"):
        gymnasium.registry.pop(name)


def test_a_policy_trained_on_own_walks_reaches_both_ends(line):
    cli.train(
        [
            "algo=hiql",
            "env=Line-v0",
            "source=ogbench",
            "dataset=walks.npz",
            "algo.goal_columns=[0]",
            "algo.hidden=[32,32]",
            "algo.batch=128",
            "algo.lr=0.003",
            "algo.tau=0.05",
            "algo.discount=0.9",
            "algo.subgoal_steps=4",
            "steps=500",
            "eval_every=500",
            "eval_episodes=2",
            "final_episodes=5",
        ]
    )
    (path,) = Path("runs").rglob("result.json")
    result = json.loads(path.read_text())
    assert list(result["scenarios"]) == ["task-1", "task-2"]
    assert result["headline"] == "the episodes of all tasks"
    assert np.mean(result["final_returns"]) > 0.6  # a policy without goals reaches one end


@pytest.mark.parametrize("algo", ["ota", "gcbc", "gciql"])  # samplers of three kinds
def test_images_go_from_a_file_through_training_to_the_score(line, algo):
    walk = np.linspace(-1, 1, 20)
    np.savez(
        "pictures.npz",
        observations=np.stack([picture(place) for place in walk]),
        actions=np.ones((20, 1), np.float32),
        terminals=np.arange(20) == 19,
    )
    cli.train(
        [
            f"algo={algo}",
            "env=Picture-v0",
            "source=ogbench",
            "dataset=pictures.npz",
            "algo.images=true",
            "algo.crop_share=0.5",
            "algo.hidden=[16]",
            "algo.batch=4",
            "steps=3",
            "evaluation=inline",
            "eval_every=3",
            "eval_episodes=1",
            "final_episodes=1",
        ]
    )
    (path,) = Path("runs").rglob("result.json")
    result = json.loads(path.read_text())
    assert np.shape(result["final_returns"]) == (1, 2)
    assert all(np.isfinite(value) for value in result["last3"]["per_seed"])
