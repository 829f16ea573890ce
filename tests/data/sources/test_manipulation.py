"""The manipulation recipe. The package builds a scene in seconds: what plays one is slow."""

import numpy as np
import pytest

from offrl.data.sources import manipulation

LENGTH = 150


@pytest.mark.parametrize(
    ("env", "found"),
    [("cube-single", (1000, 1000)), ("cube-triple", (3000, 1000)), ("puzzle-4x6", (5000, 1000))],
)
def test_sizes_are_the_published_ones(env, found):
    assert manipulation.size(env, "noisy") == found


@pytest.fixture(scope="module")
def played():
    pytest.importorskip("dm_control")
    pytest.importorskip("ogbench")
    names = [("cube-single", "play"), ("scene", "noisy"), ("puzzle-3x3", "play")]
    return {pair: manipulation.play(*pair, 1, LENGTH, 3) for pair in names}


@pytest.mark.slow
def test_rows_have_the_published_layout(played):
    for (name, _), found in played.items():
        obs, buttons = {"cube-single": (28, None), "scene": (40, 2), "puzzle-3x3": (55, 9)}[name]
        assert found["observations"].shape == (LENGTH + 1, obs)
        assert found["actions"].shape == (LENGTH + 1, 5)
        assert np.flatnonzero(found["terminals"]).tolist() == [LENGTH]
        assert ("button_states" in found) == (buttons is not None)
        if buttons:
            assert found["button_states"].shape == (LENGTH + 1, buttons)
            assert found["button_states"].dtype == np.int64
        for key in ("observations", "actions", "qpos", "qvel"):
            assert found[key].dtype == np.float32
            assert np.isfinite(found[key]).all()
        assert np.abs(found["actions"]).max() <= 1


@pytest.mark.slow
def test_a_rows_positions_belong_to_its_observation(played):
    found = played["cube-single", "play"]
    np.testing.assert_allclose(found["observations"][:, :6], found["qpos"][:, :6], atol=1e-6)
    height = found["observations"][:, 21] / 10  # of the cube, over the floor
    np.testing.assert_allclose(height, found["qpos"][:, 16], atol=1e-6)


@pytest.mark.slow
def test_the_oracles_carry_cubes_and_press_buttons(played):
    cube = played["cube-single", "play"]["qpos"][:, 14:17]
    assert cube[:, 2].max() > 0.08  # lifted from 0.02
    assert np.linalg.norm(cube[-1, :2] - cube[0, :2]) > 0.05
    buttons = played["puzzle-3x3", "play"]["button_states"]
    assert (buttons[1:] != buttons[:-1]).any()


@pytest.mark.slow
def test_a_seed_decides_a_chunk(played):
    pair = ("scene", "noisy")
    again = manipulation.play(*pair, 1, LENGTH, 3)
    for name, array in played[pair].items():
        np.testing.assert_array_equal(again[name], array)
    other = manipulation.play(*pair, 1, LENGTH, 4)
    assert not np.array_equal(other["actions"], again["actions"])


def test_a_scenes_cube_must_stay_in_view_or_in_the_drawer():
    qpos = np.zeros((3, 21))
    assert manipulation.in_view(qpos)
    qpos[1, 15:17] = -0.31, 0.07  # in the drawer
    assert manipulation.in_view(qpos)
    qpos[1, 16] = 0.02
    assert not manipulation.in_view(qpos)
    qpos[1, 15] = 0.3
    assert not manipulation.in_view(qpos)
