"""The state of an algorithm, found on the object."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offrl.engine.state import load_state, state_of


class Holder:
    """Plain values in containers that other code holds too."""

    def __init__(self):
        self.counts, self.rows, self.pair = defaultdict(int), [torch.zeros(2)], (1, torch.zeros(2))
        self.generator = torch.Generator()


def test_containers_are_filled_in_place():
    one, two = Holder(), Holder()
    one.counts["seen"] += 3
    one.rows.append(torch.ones(2))
    one.pair[1].fill_(5)
    counts, rows = two.counts, two.rows
    load_state(two, state_of(one))
    assert two.counts is counts
    assert two.rows is rows
    counts["new"] += 1  # still a dict with a default
    assert counts == {"seen": 3, "new": 1}
    assert torch.equal(rows[1], torch.ones(2))
    assert torch.equal(two.pair[1], torch.full((2,), 5.0))
    assert isinstance(two.pair, tuple)


def test_what_has_no_place_yet_comes_to_the_device_of_the_generator():
    one = SimpleNamespace(best=torch.ones(2), seen=[torch.ones(2)], sums={"a": torch.ones(2)})
    elsewhere = SimpleNamespace(device=torch.device("meta"))
    two = SimpleNamespace(generator=elsewhere, best=None, seen=[], sums={})
    load_state(two, {"generator": {}} | state_of(one))
    assert {x.device.type for x in (two.best, *two.seen, *two.sums.values())} == {"meta"}


def test_a_value_that_no_checkpoint_would_give_back_is_refused_with_its_name():
    holder = Holder()
    holder.best = np.float64(1.5)  # a float by its class, an object in a file
    with pytest.raises(ValueError, match=r"Holder\.best is a float64"):
        state_of(holder)


class Counting(torch.nn.Module):
    """Keeps a count and a mean in plain attributes, one of them in a module within."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)
        self.seen, self.inner.mean = 0, torch.zeros(2)


def test_what_modules_hold_unregistered_is_state():
    one, two = Holder(), Holder()
    one.net, two.net = Counting(), Counting()
    one.net.seen = 7
    one.net.inner.mean += 3
    mean = two.net.inner.mean
    load_state(two, state_of(one))
    assert two.net.seen == 7
    assert two.net.inner.mean is mean
    assert torch.equal(mean, torch.full((2,), 3.0))
    assert torch.equal(two.net.inner.weight, one.net.inner.weight)
