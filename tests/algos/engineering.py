"""Engineering tests that every algorithm must pass, called from each test_<name>.py."""

import json
import operator
import shutil
from collections import Counter
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offrl.engine.capture.recording import Recorder, Recording, waits
from offrl.engine.capture.updates import Updates
from offrl.engine.method import Stage


def run(algo, batches, start=0, stop=30):
    """Updates start..stop-1; each algorithm draws its own noise from its generator."""
    for step in range(start, stop):
        algo.update(batches(step), step)
    return algo


def tensors(algo):
    """Every tensor of the state, by path."""

    def walk(value, path):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, f"{path}.{key}")
        elif isinstance(value, (list, tuple)):
            for i, inner in enumerate(value):
                yield from walk(inner, f"{path}.{i}")
        elif isinstance(value, torch.Tensor):
            yield path, value

    return dict(walk(algo.state(), "state"))


def assert_equal(one, other):
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def same_seed_same_run(make, batches):
    assert_equal(run(make(), batches), run(make(), batches))


def resume_is_exact(make, batches, saved=13, stop=30):
    """Saved at 13 into a file and continued to 30 in a fresh object: bit-equal."""
    import io

    whole = run(make(), batches, stop=stop)
    first, file = run(make(), batches, stop=saved), io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = make()
    second.load(torch.load(file, weights_only=True))
    run(second, batches, start=saved, stop=stop)
    assert_equal(whole, second)
    draw = lambda algo: torch.rand(3, generator=algo.generator)  # noqa: E731
    assert torch.equal(draw(whole), draw(second))


def apart(algo):
    """The algorithm with target networks unlike its online ones, as they are in mid-training."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in algo.NAMES:
            if "target" in name:
                for p in getattr(algo, name).parameters():
                    p.add_(0.2 * torch.randn(p.shape, generator=g))
    return algo


def finds_the_value_of_a_chain(algo, draw, then=lambda step: None):
    """From state 0 the reward is 0 and state 1 follows; there it is 1 and the process ends.

    The discount is 0.5. `draw(generator)` makes 64 actions, `then` follows every update.
    """
    g = torch.Generator().manual_seed(0)
    for step in range(600):
        here = torch.randint(2, (64,), generator=g)
        b = {
            "obs": torch.nn.functional.one_hot(here, 3).float(),
            "act": draw(g),
            "reward": here.float(),
            "terminal": here.float(),
            "next_obs": torch.tensor([0.0, 1.0, 0.0]).expand(64, 3),
        }
        algo.update(b, step)
        then(step)
    q = algo.estimate({"obs": torch.eye(3)[:2].repeat(32, 1)}, draw(g))
    torch.testing.assert_close(q, torch.tensor([0.5, 1.0]).repeat(32), atol=0.05, rtol=0)


def seeds_do_not_touch_each_other(make_stacked, batches, module):
    """Disturbing the last of three seeds in `module` leaves the others bit-equal."""
    one, other = make_stacked((3,)), make_stacked((3,))
    with torch.no_grad():
        for p in getattr(other, module).parameters():
            p[2] *= 2
    run(one, batches, stop=6)
    run(other, batches, stop=6)
    changed = False
    for p, q in zip(one.actor.parameters(), other.actor.parameters(), strict=True):
        assert torch.equal(p[:2], q[:2])
        changed |= not torch.equal(p[2], q[2])
    assert changed


def copy_seed(stacked, single, i):
    """Give a single-seed algorithm the weights of seed i of a stacked one."""
    with torch.no_grad():
        for name in single.NAMES:
            target, source = getattr(single, name), getattr(stacked, name)
            if isinstance(target, torch.nn.Module) and name != "standardize":
                pairs = zip(target.parameters(), source.parameters(), strict=True)
                for p, q in pairs:
                    p.copy_(q[i])


def stacked_equals_single(make_stacked, batches, loss):
    """Seed i of a stacked loss and its gradient equal a single run's, given weights and batch.

    `loss(algo, batch)` returns (*S,) and must not draw random numbers.
    """
    stacked = make_stacked((3,))
    batch = batches((3,))
    value = loss(stacked, batch)
    grads = torch.autograd.grad(value.sum(), list(stacked.actor.parameters()), allow_unused=True)
    for i in range(3):
        single = make_stacked(())
        copy_seed(stacked, single, i)
        alone = loss(single, {name: v[i] for name, v in batch.items()})
        torch.testing.assert_close(value[i], alone, rtol=1e-5, atol=1e-6)
        alone_grads = torch.autograd.grad(alone, list(single.actor.parameters()), allow_unused=True)
        for g, h in zip(grads, alone_grads, strict=True):
            if h is not None:
                torch.testing.assert_close(g[i], h, rtol=1e-4, atol=1e-6)


def stacked_run_equals_single_runs(make, batches, monkeypatch, updates=200, seeds=3):
    """Given weights, batches and noise, every seed of a stacked run ends where its own run does.

    Noise is the same in both: the n-th draw of a run depends on n and the last two axes only.
    """
    drawn = Counter()

    def normal_(self, mean=0.0, std=1.0, *, generator=None):
        drawn[id(generator)] += 1
        g = torch.Generator().manual_seed(drawn[id(generator)])
        return self.copy_(mean + std * torch.randn(self.shape[-2:], generator=g))

    stacked, singles = make(seeds=(seeds,)), [make(seeds=()) for _ in range(seeds)]
    for i, single in enumerate(singles):
        copy_seed(stacked, single, i)
    monkeypatch.setattr(torch.Tensor, "normal_", normal_)
    for step in range(updates):
        batch = batches((seeds,), seed=step)
        stacked.update(batch, step)
        for i, single in enumerate(singles):
            single.update({name: value[i] for name, value in batch.items()}, step)
    for i, single in enumerate(singles):
        for name in single.NAMES:
            if isinstance(module := getattr(single, name), torch.nn.Module):
                both = zip(module.parameters(), getattr(stacked, name).parameters(), strict=True)
                for p, q in both:
                    torch.testing.assert_close(q[i], p, rtol=0, atol=1e-6, msg=name)


def targets_follow(algo, batch, pairs, tau):
    """After an update at a step that moves targets: target = (1 - tau) old + tau online."""
    before = {t: deepcopy(getattr(algo, t).state_dict()) for t, _ in pairs}
    algo.update(batch, algo.cycle - 1)
    for target, online in pairs:
        online_state = getattr(algo, online).state_dict()
        for name, value in getattr(algo, target).state_dict().items():
            torch.testing.assert_close(
                value, (1 - tau) * before[target][name] + tau * online_state[name]
            )


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not waits(func, args, kwargs or {}), str(func)
        return func(*args, **(kwargs or {}))


def updates_never_wait_for_the_device(make, batches):
    """A whole cycle of updates can be queued without the host reading a value."""
    algo = make()
    inputs = [batches(step) for step in range(algo.cycle)]
    with NoWaiting():
        for step, batch in enumerate(inputs):
            algo.update(batch, step)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        float(torch.ones(1))


def stage_of(algo, batches):
    """A stage whose sampler draws rows of `batches(0)`."""
    fields = {name: value.to(algo.generator.device) for name, value in batches(0).items()}
    size = len(fields["act"])

    def sample(generator):
        rows = torch.randint(size, (size,), generator=generator, device=generator.device)
        return {name: value.index_select(0, rows) for name, value in fields.items()}

    return Stage("train", None, lambda: sample, algo.update, algo.cycle), sample


def compiled_follows_written(make, batches, tolerance=1e-3):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++ on a CPU")
    captured_equals_written(make, batches, tolerance=tolerance, speed="compile")


def captured_equals_written(make, batches, updates=200, tolerance=0.0, speed="graph"):
    """Eager and captured runs end in the same state, and report the same metrics.

    On a CPU in every bit; `make` builds on the device of its generator.
    """
    algos, found = (make(), make()), []
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    for algo, way in zip(algos, ("eager", speed), strict=True):
        said, (stage, sample) = [], stage_of(algo, batches)
        run = Updates(stage, sample, algo.generator, way, said.append)
        found.append([run(step) for step in range(updates)])
        assert not said, said
    close(*map(tensors, algos))
    for one, other in zip(*found, strict=True):
        close(one, other)


def calls_stay_within_budget(name, make, batches):
    """A cycle of updates takes no more calls than budget.json allows: [as written, captured].

    As written these are operators, views included; captured, what a replay calls. The numbers do
    not depend on how fast the machine is: each call costs its microseconds.
    """
    algo = make()
    _, sample = stage_of(algo, batches)
    for step in range(2 * algo.cycle):  # the first cycles make the optimizer's state
        algo.update(sample(algo.generator), step)
    written = captured = 0
    for step in range(2 * algo.cycle, 3 * algo.cycle):
        work = lambda step=step: algo.update(sample(algo.generator), step)  # noqa: E731
        with Recorder() as recorder:
            work()
        written += len(recorder.calls)
    for step in range(3 * algo.cycle, 4 * algo.cycle):
        work = lambda step=step: algo.update(sample(algo.generator), step)  # noqa: E731
        captured += len(Recording(work).steps)
    allowed = json.loads(Path(__file__).with_name("budget.json").read_text())[name]
    found = [written, captured]
    assert all(map(operator.le, found, allowed)), (
        f"{name}: {found} calls per cycle of {algo.cycle}, allowed are {allowed}"
    )


def on_cuda_updates_never_wait(make, batches):
    """The same, as CUDA's own check sees it; `make` builds on the device of its generator."""
    algo = make()
    move = lambda batch: {name: value.cuda() for name, value in batch.items()}  # noqa: E731
    inputs = [move(batches(step)) for step in range(2 * algo.cycle)]
    for step in range(algo.cycle):  # the first cycle makes the optimizer's state
        algo.update(inputs[step], step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(algo.cycle, 2 * algo.cycle):
            algo.update(inputs[step], step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
