"""Reference returns and normalized scores."""

import numpy as np
import pytest
import torch

from offrl.envs.scores import REFERENCES, reference, score


@pytest.mark.parametrize("name", REFERENCES)
def test_random_scores_0_and_expert_100(name):
    low, high = REFERENCES[name]
    assert score(low, f"d4rl-{name}") == 0
    assert score(high, f"d4rl-{name}") == 100


def test_known_values():
    assert score(3234.3 - 32.54572305, "hopper") == pytest.approx(99)
    assert score(19.0, "hopper") == pytest.approx(1.2067, abs=1e-4)  # a random policy
    assert score(1.0, "d4rl-antmaze-large", "play") == 100
    assert score(2, "d4rl-kitchen", "mixed") == 50


@pytest.mark.parametrize("env", ["hopper", "d4rl-pen", "d4rl-maze2d-large"])
def test_score_of_the_mean_is_the_mean_score(env):
    returns = torch.tensor([-3.0, 250.0, 1999.5], dtype=torch.float64)
    torch.testing.assert_close(score(returns, env).mean(), score(returns.mean(), env))
    np.testing.assert_allclose(score(returns.numpy(), env), score(returns, env))


@pytest.mark.parametrize(
    ("names", "row"),
    [
        (("hopper", "hopper-medium-replay", "hopper-full-replay-v2", "hopper-v0"), "hopper"),
        (("ant", "ant-medium-expert-v2"), "ant"),
        (("maze2d-umaze-v1", "d4rl-maze2d-umaze", "maze2d-umaze"), "maze2d-umaze"),
        (("maze2d-umaze-v0",), "maze2d-umaze-v0"),
        (("maze2d-medium-dense-v1", "d4rl-maze2d-medium-dense"), "maze2d-medium-dense"),
        (("maze2d-open-dense-v0",), "maze2d-open-dense"),
        (("maze2d-eval-large-v1",), "maze2d-eval-large"),
        (
            ("d4rl-antmaze-large", "d4rl-antmaze-large-play", "antmaze-large-diverse-v2"),
            "antmaze-large",
        ),
        (("pen-human-v1", "d4rl-pen", "d4rl-pen-cloned"), "pen"),
        (("d4rl-kitchen", "kitchen-partial-v0"), "kitchen"),
        (("flow-ring-controller-v0",), "flow-ring"),
        (("carla-town-full-v0",), "carla-town"),
    ],
)
def test_names_with_and_without_data_set_find_their_row(names, row):
    assert all(reference(name) == REFERENCES[row] for name in names)


def test_the_data_set_chooses_among_the_rows_of_maze2d():
    assert reference("d4rl-maze2d-umaze", "dense") == REFERENCES["maze2d-umaze-dense"]
    assert reference("d4rl-maze2d-umaze", "sparse") == REFERENCES["maze2d-umaze"]
    assert reference("hopper", "/data/mine.hdf5") == REFERENCES["hopper"]


@pytest.mark.parametrize(
    "name",
    [
        "antmaze-large",
        "antmaze-medium",
        "antmaze-large-navigate-v0",
        "antmaze-giant",
        "Hopper-v5",
        "humanoid",
        "hopper-hard",
        "cube-single",
        "robotics-kitchen",
        "",
    ],
)
def test_other_benchmarks_have_no_reference(name):
    assert reference(name) is None
    with pytest.raises(ValueError, match="no reference returns"):
        score(1.0, name)
