"""What tests of several methods share."""

import io
from collections import Counter
from copy import deepcopy
from functools import partial

import torch

from offrl.engine import state
from offrl.engine.capture.updates import Updates
from offrl.engine.method import turns_of
from tests.algos.cases import modules


def run(algo, batches, start=0, stop=30):
    """Updates start..stop-1; each algorithm draws its own noise from its generator."""
    for step in range(start, stop):
        algo.update(batches(step), turns_of(algo)(step))
    return algo


def tensors(algo):
    """Every tensor of the state, by path."""
    return dict(state.tensors(state.state_of(algo)))


def assert_equal(one, other):
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def read_back(saved):
    """A state as a file brings it back."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def sampler(batch, device="cpu"):
    """Draws rows of a batch, as a stage's sampler does."""
    fields = {name: value.to(device) for name, value in batch.items()}
    size = len(fields["act"])

    def sample(generator):
        rows = torch.randint(size, (size,), generator=generator, device=generator.device)
        return {name: value.index_select(0, rows) for name, value in fields.items()}

    return sample


def captured_equals_eager(make, batch, updates=30, tolerance=0.0, speed="graph"):
    """Eager and captured runs end in the same state, and report the same metrics.

    On a CPU in every bit; `make` builds on the device of its generator.
    """
    algos, found = (make(), make()), []
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    for algo, way in zip(algos, ("eager", speed), strict=True):
        said, sample = [], sampler(batch, algo.generator.device)
        made = Updates(algo.update, sample, turns_of(algo), algo, way, said.append)
        found.append([made(step) for step in range(updates)])
        assert not said, said
    close(*map(tensors, algos))
    for one, other in zip(*found, strict=True):
        close(one, other)


def stacked_run_equals_single_runs(make, batches, monkeypatch, updates, seeds=3):
    """Given weights, batches and noise, every seed of a stacked run goes as its own run does.

    Noise is the same in both: the n-th draw of a run depends on n and the last two axes only.
    """
    drawn = Counter()

    def normal_(self, mean=0.0, std=1.0, *, generator=None):
        drawn[id(generator)] += 1
        g = torch.Generator().manual_seed(drawn[id(generator)])
        return self.copy_(mean + std * torch.randn(self.shape[-2:], generator=g))

    stacked, singles = make(seeds=(seeds,)), [make(seeds=()) for _ in range(seeds)]
    for i, single in enumerate(singles):
        for _, p, q in matched(single, stacked):
            p.data.copy_(q[i])
    monkeypatch.setattr(torch.Tensor, "normal_", normal_)
    for step in range(updates):
        batch, turn = batches((seeds,), seed=step), turns_of(stacked)(step)
        found = stacked.update(batch, turn)
        for i, single in enumerate(singles):
            alone = single.update({name: value[i] for name, value in batch.items()}, turn)
            if step == 0:  # later ones may be far from smooth in the weights
                for name, value in alone.items():
                    torch.testing.assert_close(found[name][i], value, rtol=1e-5, atol=1e-5)
    for i, single in enumerate(singles):
        for name, p, q in matched(single, stacked):
            torch.testing.assert_close(q[i], p, rtol=0, atol=1e-6, msg=name)


def matched(one, other):
    """Parameters of the same place in two algorithms: name of their network, both."""
    for name, module in modules(one).items():
        parts = zip(module.parameters(), modules(other)[name].parameters(), strict=True)
        for p, q in parts:
            yield name, p, q


def apart(algo):
    """The algorithm with target networks unlike its online ones, as they are in mid-training."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, module in modules(algo).items():
            for p in module.parameters() if "target" in name else ():
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
        algo.update(b, turns_of(algo)(step))
        then(step)
    q = algo.estimate({"obs": torch.eye(3)[:2].repeat(32, 1)}, draw(g))
    torch.testing.assert_close(q, torch.tensor([0.5, 1.0]).repeat(32), atol=0.05, rtol=0)


def targets_follow(algo, batch, pairs, tau):
    """After an update that moves targets, target = (1 - tau) old + tau online."""
    before = {t: deepcopy(getattr(algo, t).state_dict()) for t, _ in pairs}
    algo.update(batch, max(map(turns_of(algo), range(2))))
    for target, online in pairs:
        online_state = getattr(algo, online).state_dict()
        for name, value in getattr(algo, target).state_dict().items():
            torch.testing.assert_close(
                value, (1 - tau) * before[target][name] + tau * online_state[name]
            )
