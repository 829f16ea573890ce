import functools
import pickle

import gymnasium
import mujoco
import numpy as np
import pytest
import torch

from offrl.engine.evaluate import Evaluator
from offrl.envs.grid import GridWorld
from offrl.envs.make import ROBOTS, VERSIONS, env_id, factory, simulator
from offrl.envs.vector import Vector, restore, snapshot
from offrl.envs.workers import Workers

HOPPER = factory("hopper")


def test_hopper_weighs_as_in_either_engine():
    masses = [
        factory("hopper", "v4", legacy_mass=flag)().unwrapped.model.body_mass for flag in (0, 1)
    ]
    assert masses[0].sum() == pytest.approx(15.82, abs=0.01)
    assert masses[1].sum() == pytest.approx(15.26, abs=0.01)
    expected = [3.534, 3.927, 2.714, 5.089]
    np.testing.assert_allclose(masses[1][1:], expected, atol=1e-3)


def test_walker_weighs_as_in_the_older_engine():
    assert factory("walker2d", legacy_mass=True)().unwrapped.model.body_mass.sum() == pytest.approx(
        22.70, abs=0.02
    )


WORLDS = ["hopper", "halfcheetah", "dmc-cheetah-run", "antmaze-medium", "cube-single"]
EXTRAS = {"dmc": "dm_control", "antmaze": "ogbench", "cube": "ogbench"}


def world(name, **settings):
    if extra := EXTRAS.get(name.partition("-")[0]):
        pytest.importorskip(extra)
    env = factory(name)(**settings)
    env.reset(seed=3)
    return env


@pytest.mark.parametrize("name", WORLDS[:-1])
def test_factors_of_one_change_nothing(name):
    plain, scaled = world(name), world(name, mass=1, friction=1)
    acts = np.random.default_rng(0).uniform(-1, 1, (60, *plain.action_space.shape))
    for act in acts:
        expected, found = plain.step(act), scaled.step(act)
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1:4] == expected[1:4]
        if expected[2]:
            np.testing.assert_array_equal(scaled.reset()[0], plain.reset()[0])


@pytest.mark.parametrize("name", WORLDS)
def test_mass_and_friction_scale_the_whole_model(name):
    plain, heavy = (simulator(env)[0] for env in (world(name), world(name, mass=2, friction=0.5)))
    for field in ("body_mass", "body_inertia", "body_subtreemass"):
        np.testing.assert_allclose(getattr(heavy, field), 2 * getattr(plain, field))
    np.testing.assert_allclose(heavy.geom_friction, plain.geom_friction * [0.5, 1, 1])
    assert (heavy.body_invweight0[1:] != plain.body_invweight0[1:]).any()


def test_a_force_pushes_the_torso_in_every_episode():
    plain, pushed = world("hopper"), world("hopper", force=(5.0, 0.0, 2.0))
    for _ in range(2):
        sums = []
        for env in (plain, pushed):
            model, data = simulator(env)
            mujoco.mj_forward(model, data)
            sums.append(data.qfrc_smooth[:2].copy())  # along the slides of the root, x and z
            env.step(np.zeros(3))
            env.reset(seed=4)
        np.testing.assert_allclose(sums[1] - sums[0], [5.0, 2.0])


def test_explicit_pairs_of_geoms_rub_as_the_others(tmp_path):
    core = HOPPER().unwrapped
    pair = '<contact><pair geom1="floor" geom2="foot_geom" friction="1 1 .1 .1 .1"/></contact>'
    model = mujoco.MjSpec.from_file(core.fullpath).to_xml().replace("</mujoco>", f"{pair}</mujoco>")
    (tmp_path / "hopper.xml").write_text(model)
    env = world("hopper", xml_file=str(tmp_path / "hopper.xml"), friction=3)
    np.testing.assert_allclose(simulator(env)[0].pair_friction, [[3, 3, 0.1, 0.1, 0.1]])


def test_a_constructor_takes_the_settings_that_it_names():
    assert world("grid-world", size=4).unwrapped.size == 4
    assert np.ptp(world("hopper", reset_noise_scale=0.0).reset()[0][1:]) == 0
    assert world("Pendulum-v1", g=3.0).unwrapped.g == 3.0


def test_settings_reach_worker_processes():
    make = functools.partial(HOPPER, mass=2.0)
    assert simulator(pickle.loads(pickle.dumps(make))())[0].body_mass.sum() > 30
    here, there = Vector([make, HOPPER], [0, 1]), Workers([make, HOPPER], [0, 1], 2)
    assert torch.equal(here.reset(), there.reset())
    act = torch.full((2, 3), 0.3)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(here.step(act), there.step(act), strict=True))
    there.close()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("hopper", {"wind": 1}, "HopperEnv.*no setting 'wind'; known: mass, friction, force, xml"),
        ("CartPole-v1", {"mass": 2}, "CartPole.*no setting 'mass'; known: sutton_barto_reward"),
        ("hopper", {"mass": 0}, "positive factors, got 0"),
        ("hopper", {"friction": float("nan")}, "positive factors, got 1.0 and nan"),
        ("hopper", {"force": 3.0}, "force is three numbers, got 3.0"),
    ],
)
def test_settings_that_an_environment_does_not_have_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        factory(name)(**settings)


def test_unknown_names_and_versions_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'hopper'"):
        factory("hoper")
    with pytest.raises(ValueError, match="v5, v4"):
        factory("hopper", "v3")


def test_an_id_and_a_version_that_contradict_each_other_are_both_named():
    with pytest.raises(ValueError, match="Hopper-v4 contradicts env_version=v5"):
        factory("Hopper-v4", "v5")
    assert env_id("Hopper-v4") == env_id("Hopper-v4", "v4") == env_id("hopper", "v4")
    assert env_id("Pendulum-v1", "v5") == "Pendulum-v1"


def test_a_filmed_robot_is_followed_by_its_camera():
    camera = lambda env: env.unwrapped.mujoco_renderer.camera_id  # noqa: E731
    assert camera(factory("hopper", render=True)()) == 0  # the model's only one, "track"
    assert camera(factory("hopper")()) == -1
    assert camera(factory("inverted-pendulum", render=True)()) == -1
    pytest.importorskip("ogbench")
    assert factory("cube-single", render=True)().spec.id == "cube-single-v0"  # has its own camera


def test_actions_are_clipped_and_stretched_to_the_range():
    env = factory("Pendulum-v1")()
    np.testing.assert_allclose(env.action(np.array([0.5])), [1.0])
    np.testing.assert_allclose(env.action(np.array([-7.0])), [-2.0])


@pytest.mark.parametrize("name", ["CartPole-v1", "grid-world"])
def test_a_snapshot_of_a_discrete_task_continues_through_the_next_episode(name):
    env, other = factory(name)(), factory(name)()
    acts = np.random.default_rng(0).integers(env.action_space.n, size=400)
    env.reset(seed=3)
    other.reset(seed=99)
    for act in acts[:5]:
        env.step(act)
    assert restore(other, snapshot(env))
    ended = 0
    for act in acts[5:]:
        expected, found = env.step(act), other.step(act)
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1:4] == expected[1:4]
        if expected[2] or expected[3]:
            ended += 1
            np.testing.assert_array_equal(other.reset()[0], env.reset()[0])
    assert ended > 0


def test_the_optimal_values_of_the_grid_world_are_what_its_best_moves_are_paid():
    env = GridWorld(4)
    obs, values = env.optimal(0.9)
    for row, value in zip(obs, values, strict=True):
        for act, expected in enumerate(value):
            env.reset(seed=0)
            env.place = np.round((row + 1) * 1.5).astype(int)
            total, factor, over = 0.0, 1.0, False
            while not over:
                seen, reward, over, _, _ = env.step(act)
                total, factor = total + factor * reward, factor * 0.9
                if not over:
                    act = int(values[(obs == seen).all(1)][0].argmax())
            assert total == pytest.approx(expected)


def test_discrete_actions_are_numbers_and_continuous_ones_vectors():
    carts, arms = Vector([factory("CartPole-v1")] * 3, [0, 1, 2]), Vector([HOPPER], [0])
    assert (carts.obs_dim, carts.act_dim, carts.discrete) == (4, 2, True)
    assert (arms.obs_dim, arms.act_dim, arms.discrete) == (11, 3, False)
    start = carts.reset()
    pushed, *_ = carts.step(torch.tensor([0, 1, 0]))
    assert ((pushed - start)[:, 1].sign() == torch.tensor([-1.0, 1.0, -1.0])).all()


def test_an_environment_without_a_snapshot_starts_its_episode_anew():
    """Box2D's; what a resumed run does with them."""

    class Plain(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0, 1, (1,))
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.np_random.random(1), {}

        def step(self, action):
            return self.np_random.random(1), 0.0, False, False, {}

    one, two = Vector([Plain], [3]), Vector([Plain], [9])
    one.reset()
    *_, obs = one.step(torch.tensor([0]))
    found, anew = two.load(one.state(), obs)
    assert anew.tolist() == [1]
    assert float(found) == pytest.approx(float(one.envs[0].reset()[0][0]))
    assert not torch.equal(found, obs)


@pytest.mark.parametrize("name", ["hopper", "halfcheetah", "Pendulum-v1"])
def test_a_snapshot_continues_bit_equal_through_the_next_episode(name):
    env, g = factory(name)(), np.random.default_rng(0)
    env.reset(seed=3)

    def play(env, acts):
        out = []
        for act in acts:
            obs, reward, terminated, truncated, _ = env.step(act)
            out.append((*obs, reward))
            if terminated or truncated:
                out.append(env.reset()[0])
        return np.concatenate([np.ravel(o) for o in out])

    shape = env.action_space.shape
    play(env, g.uniform(-1, 1, (30, *shape)))
    saved = snapshot(env)
    acts = g.uniform(-1, 1, (250, *shape))
    expected = play(env, acts)
    other = factory(name)()
    other.reset(seed=99)
    assert restore(other, saved)
    np.testing.assert_array_equal(play(other, acts), expected)


@pytest.mark.parametrize("name", ["hopper", "walker2d", "halfcheetah"])
def test_lighter_robots_have_the_constants_of_their_masses(name):
    core = factory(name, "v4", legacy_mass=True)().unwrapped
    model = core.model
    assert model.body_subtreemass[0] == pytest.approx(model.body_mass.sum())
    before = model.body_invweight0.copy(), model.dof_invweight0.copy()
    mujoco.mj_setConst(model, core.data)
    np.testing.assert_array_equal(model.body_invweight0, before[0])
    np.testing.assert_array_equal(model.dof_invweight0, before[1])
    heavy = factory(name, "v4")().unwrapped.model
    assert (heavy.dof_invweight0 != model.dof_invweight0).any()


def test_d4rl_tasks_without_an_environment_are_told_apart_from_misspellings():
    with pytest.raises(ValueError, match="no environment for 'd4rl-antmaze-large' yet"):
        factory("d4rl-antmaze-large")


# Gymnasium's Pusher-v4 refuses mujoco 3
PLAYABLE = [(n, v) for n in ROBOTS for v in VERSIONS if (n, v) != ("pusher", "v4")]


@pytest.mark.parametrize(("name", "version"), PLAYABLE)
def test_every_robot_continues_from_a_snapshot_in_mid_episode(name, version):
    env, other = factory(name, version)(), factory(name, version)()
    g = np.random.default_rng(0)
    acts = g.uniform(-0.3, 0.3, (8, *env.action_space.shape))
    env.reset(seed=3)
    other.reset(seed=99)
    assert not any(env.step(act)[2] for act in acts[:3])
    assert restore(other, snapshot(env))
    for act in acts[3:]:
        expected, found = env.step(act), other.step(act)
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1:4] == expected[1:4]


def test_v5_pays_one_less_per_fall_than_v4():
    acts = np.random.default_rng(0).uniform(-1, 1, (2000, 3))
    totals = []
    for version in ("v4", "v5"):
        env = factory("hopper", version)()
        env.reset(seed=0)
        total, falls = 0.0, 0
        for i, act in enumerate(acts):
            _, reward, terminated, _, _ = env.step(act)
            total += reward
            if terminated:
                falls += 1
                env.reset(seed=i)
        totals.append(total)
    assert totals[0] - totals[1] == pytest.approx(falls, abs=1e-6)


def test_an_episode_restarts_with_its_true_last_observation_reported():
    envs = Vector([factory("hopper")] * 2, [0, 1])
    obs = envs.reset()
    seen = torch.zeros(2)
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        act = torch.rand(2, 3, generator=g) * 2 - 1
        next_obs, _, terminal, timeout, now = envs.step(act)
        over = (terminal + timeout) > 0
        assert torch.equal(next_obs[~over], now[~over])
        assert not any(torch.equal(a, b) for a, b in zip(next_obs[over], now[over], strict=True))
        seen += over
        obs = now
    assert (seen > 0).all()
    assert obs.shape == (2, 11)


class Still:
    """Does nothing, and records the size of the batches it is asked for."""

    def __init__(self):
        self.sizes = set()

    def act(self, now, memory=None):
        self.sizes.add(tuple(now["obs"].shape))
        return torch.zeros(*now["obs"].shape[:-1], 3), memory


def test_evaluation_plays_equal_episodes_in_fixed_batches_and_repeats_itself():
    policy, player = Still(), Evaluator(factory("hopper"), width=3, seed=4)
    one, two = player(policy, 6), player(policy, 6)
    assert policy.sizes == {(3, 11)}
    assert one["return"].shape == (6,)
    assert torch.equal(one["return"], two["return"])
    assert (one["length"] > 10).all()
    with pytest.raises(ValueError, match="multiple of 3"):
        player(policy, 7)


def test_evaluation_equals_a_plain_loop():
    from offrl.seeding import derive

    env = factory("hopper")()
    env.reset(seed=derive(4, "evaluation", 0))
    returns = []
    for _ in range(2):
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(np.zeros(3))
            total, over = total + reward, terminated or truncated
        returns.append(total)
        env.reset()
    found = Evaluator(factory("hopper"), width=1, seed=4)(Still(), 2)["return"]
    np.testing.assert_allclose(found.numpy(), returns, rtol=1e-5)


def test_stacked_seeds_meet_the_same_start_states():
    class Shared(Still):
        pass

    player = Evaluator(factory("hopper"), seeds=(2,), width=2, seed=4)
    found = player(Shared(), 4)
    assert found["return"].shape == (2, 4)
    assert torch.equal(found["return"][0], found["return"][1])


class Certain:
    """Knows what Pendulum-like episodes of constant reward are worth, but for an error of 2."""

    class config:
        discount = 0.9

    def act(self, now, memory=None):
        return torch.zeros(*now["obs"].shape[:-1], 1), memory

    def estimate(self, now, act):
        return torch.full(now["obs"].shape[:-1], 12.0)


class Constant(gymnasium.Env):
    """Pays 1 for a thousand steps, or ends with the third."""

    observation_space = gymnasium.spaces.Box(0, 1, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, ends):
        self.ends = ends

    def reset(self, *, seed=None, options=None):
        self.at = 0
        return np.zeros(1), {}

    def step(self, action):
        self.at += 1
        return np.zeros(1), 1.0, self.ends and self.at == 3, self.at == 1000, {}


def test_the_bias_of_estimates_leaves_out_steps_whose_return_is_cut_off():
    cut = Evaluator(lambda: Constant(False), width=1)(Certain(), 1)["bias"]
    assert float(cut) == pytest.approx(2.0, abs=0.01)  # 12 against 10 (1 - 0.9^n), n >= 44
    ended = Evaluator(lambda: Constant(True), width=2)(Certain(), 4)["bias"]
    returns = [2.71, 1.9, 1.0]
    assert ended.tolist() == pytest.approx([12 - sum(returns) / 3] * 4)
    early = Evaluator(lambda: gymnasium.wrappers.TimeLimit(Constant(False), 43), width=1)
    assert early(Certain(), 1)["bias"].isnan().all()
    assert "bias" not in Evaluator(HOPPER, width=1)(Still(), 1)
