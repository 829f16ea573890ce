"""The state of an algorithm, found on the object."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from offrl.engine.state import load_state, state_of


class Holder:
    """Plain values in containers that other code holds too."""

    def __init__(self):
        self.counts, self.rows, self.pair = defaultdict(int), [torch.zeros(2)], (1, torch.zeros(2))


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


def test_a_value_that_no_checkpoint_would_give_back_is_refused_with_its_name():
    holder = Holder()
    holder.best = np.float64(1.5)  # a float by its class, an object in a file
    with pytest.raises(TypeError, match=r"Holder\.best is a float64"):
        state_of(holder)
