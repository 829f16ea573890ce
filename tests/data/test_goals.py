"""Goals against their definitions, on toy trajectories whose observation is the state's index."""

import numpy as np
import pytest
import torch

from offrl.data import DataError
from offrl.data.goals import check_mixture, trajectories
from tests.data.trajectories import layout, toy

LENGTHS = (5, 3, 9)
ENDS = layout(LENGTHS)
MIXTURE = (0.2, 0.5, 0.3)
MANY = 200_000


@pytest.fixture
def states():
    return trajectories(toy(LENGTHS))


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def frequencies(values, support):
    """Share of every value of the support; nothing else may occur."""
    counts = {
        int(v): int(c) for v, c in zip(*np.unique(values.numpy(), return_counts=True), strict=True)
    }
    assert counts.keys() <= set(support), counts
    return np.array([counts.get(v, 0) for v in support]) / len(values)


def test_every_state_knows_its_observation_action_and_last_state(states):
    every = torch.arange(sum(LENGTHS) + len(LENGTHS))
    found = states.rows(every)
    assert torch.equal(found["obs"][:, 0], every.float())
    assert [int(i) for i in states.valid] == sorted(ENDS)
    assert {int(i): int(states.last[i]) for i in states.valid} == ENDS
    assert all(states.last[f] == f for f in set(ENDS.values()))
    acts = {int(i): float(a) for i, a in zip(every, found["act"][:, 0], strict=True)}
    assert all(abs(acts[i] - (i / 100 if i in ENDS else 0)) < 1e-6 for i in acts)


def test_anchors_are_uniform_over_states_with_a_transition(states):
    share = frequencies(states.anchors((MANY,), stream()), sorted(ENDS))
    np.testing.assert_allclose(share, 1 / len(ENDS), atol=0.003)


def test_geometric_goals_have_the_law_of_their_definition(states):
    gamma, i = 0.8, 9 + 1  # the first state of the last trajectory, f = 19
    goals = states.geometric(torch.full((MANY,), i), gamma, stream())
    steps = np.arange(1, 10)
    law = (1 - gamma) * gamma ** (steps - 1)
    law[-1] = gamma**8  # whoever would go further stops at the end
    np.testing.assert_allclose(frequencies(goals, i + steps), law, atol=0.004)


def test_geometric_offsets_average_to_the_horizon_before_the_end():
    far = trajectories(toy((4000,)))
    goals = far.geometric(torch.zeros(MANY, dtype=torch.long), 0.99, stream())
    assert abs(float(goals.double().mean()) - 100) < 1


def test_end_points_of_uniform_goals_have_half_the_mass_of_the_others(states):
    i = 9 + 1
    goals = states.uniform(torch.full((MANY,), i), stream())
    law = np.array([0.5, *[1.0] * 7, 0.5]) / 8
    np.testing.assert_allclose(frequencies(goals, range(i + 1, i + 10)), law, atol=0.003)


@pytest.mark.parametrize("discount", [None, 0.7])
def test_sources_of_goals_have_the_probabilities_of_the_mixture(discount):
    far = trajectories(toy((1000,) * 20))
    i = far.anchors((MANY,), stream())
    goal = far.goals(i, MIXTURE, stream(1), discount)
    current, crossed = goal == i, far.last[goal] != far.last[i]
    assert abs(float(current.double().mean()) - 0.2) < 0.005
    assert abs(float(crossed.double().mean()) - 0.3 * 19 / 20) < 0.005
    within = ~current & ~crossed
    assert abs(float(within.double().mean()) - (0.5 + 0.3 / 20)) < 0.005


def test_no_goal_leaves_its_trajectory_or_goes_back_unless_it_is_random(states):
    i = states.anchors((20_000,), stream())
    for discount in (None, 0.9):
        goal = states.goals(i, (0.3, 0.7, 0.0), stream(1), discount)
        assert bool((goal >= i).all())
        assert torch.equal(states.last[goal], states.last[i])
    assert set(states.goals(i, (0.0, 0.0, 1.0), stream(2)).tolist()) == set(ENDS)
    assert torch.equal(states.goals(i, (1.0, 0.0, 0.0), stream(3)), i)


# --- options -------------------------------------------------------------------------------------


def enumerated(i, n, gamma, mixture):
    """The law of (end, goal) of an option that starts in i, by adding up every case."""
    f, (current, trajectory, _) = ENDS[i], mixture
    law = {}

    def add(end, goal, p):
        law[end, goal] = law.get((end, goal), 0.0) + p

    within = trajectory / (1 - current)
    steps = {min(i + g, f): 0.0 for g in range(1, f - i + 1)}
    for g in range(1, 2000):
        steps[min(i + g, f)] += (1 - gamma) * gamma ** (g - 1)
    for j, p in steps.items():
        end = min(i + n, j)
        add(end, j, within * p * (1 - current))
        add(end, end, within * p * current)
    end = min(i + n, f)
    for j in ENDS:
        add(end, j, (1 - within) / len(ENDS) * (1 - current))
    add(end, end, (1 - within) * current)
    return law


@pytest.mark.parametrize(("i", "n"), [(0, 2), (2, 1), (7, 5), (10, 4), (12, 20)])
def test_options_and_their_goals_follow_the_enumerated_law(states, i, n):
    start = torch.full((MANY,), i)
    end, goal = states.options(start, n, MIXTURE, 0.8, stream())
    law = enumerated(i, n, 0.8, MIXTURE)
    found = {}
    for pair, count in zip(
        *np.unique(torch.stack([end, goal], 1).numpy(), axis=0, return_counts=True), strict=True
    ):
        found[tuple(int(v) for v in pair)] = int(count) / MANY
    assert found.keys() <= law.keys()
    for pair, p in law.items():
        assert abs(found.get(pair, 0.0) - p) < 0.005, pair


def test_options_end_within_their_length_and_trajectory(states):
    i = states.anchors((20_000,), stream())
    for n in (1, 3, 50):
        end, _ = states.options(i, n, MIXTURE, 0.9, stream(n))
        assert bool((end > i).all())
        assert bool((end <= torch.minimum(i + n, states.last[i])).all())


def test_an_option_as_long_as_the_trajectory_reaches_every_goal_on_it(states):
    i = states.anchors((20_000,), stream())
    end, goal = states.options(i, 100, (0.2, 0.8, 0.0), 0.9, stream(1))
    # the smoothing 1e-6 of the published sampler leaves one draw in a million random
    assert float((end == goal).double().mean()) > 0.9999


# --- the high-level actor ------------------------------------------------------------------------


def test_subgoals_of_trajectory_goals_stop_at_the_goal(states):
    i = states.anchors((20_000,), stream())
    goal, target = states.subgoals(i, 3, (0.0, 1.0, 0.0), stream(1))
    assert torch.equal(target, torch.minimum(i + 3, goal))
    assert bool((goal > i).all())


def test_subgoals_of_random_goals_stop_at_the_trajectorys_end(states):
    i = states.anchors((20_000,), stream())
    goal, target = states.subgoals(i, 3, (0.0, 0.0, 1.0), stream(1))
    assert torch.equal(target, states.ahead(i, 3))
    assert set(goal.tolist()) == set(ENDS)


def test_a_high_policys_goal_is_never_the_state_itself(states):
    with pytest.raises(ValueError, match="must begin with 0"):
        states.subgoals(states.anchors((4,), stream()), 3, (0.2, 0.8, 0.0), stream(1))


def test_states_and_actions_are_gathered_together(states):
    i = states.anchors((2, 50), stream())
    (obs, later), act = states.gather(i, states.ahead(i, 4))
    assert torch.equal(obs[..., 0], i.float())
    assert torch.equal(later[..., 0], torch.minimum(i + 4, states.last[i]).float())
    torch.testing.assert_close(act[..., 0], i / 100)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", [(0.5, 0.5), (0.5, 0.6, 0.0), (1.2, -0.2, 0.0)])
def test_a_mixture_must_be_three_probabilities(mixture):
    with pytest.raises(ValueError, match="value_goals must be three probabilities"):
        check_mixture("value_goals", mixture)


def test_rows_that_do_not_follow_each_other_are_refused():
    data = toy(LENGTHS)
    data.fields["next_obs"][6] += 1
    with pytest.raises(DataError, match=r"1 rows inside of episodes, first in row 6"):
        trajectories(data)
