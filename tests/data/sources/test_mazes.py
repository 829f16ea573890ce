"""The pointmaze recipe."""

from collections import Counter

import numpy as np
import pytest

from offrl.data.sources import mazes

MAP = np.array(
    [
        [1, 1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0, 1],
        [1, 0, 1, 1, 0, 1],
        [1, 0, 0, 0, 0, 1],
        [1, 0, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]
)


def test_a_corridor_lets_one_go_straight_only():
    straight = {(i, j) for i, j in np.argwhere(MAP == 0).tolist() if mazes.corridor(MAP, (i, j))}
    assert straight == {(1, 2), (1, 3), (2, 1), (2, 4), (3, 2), (3, 3)}


def test_stitch_goals_are_four_steps_of_the_shortest_path_away():
    assert set(mazes.four_away(MAP, (1, 1))) == {(2, 4), (3, 3)}
    assert mazes.four_away(np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]]), (1, 1)) == [(1, 1)]


@pytest.mark.parametrize(
    ("maze", "kind", "found"),
    [
        ("giant", "navigate", (500, 2000)),
        ("teleport", "navigate", (1000, 1000)),
        ("giant", "stitch", (5000, 200)),
    ],
)
def test_sizes_are_the_published_ones(maze, kind, found):
    assert mazes.size(maze, kind) == found


@pytest.fixture(scope="module")
def walks():
    pytest.importorskip("ogbench")
    return {kind: mazes.play("medium", kind, 8, 200, 3) for kind in mazes.KINDS}


def test_rows_have_the_published_layout(walks):
    for found in walks.values():
        assert {name: (a.shape, str(a.dtype)) for name, a in found.items()} == {
            "observations": ((1608, 2), "float32"),
            "actions": ((1608, 2), "float32"),
            "qpos": ((1608, 2), "float32"),
            "qvel": ((1608, 2), "float32"),
            "terminals": ((1608,), "bool"),
        }
        assert np.flatnonzero(found["terminals"]).tolist() == [201 * k - 1 for k in range(1, 9)]
        np.testing.assert_array_equal(found["observations"], found["qpos"])


def test_actions_are_noisy_unit_vectors_within_bounds(walks):
    for found in walks.values():
        act = found["actions"]
        assert np.abs(act).max() == 1.0
        moved = np.diff(found["observations"].reshape(8, 201, 2), axis=1)
        # a step covers a fifth of the action where no wall is in the way
        free = np.abs(moved - 0.2 * act.reshape(8, 201, 2)[:, :-1]).max(-1) < 1e-3
        assert free.mean() > 0.7


def test_actions_scatter_by_half_around_the_direction_of_the_next_cell(walks):
    import gymnasium

    env = gymnasium.make("pointmaze-medium-v0").unwrapped
    xy, act = (
        walks["stitch"][name].reshape(8, 201, 2).astype(float) for name in ("qpos", "actions")
    )
    cells = [[env.xy_to_ij(at) for at in walk] for walk in xy]
    goals = [Counter(walk[-50:]).most_common(1)[0][0] for walk in cells]  # where a walk ends
    way = (
        np.array(
            [
                [env.get_oracle_subgoal(env.ij_to_xy(cell), env.ij_to_xy(goal))[0] for cell in walk]
                for walk, goal in zip(cells, goals, strict=True)
            ]
        )
        - xy
    )
    unit = way / np.linalg.norm(way, axis=-1, keepdims=True)
    noise = (act - unit)[np.abs(unit) < 0.7]  # where the bounds leave noise below 0.3 as it is
    assert len(noise) > 1500
    shares = {bound: (np.abs(noise) < bound).mean() for bound in (0.15, 0.3)}
    assert abs(shares[0.15] - 0.2358) < 0.03  # P(|N(0, 1)| < 0.3)
    assert abs(shares[0.3] - 0.4515) < 0.03  # P(|N(0, 1)| < 0.6)


def test_stitch_walks_end_around_a_cell_four_away(walks):
    xy = walks["stitch"]["observations"].reshape(8, 201, 2)
    travelled = np.abs(xy[:, -1] - xy[:, 0]).sum(-1)
    assert (travelled < 4 * 4 + 4).all()
    assert (np.abs(np.diff(xy[:, -30:], axis=1)).sum((1, 2)) > 1).all()  # they stay and jitter
    assert (np.linalg.norm(xy[:, -30:] - xy[:, -1:], axis=-1) < 3).all()


def test_navigate_walks_go_on_to_new_goals(walks):
    xy = walks["navigate"]["observations"].reshape(8, 201, 2)
    assert (np.linalg.norm(xy[:, -1] - xy[:, -40], axis=-1) > 1.5).mean() > 0.5


def test_a_seed_decides_a_chunk(walks):
    again = mazes.play("medium", "stitch", 8, 200, 3)
    for name, array in walks["stitch"].items():
        np.testing.assert_array_equal(again[name], array)
    other = mazes.play("medium", "stitch", 8, 200, 4)
    assert not np.array_equal(other["observations"], again["observations"])
