import sys

import gymnasium
import numpy as np
import pytest
import torch

from offrl.errors import ConfigError, Failed
from offrl.runs import evaluate as evaluation
from offrl.runs.evaluate import film, write_video

STEPS = 5


class Robot(gymnasium.Env):
    """Ends after STEPS steps; without a screen it cannot be rendered."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def __init__(self, screen):
        self.screen = screen

    def reset(self, seed=None, options=None):
        self.step_number = 0
        return np.zeros(3), {}

    def step(self, action):
        self.step_number += 1
        return np.zeros(3), 0.0, self.step_number == STEPS, False, {}

    def render(self):
        if not self.screen:
            raise RuntimeError("no display")
        return np.zeros((4, 4, 3), np.uint8)


class Still:
    def act(self, now, memory=None):
        return torch.zeros(*now["obs"].shape[:-1], 2), memory


@pytest.fixture
def filmed(monkeypatch):
    def go(screen, seeds):
        monkeypatch.setattr(evaluation, "make_env", lambda *_, **__: lambda: Robot(screen))
        return film(None, (Still(), seeds), (), 0)

    return go


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_a_film_has_a_frame_per_step_and_shows_its_progress(filmed, seeds, capsys):
    assert len(filmed(True, seeds)) == STEPS
    assert "filming" in capsys.readouterr().err


def test_a_machine_that_cannot_render_is_told_what_to_set(filmed):
    with pytest.raises(Failed, match=r"cannot render here \(no display\).*MUJOCO_GL=egl"):
        filmed(False, [0])


def test_a_gif_holds_every_second_frame(tmp_path):
    imageio = pytest.importorskip("imageio")
    shades = range(0, 200, 20)
    frames = [np.full((16, 16, 3), shade, np.uint8) for shade in shades]
    write_video(tmp_path / "film.gif", frames)
    back = imageio.mimread(tmp_path / "film.gif")
    assert [int(frame[..., 0].mean()) for frame in back] == [*shades][::2]


def test_only_two_kinds_of_video_are_known(tmp_path):
    with pytest.raises(ConfigError, match=r"\.gif or \.mp4, got .*film\.avi"):
        write_video(tmp_path / "film.avi", [])


def test_filming_without_its_extra_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio", None)
    with pytest.raises(Failed, match=r"offrl\[video\]"):
        write_video(tmp_path / "film.gif", [])
