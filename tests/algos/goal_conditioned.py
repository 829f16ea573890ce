"""Batches of the goal-conditioned baselines, and what each of them must pass."""

import torch

from offrl.engine.stage import Run, Spec
from tests.algos import engineering
from tests.data.trajectories import toy

OBS, ACT = 3, 2


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


def grads(loss, module):
    """Largest gradient entry of every parameter, None where there is no path."""
    found = torch.autograd.grad(
        loss.sum(), list(module.parameters()), allow_unused=True, retain_graph=True
    )
    return [None if g is None else float(g.abs().max()) for g in found]


def reaches(loss, module):
    return any(grads(loss, module))


def passes_engineering(method, make, losses):
    """Same seed, resume, no waiting, stacked seeds, acting within bounds, data of the stage."""
    by_step = lambda step: batch(seed=step)  # noqa: E731
    engineering.same_seed_same_run(make, by_step)
    engineering.resume_is_exact(make, by_step)
    engineering.updates_never_wait_for_the_device(make, by_step)
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
