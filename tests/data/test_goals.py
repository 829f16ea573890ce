"""Goals against their definitions, on toy trajectories whose observation is the state's index."""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offrl import config
from offrl.data.goals import check_mixture, goal_stages, trajectories
from offrl.engine.method import Run, Spec, Task
from offrl.errors import DataError
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


def follows(left, right, law):
    """Pairs come with the probabilities of the law."""
    pairs, counts = np.unique(torch.stack([left, right], 1).numpy(), axis=0, return_counts=True)
    found = {(int(a), int(b)): int(n) / MANY for (a, b), n in zip(pairs, counts, strict=True)}
    assert found.keys() <= law.keys()
    for pair, p in law.items():
        assert abs(found.get(pair, 0.0) - p) < 0.005, pair


@pytest.mark.parametrize(("i", "n"), [(0, 2), (2, 1), (7, 5), (10, 4), (12, 20)])
def test_options_and_their_goals_follow_the_enumerated_law(states, i, n):
    start = torch.full((MANY,), i)
    end, goal = states.options(start, n, MIXTURE, 0.8, stream())
    follows(end, goal, enumerated(i, n, 0.8, MIXTURE))


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


@pytest.mark.parametrize("mixture", [(0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.3, 0.7)])
@pytest.mark.parametrize(("i", "k"), [(10, 3), (12, 20), (8, 2)])
def test_subgoals_stop_at_trajectory_goals_and_else_at_the_trajectorys_end(states, i, k, mixture):
    f, (_, within, random) = ENDS[i], mixture
    law = {(j, min(i + k, f)): random / len(ENDS) for j in ENDS}
    for j in range(i + 1, f + 1):  # the two end points have half the mass of the others
        mass = 1.0 if f == i + 1 else (0.5 if j in (i + 1, f) else 1.0) / (f - i - 1)
        law[j, min(i + k, j)] = law.get((j, min(i + k, j)), 0.0) + within * mass
    goal, target = states.subgoals(torch.full((MANY,), i), k, mixture, stream(1))
    follows(goal, target, {pair: p for pair, p in law.items() if p > 0})


def test_a_high_policys_goal_is_never_the_state_itself(states):
    with pytest.raises(ValueError, match="must begin with 0"):
        states.subgoals(states.anchors((4,), stream()), 3, (0.2, 0.8, 0.0), stream(1))


def test_states_and_actions_are_gathered_together(states):
    i = states.anchors((2, 50), stream())
    (obs, later), act = states.gather(i, states.ahead(i, 4))
    assert torch.equal(obs[..., 0], i.float())
    assert torch.equal(later[..., 0], torch.minimum(i + 4, states.last[i]).float())
    torch.testing.assert_close(act[..., 0], i / 100)


# --- what the methods draw ------------------------------------------------------------------------

ROWS = (500,) * 100
VALUE, POLICY = (0.2, 0.5, 0.3), (0.0, 0.6, 0.4)
GOALS = {  # of the fields of a batch: mixture, and median steps ahead; None for uniform ones
    "value_goal": (VALUE, 7),  # 0.9^7 < 1/2 < 0.9^6
    "low_goal": (VALUE, 7),
    "goal": (POLICY, None),
}


def drawn(name, **options):
    """A batch as indices of states, and the last state of every anchor's trajectory."""
    given = {"discount": 0.9, "value_goals": VALUE, "actor_goals": POLICY} | options
    method, spec = config.method(name), Spec(2, 1)
    known = {field.name for field in fields(method.config)}
    options = {key: value for key, value in given.items() if key in known}
    algo = method.make(method.config(hidden=(8,), batch=100_000, **options), spec, stream())
    b = method.stages(algo, Task(spec, toy(ROWS)), Run(1))[0].start()(stream())
    x = {name: v[:, 0].long() for name, v in b.items() if v.shape[-1] == 2}
    success = {name: v for name, v in b.items() if name.endswith("success")}
    return x | success, trajectories(toy(ROWS)).last[x["obs"]]


@pytest.mark.parametrize("name", ["gcbc", "gcivl", "gciql", "qrl", "crl", "hiql", "ota"])
def test_methods_draw_goals_by_their_mixtures_and_discount(name):
    x, last = drawn(name)
    i = x["obs"]
    for field in GOALS.keys() & x.keys():
        goal, ((current, _, random), median) = x[field], GOALS[field]
        same = (goal <= last) & (goal >= last - 500)
        assert abs(float((goal == i).double().mean()) - current) < 0.01
        assert abs(float((~same).double().mean()) - 0.99 * random) < 0.01
        ahead = same & (goal > i) & (last - i > 200)
        steps = (goal - i)[ahead]
        if median is None:
            assert abs(float((steps / (last - i)[ahead]).mean()) - 0.5) < 0.01
        elif name != "qrl":  # whose goals along the trajectory no task asks for
            assert float(steps.median()) == median
    if "value_goal" in x:
        assert torch.equal(x["next_obs"], i + 1)
        assert torch.equal(x["success"], (x["value_goal"] == i).float())


@pytest.mark.parametrize("name", ["hiql", "ota"])
def test_waypoints_and_subgoals_lie_as_many_steps_ahead_as_asked_for(name):
    x, last = drawn(name, subgoal_steps=7, option_steps=3)
    i, goal = x["obs"], x["goal"]
    assert torch.equal(x["waypoint"], torch.minimum(i + 7, last))
    random = (goal < i) | (goal > last)
    assert torch.equal(x["ahead"][random], x["waypoint"][random])
    hits = x["ahead"][~random] == torch.minimum(x["waypoint"], goal)[~random]
    assert float(hits.double().mean()) > 0.99  # but for random goals ahead on the trajectory


def test_ota_draws_options_and_their_goals_by_its_settings():
    x, last = drawn("ota", subgoal_steps=7, option_steps=3)
    i, end, goal = x["obs"], x["option_end"], x["high_goal"]
    random = (goal < i) | (goal > last)
    assert torch.equal(end[random], torch.minimum(i + 3, last)[random])
    assert bool((end <= torch.minimum(i + 3, last)).all())
    assert abs(float(random.double().mean()) - 0.3) < 0.01
    later = ~random & (goal > end) & (last - i > 200)
    assert float((goal - end)[later].median()) == 7  # the offset is not scaled by the option
    # the option's end as a goal, and goals of the trajectory within an option: 1 - 0.9^3
    share = float((goal == end).double().mean())
    assert abs(share - (0.2 + 0.5 * (1 - 0.9**3))) < 0.01
    for level, at, of in (("low", "low_goal", "obs"), ("high", "high_goal", "option_end")):
        assert torch.equal(x[f"{level}_success"], (x[at] == x[of]).float())


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", [(0.5, 0.5), (0.5, 0.6, 0.0), (1.2, -0.2, 0.0)])
def test_a_mixture_must_be_three_probabilities(mixture):
    with pytest.raises(ValueError, match="value_goals must be three probabilities"):
        check_mixture("value_goals", mixture)


def test_every_option_that_ends_in_goals_is_a_mixture():
    algo = SimpleNamespace(config=SimpleNamespace(batch=4, far_goals=(0.5, 0.5, 0.5)))
    with pytest.raises(ValueError, match="far_goals must be three probabilities"):
        goal_stages()(algo, Task(Spec(2, 1)), Run(steps=1))


def test_rows_that_do_not_follow_each_other_are_refused():
    data = toy(LENGTHS)
    data.fields["next_obs"][6] += 1
    with pytest.raises(DataError, match=r"1 rows inside of episodes, first in row 6"):
        trajectories(data)
