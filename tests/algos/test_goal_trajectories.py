"""Two hundred updates of the goal-conditioned methods: captured, compiled, stacked."""

import pytest

from tests.algos import (
    engineering,
    goal_conditioned,
    test_crl,
    test_gcbc,
    test_gciql,
    test_gcivl,
    test_hiql,
    test_ota,
    test_qrl,
)

METHODS = {
    "ota": (test_ota.make, test_ota.batch),
    "hiql": (test_hiql.make, test_hiql.batch),
    "gcbc": (test_gcbc.make, goal_conditioned.batch),
    "gcivl": (test_gcivl.make, goal_conditioned.batch),
    "gciql": (test_gciql.make, goal_conditioned.batch),
    "qrl": (test_qrl.make, goal_conditioned.batch),
    "crl": (test_crl.make, goal_conditioned.batch),
}
every = pytest.mark.parametrize(("make", "batch"), METHODS.values(), ids=METHODS)
pytestmark = pytest.mark.slow  # shorter ones stand with each method


@every
def test_captured_updates_equal_written_ones(make, batch):
    engineering.captured_equals_written(make, lambda step: batch(seed=step))


@every
def test_every_seed_of_a_stacked_run_ends_where_its_own_run_does(make, batch, monkeypatch):
    engineering.stacked_run_equals_single_runs(make, batch, monkeypatch)


@every
def test_compiled_updates_follow_written_ones(make, batch):
    engineering.compiled_follows_written(make, lambda step: batch(seed=step))
