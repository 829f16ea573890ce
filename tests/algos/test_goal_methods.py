"""What is asked of every goal-conditioned method."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch

from offrl.engine.method import Run, Spec, Task
from offrl.engine.state import load_state, state_of
from tests.algos import engineering
from tests.algos.cases import ACT, CASES, OBS, make, method
from tests.algos.goal_conditioned import PIXELS, reaches, with_images
from tests.data.trajectories import toy

GOALS = [name for name in CASES if method(name).goals]
# loss -> the networks whose encoders of images it moves; OTA's are in test_ota.py
SEEING = {
    "gcbc": {"loss": ["actor"]},
    "gcivl": {"value_loss": ["values"], "actor_loss": ["actor"]},
    "gciql": {"value_loss": ["values"], "critic_loss": ["critics"], "actor_loss": ["actor"]},
    "crl": {"critic_loss": ["phi", "psi"], "actor_loss": ["actor"]},
    "qrl": {"value_loss": ["metric"], "actor_loss": ["actor"]},
    "hiql": {"loss": ["rep", "values", "high", "low"]},
}
# half of the goals are any states, which imitation alone does not lead to
FAR = {"tau": 0.1, "discount": 0.9, "actor_goals": (0.0, 0.5, 0.5)}
WALKING = {
    "gcbc": {},
    "gcivl": FAR,
    "qrl": {"alpha": 0.1, "actor_goals": (0.0, 0.5, 0.5)},
    "hiql": FAR,
    "ota": FAR,
}
every = pytest.mark.parametrize("name", GOALS)


def started(algo, name, data, spec, steps=10):
    """The sampler of the method's stage."""
    (stage,) = method(name).stages(algo, Task(spec, data), Run(steps))
    return stage.start()


def make_seeing(name, spec=Spec(PIXELS, ACT), **options):  # noqa: B008
    return partial(make, name, replace(CASES[name].config, images=True, **options), spec=spec)


@every
def test_the_stage_feeds_the_update_rows_as_they_follow_each_other(name):
    spec = Spec(2, 1)
    algo = make(name, spec=spec)
    found = started(algo, name, toy((5, 3, 9)), spec)(algo.generator)
    if "next_obs" in found:
        assert torch.equal(found["next_obs"][..., 0], found["obs"][..., 0] + 1)
    torch.testing.assert_close(found["act"][..., 0], found["obs"][..., 0] / 100)
    assert all(value.isfinite().all() for value in algo.update(found, 0).values())


@every
def test_a_mixture_of_goals_must_sum_to_one(name):
    algo = make(name, replace(CASES[name].config, actor_goals=(0.0, 1.0, 0.5)))
    with pytest.raises(ValueError, match="actor_goals must be three probabilities"):
        method(name).stages(algo, Task(Spec(2, 1), toy()), Run(10))


@every
def test_actions_are_in_range_and_random_only_in_exploration(name):
    algo, g = make(name, seeds=(3,)), torch.Generator().manual_seed(0)
    now = {"obs": 100 * torch.randn(3, 32, OBS, generator=g)}
    now["goal"] = torch.randn(3, 32, OBS, generator=g)
    noisy = now | {"explore": True, "generator": g}
    for told, same in ((now, True), (now | {"explore": False}, True), (noisy, False)):
        one, other = (algo.act(told)[0] for _ in range(2))
        assert one.shape == (3, 32, ACT)
        assert one.abs().max() <= 1
        assert torch.equal(one, other) == same


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("name", ["gcivl", "gciql", "hiql", "ota"])
def test_targets_move_towards_the_weights_from_before_the_step(name, images):
    """They are (1 - tau) target + tau theta, theta the online weights before the update."""
    config = replace(CASES[name].config, tau=0.5, images=images)
    algo = make(name, config, spec=Spec(PIXELS if images else OBS, ACT))
    (kept,) = (part for part in vars(algo) if part.endswith("_target"))
    target, online = getattr(algo, kept), getattr(algo, kept.removesuffix("_target"))
    weights = [deepcopy(online.state_dict())]
    for step, expected in enumerate((lambda a: a, lambda a, b: 0.5 * a + 0.5 * b)):
        b = CASES[name].batch(size=4, seed=step)
        algo.update(with_images(b, step) if images else b, 0)
        for key, value in target.state_dict().items():
            wanted = expected(*(old[key] for old in weights))
            torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)
            assert not torch.equal(online.state_dict()[key], weights[-1][key])
        weights.append(deepcopy(online.state_dict()))


@pytest.mark.parametrize(("name", "losses"), SEEING.items(), ids=SEEING)
def test_each_loss_moves_the_encoders_of_its_own_networks(name, losses):
    options = {"low_actor_rep_grad": True} if name == "hiql" else {}
    algo, b = make_seeing(name, **options)(), with_images(CASES[name].batch(size=4))
    sights = {net: sight(getattr(algo, net)) for nets in losses.values() for net in nets}
    for loss, nets in losses.items():
        value = getattr(algo, loss)(b)[0]
        assert [net for net in sights if reaches(value, sights[net])] == nets


def sight(net):
    return net.sights[0] if hasattr(net, "sights") else net.sight


@every
def test_with_images_updates_are_captured_and_resumed_exactly(name):
    build = make_seeing(name)
    batches = lambda step: with_images(CASES[name].batch(size=4, seed=step), step)  # noqa: E731
    engineering.captured_equals_eager(build, batches(0), updates=6)
    whole, first, second = (build() for _ in range(3))
    engineering.run(whole, batches, stop=3)
    engineering.run(first, batches, stop=1)
    load_state(second, engineering.read_back(state_of(first)))
    engineering.assert_equal(whole, engineering.run(second, batches, 1, 3))


@every
def test_policies_see_the_image_of_the_goal(name):
    algo, b = make_seeing(name)(), with_images(CASES[name].batch(size=4))
    now = {"obs": b["obs"].float(), "goal": b["goal"].float()}
    act, other = algo.act(now)[0], algo.act(now | {"goal": now["goal"].flip(0)})[0]
    assert act.shape == (4, ACT)
    assert not torch.equal(act, other)


@every
def test_images_need_their_size_and_one_seed_per_run(name):
    assert not method(name).stacks(replace(CASES[name].config, images=True))
    with pytest.raises(ValueError, match="encoders of images carry no seed axis"):
        make_seeing(name)(seeds=(3,))
    with pytest.raises(ValueError, match=r"needs RGB images of 64 x 64 pixels.*got 3"):
        make_seeing(name, CASES[name].spec)()


@pytest.mark.parametrize(("name", "options"), WALKING.items(), ids=WALKING)
def test_learns_to_walk_a_line_to_either_end(name, options):
    """Walks along a line, each step to either side at random; the goal decides which is right."""
    g = torch.Generator().manual_seed(0)
    act = torch.randint(0, 2, (400, 20), generator=g).float() * 2 - 1
    start = 2 * torch.rand(400, 1, generator=g) - 1
    place = start + torch.cat([torch.zeros(400, 1), act.cumsum(1) / 5], 1)
    data, one = toy((20,) * 400), torch.ones(400, 20)
    for field, at in (("obs", place[:, :-1]), ("next_obs", place[:, 1:])):
        data.fields[field] = torch.stack([at, one], -1).reshape(-1, 2)
    data.fields["act"] = act.reshape(-1, 1)
    config = replace(CASES[name].config, hidden=(32, 32), batch=64, lr=3e-3, **options)
    algo = make(name, config, spec=Spec(2, 1))
    sample = started(algo, name, data, Spec(2, 1))
    for _ in range(150):
        algo.update(sample(algo.generator), 0)
    here = torch.tensor([[-0.3, 1.0], [0.0, 1.0], [0.3, 1.0]])
    for side in (1.0, -1.0):
        act, _ = algo.act({"obs": here, "goal": torch.tensor([[side, 1.0]] * 3)})
        assert (side * act).min() > 0.3
