"""dm-control's tasks through our adapter; needs the extra `dmc`."""

import numpy as np
import pytest

from offrl.envs.make import RepeatAction, env_id, factory
from offrl.envs.vector import restore, snapshot

suite = pytest.importorskip("dm_control.suite")
# quadruped-escape draws its terrain with a renderer, which not every machine has
NAMES = [f"dmc-{domain}-{task}" for domain, task in suite.ALL_TASKS if task != "escape"]


def test_observations_and_rewards_are_the_task_s_own_in_its_own_order():
    env, plain = factory("dmc-walker-walk")(), suite.load("walker", "walk", {"random": 7})
    env.reset(seed=7)
    plain.task.random.seed(7)
    expected, (found, _) = plain.reset(), env.reset(seed=7)
    for act in np.random.default_rng(0).uniform(-1, 1, (5, 6)):
        parts = [np.ravel(part) for part in expected.observation.values()]
        np.testing.assert_array_equal(found, np.concatenate(parts).astype(np.float32))
        expected, (found, reward, terminated, truncated, _) = plain.step(act), env.step(act)
        assert reward == expected.reward
        assert not terminated
        assert not truncated


def test_an_episode_is_cut_off_after_a_thousand_steps_and_not_ended():
    env = factory("dmc-cartpole-swingup")()
    env.reset(seed=0)
    ends = [env.step(np.zeros(1))[2:4] for _ in range(1000)]
    assert ends[:-1] == [(False, False)] * 999
    assert ends[-1] == (False, True)


def test_repeated_actions_sum_rewards_and_share_the_time_limit():
    one, four = (
        factory("dmc-cartpole-swingup")(),
        factory("dmc-cartpole-swingup", action_repeat=4)(),
    )
    one.reset(seed=0), four.reset(seed=0)
    act = np.full(1, 0.3)
    for i in range(250):
        single = [one.step(act) for _ in range(4)]
        obs, reward, terminated, truncated, _ = four.step(act)
        np.testing.assert_array_equal(obs, single[-1][0])
        assert reward == pytest.approx(sum(step[1] for step in single))
        assert (terminated, truncated) == (False, i == 249)


def test_a_repeated_action_stops_where_the_episode_ends():
    class Short:
        steps = 0

        def step(self, action):
            self.steps += 1
            return self.steps, 1.0, self.steps == 5, False, {}

    env = RepeatAction.__new__(RepeatAction)
    env.env, env.times = Short(), 3
    assert env.step(0)[:3] == (3, 3.0, False)
    assert env.step(0)[:3] == (5, 2.0, True)


def test_a_misspelled_task_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'dmc-cheetah-run'"):
        env_id("dmc-cheeta-run")


def continues_bit_equal(name):
    env, other = factory(name)(), factory(name)()
    g = np.random.default_rng(0)
    env.reset(seed=3), other.reset(seed=99)
    for _ in range(3):
        env.step(g.uniform(-1, 1, env.action_space.shape))
    assert restore(other, snapshot(env))
    for _ in range(4):
        act = g.uniform(-1, 1, env.action_space.shape)
        expected, found = env.step(act), other.step(act)
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1:4] == expected[1:4]
    np.testing.assert_array_equal(other.reset()[0], env.reset()[0])
    act = g.uniform(-1, 1, env.action_space.shape)
    np.testing.assert_array_equal(other.step(act)[0], env.step(act)[0])


@pytest.mark.parametrize(
    "name", ["dmc-cheetah-run", "dmc-finger-turn_hard", "dmc-swimmer-swimmer6"]
)
def test_a_snapshot_continues_bit_equal_into_the_next_episode(name):
    continues_bit_equal(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_task_continues_from_a_snapshot(name):
    continues_bit_equal(name)
