"""What a capture takes for granted is found wherever it is."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from offrl.engine.capture.watch import Watch
from offrl.engine.optim import adam


@dataclass(frozen=True)
class Config:
    lr: float = 0.1


class Rows:
    """A part of a stage, which is saved with it."""

    def __init__(self):
        self.kept = 0

    def save(self, place): ...

    def load(self, state, place): ...


class Method:
    def __init__(self):
        self.config, self.generator = Config(), torch.Generator()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        self.opt = adam(self.net, 0.1)
        self.parts, self.pair = [SimpleNamespace(count=0), torch.zeros(1)], (1, "a")
        self.itself, self.rows = self, Rows()


def moved(algo):
    for p in algo.net.parameters():
        p.grad = torch.ones_like(p)
    algo.opt.step()


def test_all_tensors_and_generators_are_found_once():
    algo = Method()
    moved(algo)
    watch = Watch(algo)
    parameters = list(algo.net.parameters())
    averages = [x for state in algo.opt.state.values() for x in state.values()]
    expected = [*parameters, *averages, *algo.net.buffers(), algo.parts[1]]
    assert len(watch.tensors) == len(expected)
    assert {id(x) for x in watch.tensors} == {id(x) for x in expected}
    assert watch.generators == [algo.generator]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: setattr(m.parts[0], "count", 1), "Method.parts[0].count changes"),
        (lambda m: setattr(m.rows, "kept", 1), "Method.rows.kept changes"),
        (lambda m: setattr(m, "pair", (1, "b")), "Method.pair changes"),
        (lambda m: setattr(m, "pair", None), "Method.pair changes"),
        (lambda m: setattr(m.net[1], "momentum", 0.2), "Method.net.1.momentum changes"),
        (lambda m: setattr(m.net[1], "eps", True), "Method.net.1.eps changes"),
        (lambda m: setattr(m, "config", Config()), "Method.config is replaced"),
        (lambda m: setattr(m.net, "0", torch.nn.Linear(2, 2)), "Method.net.0 is replaced"),
        (lambda m: m.parts.append(2), "the length of Method.parts changes"),
        (lambda m: m.net[1].register_buffer("more", torch.ones(1)), "the length of Method.net.1"),
        (lambda m: m.opt.param_groups[0].pop("eps"), "the length of Method.opt.param_groups[0]"),
        (lambda m: delattr(m, "pair"), "'pair' is removed"),
        (lambda m: m.opt.state.clear(), "Method.opt.state[0] is replaced"),
    ],
)
def test_a_change_is_told_by_name(change, told):
    algo = Method()
    moved(algo)
    watch = Watch(algo)
    assert watch.changes() is None
    change(algo)
    assert watch.changes().startswith(told)


def test_training_itself_is_no_change():
    """Nor is what another turn adds: the state of its optimizer, attributes of its own."""
    algo = Method()
    watch = Watch(algo)
    moved(algo)
    algo.later, algo.pair = 1, (1, "".join(["a"]))
    algo.net[1](torch.ones(3, 2))
    assert watch.changes() is None
