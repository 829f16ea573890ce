"""Routes of a maze, a low policy led along them, and subgoals read as points."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offrl.engine.evaluate import Evaluator, scenarios_of
from offrl.envs.make import factory
from offrl.nets.goal import normalized
from tools import levels, mazes

pytest.importorskip("ogbench")


@pytest.fixture(scope="module")
def world():
    env = factory("pointmaze-medium")()
    yield env
    env.close()


@pytest.fixture(scope="module")
def routes(world):
    return levels.Routes(world.unwrapped)


class Hierarchy:
    """phi is the way to a goal, and the low policy goes it straight ahead."""

    def __init__(self, named):
        self.named = named  # the high policy's subgoal of a state (2,) and a goal (2,)
        self.low = SimpleNamespace(act=lambda obs, z, *_: z[..., :2] / z[..., :2].abs().amax())

    def goal(self, obs):
        return obs

    def rep(self, obs, goal):
        return normalized(torch.cat([goal - obs, torch.ones(len(obs), 1)], -1))

    def high(self, obs, goal):
        pairs = zip(obs.numpy(), goal.numpy(), strict=True)
        named = [self.named(xy, end) for xy, end in pairs]
        return 7 * self.rep(obs, torch.tensor(np.stack(named), dtype=torch.float32))


def test_a_way_goes_by_the_centers_of_the_cells_between(routes):
    at = routes.core.ij_to_xy
    start, goal = np.array(at((1, 1))) + 0.5, np.array(at((3, 2))) + 0.5
    way = routes.way(start, goal)
    assert len(way) == 4  # two cells between
    assert np.array_equal(way[2], at((2, 2)))
    assert way[1].tolist() in (list(at((1, 2))), list(at((2, 1))))
    lengths = np.linalg.norm(np.diff(way, axis=0), axis=-1)
    assert routes.distance(start, goal) == pytest.approx(lengths.sum())
    assert np.allclose(routes.ahead(start, goal, lengths[0] + 1), way[1] + (way[2] - way[1]) / 4)
    assert np.array_equal(routes.ahead(start, goal, 1e3), goal)
    near = goal + 0.5
    assert np.array_equal(routes.way(near, goal), [near, goal])


def test_points_lie_in_free_cells_three_by_three(routes):
    points, core = routes.points(), routes.core
    assert len(points) == 9 * (core.maze_map == 0).sum()
    assert all(core.maze_map[core.xy_to_ij(point)] == 0 for point in points)


def test_a_low_policy_that_walks_straight_wins_where_it_is_led(routes):
    algo = Hierarchy(lambda xy, goal: goal)
    make = factory("pointmaze-medium")
    player = Evaluator(make, width=1, scenarios=scenarios_of((), make))
    played = player(levels.Led(algo, routes, 2.0), 1)
    player.close()
    assert played["return"].tolist() == [1.0] * 5


def test_subgoals_ahead_are_nearer_and_those_behind_are_not(routes):
    path, goal = mazes.expert_paths("pointmaze-medium", 0)[0]
    states = path[::25][:-2]
    ahead = Hierarchy(lambda xy, end: routes.ahead(xy, end, 4.0))
    found = levels.gains(ahead, routes, states, goal, 8.0)
    assert (found > 0).all()
    assert found.mean() == pytest.approx(4.0, abs=0.7)
    start = path[0].numpy()
    behind = Hierarchy(lambda xy, end: routes.ahead(xy, start, 4.0))
    assert (levels.gains(behind, routes, states[2:], goal, 8.0) < 0).all()
    beyond = Hierarchy(lambda xy, end: goal[0].numpy())
    assert 0 < levels.gains(beyond, routes, states[:1], goal, 4.0) < 5.0  # not all the way
