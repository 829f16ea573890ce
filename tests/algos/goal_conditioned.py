"""Batches of the goal-conditioned baselines, and what each of them must pass."""

from dataclasses import replace

import pytest
import torch

from offrl.engine.stage import Run, Spec
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


def grads(loss, module):
    """Largest gradient entry of every parameter, None where there is no path."""
    found = torch.autograd.grad(
        loss.sum(), list(module.parameters()), allow_unused=True, retain_graph=True
    )
    return [None if g is None else float(g.abs().max()) for g in found]


def reaches(loss, module):
    return any(grads(loss, module))


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


def image_batch(seed=1, size=4):
    """The same with images for states and goals."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randint(0, 256, (size, PIXELS), generator=g, dtype=torch.uint8)  # noqa: E731
    states = ("obs", "next_obs", "value_goal", "goal")
    return batch(size=size, seed=seed) | {name: draw() for name in states}


def passes_with_images(method, config, losses):
    """Resume and capture; each loss reaches the encoders of its own networks and no others.

    Args:
        losses: name of a loss -> the encoders that it moves.
    """
    config = replace(config, images=True)

    def make(seeds=()):
        return method.make(config, Spec(PIXELS, ACT), torch.Generator().manual_seed(0), seeds)

    by_step = lambda step: image_batch(step)  # noqa: E731
    engineering.resume_is_exact(make, by_step, saved=1, stop=3)
    engineering.captured_equals_written(make, by_step, updates=4)
    algo, b = make(), image_batch()
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
