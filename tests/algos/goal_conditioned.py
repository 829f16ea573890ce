"""Batches of the goal-conditioned baselines, and what each of them must pass."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from offrl.engine.method import Run, Spec
from tests.algos import engineering
from tests.data.trajectories import toy

OBS, ACT, PIXELS = 3, 2, 3 * 64**2


def batch(seeds=(), size=32, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*seeds, size, *shape, generator=g, dtype=dtype)  # noqa: E731
    states = ("obs", "next_obs", "value_goal", "goal")
    success = (torch.rand(*seeds, size, generator=g) < 0.2).to(dtype)
    return {name: draw(OBS) for name in states} | {"act": draw(ACT).tanh(), "success": success}


def maker(method, config):
    def make(seeds=(), dtype=torch.float32, config=config):
        algo = method.make(config, Spec(OBS, ACT), torch.Generator().manual_seed(0), seeds)
        for name in algo.NAMES[:-1]:
            getattr(algo, name).to(dtype)
        return algo

    return make


def trained_apart(target):
    """Move a target network away from the online one, which it equals at first."""
    with torch.no_grad():
        for p in target.parameters():
            p.mul_(1.3)


def grads(loss, module):
    """Largest gradient entry of every parameter, None where there is no path."""
    found = torch.autograd.grad(
        loss.sum(), list(module.parameters()), allow_unused=True, retain_graph=True
    )
    return [None if g is None else float(g.abs().max()) for g in found]


def reaches(loss, module):
    return any(grads(loss, module))


def climbs_while_it_imitates(algo, critic):
    """The actor's loss and gradient are those of DDPG+BC.

    Args:
        critic: obs, act, goal -> Q (B,), in the method's own networks.
    """
    b = batch(dtype=torch.float64)
    with torch.no_grad():
        algo.actor.net.layers[-1].weight.mul_(100)
    mean = algo.actor(b["obs"], b["goal"])
    assert 0.1 < float((mean.abs() > 1).double().mean()) < 0.9  # the clip of actions matters
    q = critic(b["obs"], mean.clamp(-1, 1), b["goal"])
    log_prob = torch.distributions.Normal(mean, 1.0).log_prob(b["act"]).sum(-1)
    formula = -q.mean() / (q.abs().mean().detach() + 1e-6) - algo.config.alpha * log_prob.mean()
    loss, params = algo.actor_loss(b)[0], list(algo.actor.parameters())
    torch.testing.assert_close(loss, formula, rtol=1e-10, atol=1e-12)
    pairs = zip(*(torch.autograd.grad(x, params) for x in (loss, formula)), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def targets_follow_from_before_the_step(method, config, images, batch=batch):
    """Targets are (1 - tau) target + tau theta, theta the online weights before the update."""
    config, obs_dim = replace(config, tau=0.5, images=images), PIXELS if images else OBS
    algo = method.make(config, Spec(obs_dim, ACT), torch.Generator().manual_seed(0))
    (name,) = (name for name in algo.NAMES if name.endswith("_target"))
    target, online = getattr(algo, name), getattr(algo, name.removesuffix("_target"))
    weights = [deepcopy(online.state_dict())]
    for step, expected in enumerate((lambda a: a, lambda a, b: 0.5 * a + 0.5 * b)):
        b = batch(size=4, seed=step)
        algo.update(with_images(b, step) if images else b, step)
        for key, value in target.state_dict().items():
            wanted = expected(*(old[key] for old in weights))
            torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)
            assert not torch.equal(online.state_dict()[key], weights[-1][key])
        weights.append(deepcopy(online.state_dict()))


def learns_to_walk_a_line(method, config):
    """Walks along a line, each step to either side at random; the goal decides which is right."""
    g = torch.Generator().manual_seed(0)
    act = torch.randint(0, 2, (400, 20), generator=g).float() * 2 - 1
    start = 2 * torch.rand(400, 1, generator=g) - 1
    place = start + torch.cat([torch.zeros(400, 1), act.cumsum(1) / 5], 1)
    data, one = toy((20,) * 400), torch.ones(400, 20)
    for name, at in (("obs", place[:, :-1]), ("next_obs", place[:, 1:])):
        data.fields[name] = torch.stack([at, one], -1).reshape(-1, 2)
    data.fields["act"] = act.reshape(-1, 1)
    config = replace(config, hidden=(32, 32), batch=64, lr=3e-3)
    algo = method.make(config, Spec(2, 1), torch.Generator().manual_seed(0))
    sample = method.stages(algo, data, Run(150))[0].start()
    for step in range(150):
        algo.update(sample(algo.generator), step)
    here = torch.tensor([[-0.3, 1.0], [0.0, 1.0], [0.3, 1.0]])
    for side in (1.0, -1.0):
        act, _ = algo.act({"obs": here, "goal": torch.tensor([[side, 1.0]] * 3)})
        assert float((side * act).min()) > 0.3


def passes_engineering(method, make, losses):
    """Same seed, resume, capture, calls, no waiting, stacked seeds, acting, data of the stage."""
    by_step = lambda step: batch(seed=step)  # noqa: E731
    engineering.same_seed_same_run(make, by_step)
    engineering.resume_is_exact(make, by_step)
    engineering.updates_never_wait_for_the_device(make, by_step)
    engineering.captured_equals_written(make, by_step, updates=20)
    engineering.calls_stay_within_budget(method.__name__.rpartition(".")[2], make, by_step)
    stacked, b = make((3,)), batch((3,))
    for name in losses:
        value = getattr(stacked, name)(b)[0]
        assert value.shape == (3,)
        for i in range(3):
            single = make()
            engineering.copy_seed(stacked, single, i)
            alone = getattr(single, name)({key: v[i] for key, v in b.items()})[0]
            torch.testing.assert_close(value[i], alone, rtol=1e-5, atol=1e-5)
    act, _ = stacked.act({"obs": 100 * b["obs"], "goal": b["goal"]})
    assert act.shape == (3, 32, ACT)
    assert float(act.abs().max()) <= 1
    algo = method.make(make().config, Spec(2, 1), torch.Generator().manual_seed(0))
    (stage,) = method.stages(algo, toy((5, 3, 9)), Run(10))
    found = stage.start()(algo.generator)
    if "next_obs" in found:
        assert torch.equal(found["next_obs"][..., 0], found["obs"][..., 0] + 1)
    torch.testing.assert_close(found["act"][..., 0], found["obs"][..., 0] / 100)
    assert all(value.isfinite().all() for value in algo.update(found, 0).values())


def with_images(b, seed=0):
    """The batch with images for its states and goals."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, 256, (n, PIXELS), generator=g, dtype=torch.uint8)  # noqa: E731
    return {name: draw(len(v)) if v.shape[-1:] == (OBS,) else v for name, v in b.items()}


def passes_with_images(method, config, losses):
    """Resume and capture; each loss reaches the encoders of its own networks and no others.

    Args:
        losses: name of a loss -> the encoders that it moves.
    """
    config = replace(config, images=True)

    def make(seeds=()):
        return method.make(config, Spec(PIXELS, ACT), torch.Generator().manual_seed(0), seeds)

    by_step = lambda step: with_images(batch(size=4, seed=step), step)  # noqa: E731
    engineering.resume_is_exact(make, by_step, saved=1, stop=3)
    engineering.captured_equals_written(make, by_step, updates=4)
    algo, b = make(), by_step(1)
    sights = {name: getattr(algo, name).sight for names in losses.values() for name in names}
    for loss, names in losses.items():
        value = getattr(algo, loss)(b)[0]
        assert [name for name, sight in sights.items() if reaches(value, sight)] == names
    act, _ = algo.act({"obs": b["obs"].float(), "goal": b["goal"].float()})
    other, _ = algo.act({"obs": b["obs"].float(), "goal": b["goal"].float().flip(0)})
    assert act.shape == (4, ACT)
    assert not torch.equal(act, other)
    with pytest.raises(ValueError, match="encoders of images carry no seed axis"):
        make((3,))
    with pytest.raises(ValueError, match="needs RGB images of 64 x 64 pixels"):
        method.make(config, Spec(OBS, ACT), torch.Generator().manual_seed(0))
