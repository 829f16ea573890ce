"""Order along paths, maps and trajectories of a maze."""

import itertools

import numpy as np
import pytest
import torch

from offrl.envs.make import factory
from offrl.errors import ConfigError
from tools import mazes


def test_consistency_is_the_share_of_steps_after_which_the_value_is_higher():
    value = torch.tensor([0.0, 1.0, 2.0, 1.0, 3.0, 2.0])
    # two steps on: 2 > 0, 1 = 1, 3 > 2, 2 > 1
    assert mazes.order_consistency(value, 2) == 3 / 4
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    assert mazes.order_consistency(noise, 25) == pytest.approx(0.5, abs=0.02)


def test_the_moving_average_looks_back_and_is_shorter_at_the_beginning():
    value = torch.tensor([4.0, 0.0, 2.0, 0.0, 5.0])
    smooth = [4.0, 2.0, 2.0, 2 / 3, 7 / 3]  # of up to three entries
    grows = [b > a for a, b in itertools.pairwise(smooth)]
    assert mazes.order_consistency(value, 1, window=3) == sum(grows) / 4
    slope = torch.arange(3000) * 0.01
    noise = 3 * torch.randn(3000, generator=torch.Generator().manual_seed(0))
    rough = mazes.order_consistency(slope + noise, 25)
    assert mazes.order_consistency(slope + noise, 25, window=150) > rough + 0.1


class Straight:
    """Its value is the negative distance to the goal, and it walks straight towards it."""

    def value(self, obs, goal):
        return -(obs - goal).norm(dim=-1)

    def act(self, now, memory=None, explore=False, generator=None):
        way = now["goal"] - now["obs"]
        return way / way.norm(dim=-1, keepdim=True).clamp(min=1e-6), memory


@pytest.fixture(scope="module")
def medium():
    pytest.importorskip("ogbench")
    env = factory("pointmaze-medium")()
    yield env.unwrapped
    env.close()


@pytest.fixture(scope="module")
def paths():
    pytest.importorskip("ogbench")
    return mazes.expert_paths("pointmaze-medium", 0)


def test_expert_paths_lead_from_the_tasks_starts_to_their_goals(paths, medium):
    assert len(paths) == 5
    for (path, goal), task in zip(paths, medium.task_infos, strict=True):
        assert (path[0] - torch.tensor(task["init_xy"])).abs().max() <= 1.01
        assert (path[-1] - goal).norm() <= 1.0
        assert (path[:-1] - goal).norm(dim=-1).min() > 1.0
        assert all(medium.maze_map[medium.xy_to_ij(xy.numpy())] == 0 for xy in path)
        assert (path[1:] - path[:-1]).norm(dim=-1).max() <= 0.21  # no noise


def test_a_map_shows_the_goal_where_it_lies_and_nothing_in_walls(medium):
    x, y = medium.ij_to_xy((4, 6))
    seen = mazes.value_map(Straight(), medium, torch.tensor([[x + 1.0, y - 0.6]]))
    rows, columns = medium.maze_map.shape
    left, right, bottom, top = mazes.frame(medium)
    assert (left, right, bottom, top) == (-6.0, 4.0 * columns - 6, -6.0, 4.0 * rows - 6)
    assert (~np.isnan(seen)).sum() == (medium.maze_map == 0).sum() * mazes.FINE**2
    i, j = np.unravel_index(np.nanargmax(seen), seen.shape)
    found = left + (j + 0.5) * 4 / mazes.FINE, bottom + (i + 0.5) * 4 / mazes.FINE
    assert np.abs(np.subtract(found, (x + 1.0, y - 0.6))).max() <= 2 / mazes.FINE + 1e-6


def test_trajectories_end_at_the_goal_or_with_the_episode(paths):
    neighbors = {"task_info": {"init_ij": (1, 1), "goal_ij": (1, 2)}}
    for option, reaches in ((neighbors, True), ({"task_id": 4}, False)):  # walls are between
        walks = mazes.trajectories(Straight(), "pointmaze-medium", option, 2, 0)
        assert not np.array_equal(walks[0][0][0], walks[1][0][0])
        for walk, reached in walks:
            assert reached == reaches
            assert (len(walk) < 1001) == reaches


def test_runs_of_two_mazes_are_not_compared(tmp_path, monkeypatch):
    from types import SimpleNamespace

    names = iter(["pointmaze-giant", "pointmaze-large"])
    resolved = lambda _: SimpleNamespace(settings=SimpleNamespace(env=next(names)))  # noqa: E731
    monkeypatch.setattr(mazes.configuration, "from_yaml", resolved)
    monkeypatch.setattr(mazes, "checkpoints", lambda run: (run, []))
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.yaml").write_text("")
    options = mazes.Options((str(tmp_path / "a"), str(tmp_path / "b")), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="one pointmaze, found pointmaze-giant, pointmaze-large"):
        mazes.look(options)
