"""Scenarios in lock-step, on an environment whose rewards are its actions, and on a robot."""

import gymnasium
import numpy as np
import pytest
import torch

from offrl.engine.evaluate import Evaluator, Scenario, scenarios_of
from offrl.engine.method import Spec, Task
from offrl.envs.make import factory

STEPS = 5


class Mirror(gymnasium.Env):
    """Pays its action for STEPS steps; the observation is a number drawn at the reset."""

    observation_space = gymnasium.spaces.Box(-9, 9, (1,))
    action_space = gymnasium.spaces.Box(-9, 9, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.step_number, self.number = 0, self.np_random.normal(size=1)
        return self.number, {}

    def step(self, action):
        self.step_number += 1
        return self.number, float(action[0]), self.step_number == STEPS, False, {}


class Scripted:
    """Acts by a table (*S, scenarios), minus a tenth of the reward before; keeps what it sees."""

    def __init__(self, table):
        self.table, self.seen = torch.tensor(table), []

    def act(self, now, memory=None):
        self.seen.append(now)
        act = self.table.gather(-1, now["scenario"]) - now["reward"] / 10
        return act.unsqueeze(-1), memory


def wishes(*names):
    return scenarios_of(names, Mirror)


def earned(value):
    """Return of an episode whose first action is `value`; a reward is forgotten at a restart."""
    total, reward = 0.0, 0.0
    for _ in range(STEPS):
        reward = value - reward / 10
        total += reward
    return total


def test_every_scenario_is_played_apart_and_the_best_is_the_headline():
    policy = Scripted([1.0, 3.0, 2.0])
    player = Evaluator(Mirror, width=2, scenarios=wishes("low", "high", "middle"), headline="best")
    found = player(policy, 2)
    assert player.total(2) == 6
    for name, value in (("low", 1.0), ("high", 3.0), ("middle", 2.0)):
        torch.testing.assert_close(found[f"return/{name}"], torch.full((2,), earned(value)))
    torch.testing.assert_close(found["return"], torch.full((2,), earned(3.0)))
    assert found["length"].tolist() == [STEPS, STEPS]
    names = ["", "/low", "/high", "/middle"]
    assert list(found) == [f"{key}{name}" for name in names for key in ("return", "length")]


def test_each_seed_has_its_own_best_scenario():
    policy = Scripted([[1.0, 3.0], [5.0, 2.0]])
    player = Evaluator(Mirror, seeds=(2,), width=2, scenarios=wishes("a", "b"), headline="best")
    found = player(policy, 2)
    expected = torch.tensor([[earned(3.0)] * 2, [earned(5.0)] * 2])
    torch.testing.assert_close(found["return"], expected)
    assert found["return/a"].shape == (2, 2)


def test_all_scenarios_are_one_batch_from_the_same_starts():
    policy = Scripted([1.0, 3.0])
    Evaluator(Mirror, width=3, scenarios=wishes("a", "b"))(policy, 3)
    assert len(policy.seen) == STEPS
    first, second = policy.seen[:2]
    assert first["scenario"].tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(first["obs"][:3], first["obs"][3:])
    assert len(set(first["obs"][:3, 0].tolist())) == 3
    assert first["start"].tolist() == [1.0] * 6
    assert second["start"].tolist() == [0.0] * 6
    assert second["reward"].tolist() == [1.0] * 3 + [3.0] * 3


def test_a_policy_without_scenarios_is_scored_once():
    found = Evaluator(Mirror, width=2)(Scripted([2.0]), 4)
    assert list(found) == ["return", "length"]
    assert found["return"].shape == (4,)
    # the reward before a restart is told as it was; `start` says that it is of no use any more
    assert found["return"][0] == pytest.approx(earned(2.0))


def test_start_states_do_not_depend_on_the_number_of_scenarios():
    one, many = Scripted([1.0]), Scripted([1.0, 1.0])
    Evaluator(Mirror, width=2, seed=7)(one, 2)
    Evaluator(Mirror, width=2, seed=7, scenarios=wishes("a", "b"))(many, 2)
    np.testing.assert_array_equal(one.seen[0]["obs"], many.seen[0]["obs"][:2])


def test_the_headline_is_of_the_scenarios_that_it_names():
    policy, names = Scripted([[1.0, 3.0], [5.0, 2.0]]), wishes("a", "b")
    for headline, expected in (
        ("all", [[1.0, 1.0, 3.0, 3.0], [5.0, 5.0, 2.0, 2.0]]),
        ("first", [[1.0, 1.0], [5.0, 5.0]]),
        ("best", [[3.0, 3.0], [5.0, 5.0]]),
    ):
        player = Evaluator(Mirror, (2,), 2, scenarios=names, headline=headline)
        expected = [[earned(value) for value in row] for row in expected]
        torch.testing.assert_close(player(policy, 2)["return"], torch.tensor(expected))


class Hopping:
    """A fixed linear policy, which estimates that nothing is paid."""

    class config:
        discount = 0.9

    weight = torch.randn(11, 3, generator=torch.Generator().manual_seed(3))

    def act(self, now, memory=None):
        noise = torch.rand(*now["obs"].shape[:-1], 3, generator=now["generator"])
        noise = noise * 2 - 1 if now["explore"] else torch.zeros_like(noise)
        return (now["obs"] @ self.weight).tanh() + noise, memory

    def estimate(self, now, act):
        return torch.zeros(now["obs"].shape[:-1])


SWEEP = [
    Scenario("nominal"),
    Scenario("heavy", settings={"mass": 1.5}),
    Scenario("slippery", settings={"friction": 0.3, "mass": 0.8}),
]


def test_every_world_of_a_sweep_is_played_as_if_it_were_the_only_one():
    make = factory("hopper")
    found = Evaluator(make, width=2, seed=1, scenarios=SWEEP, headline="first")(Hopping(), 4)
    for scenario in SWEEP:
        alone = Evaluator(make, width=2, seed=1, scenarios=[scenario])(Hopping(), 4)
        for key in ("return", "length", "bias"):
            assert torch.equal(found[f"{key}/{scenario.name}"], alone[key])
    plain = Evaluator(make, width=2, seed=1)(Hopping(), 4)
    assert all(torch.equal(found[key], value) for key, value in plain.items())
    assert len({float(found[f"return/{s.name}"].mean()) for s in SWEEP}) == 3


def test_a_policy_explores_where_it_is_told_to_and_draws_the_same_again():
    player = Evaluator(factory("hopper"), width=2)
    still, one, two = (player(Hopping(), 2, explore=flag)["return"] for flag in (False, True, True))
    assert torch.equal(one, two)
    assert not torch.equal(one, still)


class Counter:
    """Acts by the number of steps since its row's episode began, which it has to remember."""

    def act(self, now, memory=None):
        assert not torch.is_grad_enabled()
        past = torch.zeros_like(now["start"]) if memory is None else memory["steps"]
        steps = torch.where(now["start"].bool(), 0.0, past + 1)
        return steps.unsqueeze(-1), {"steps": steps}


class Uneven(Mirror):
    """Episodes of one to five steps."""

    def step(self, action):
        *found, _, cut, info = super().step(action)
        return *found, self.step_number > abs(self.number[0]) * 2 or found[1] == 4, cut, info


def test_the_memory_of_each_row_lasts_for_an_episode():
    found = Evaluator(Uneven, seeds=(2,), width=2, scenarios=wishes("a", "b"))(Counter(), 6)
    lengths = found["length"]
    assert len(lengths.unique()) > 1
    assert torch.equal(found["return"], lengths * (lengths - 1) / 2)  # 0 + 1 + 2 ...


def test_a_task_may_be_scored_on_logged_rows():
    """A function of the task is an evaluation: no environment, a headline of its own."""
    generator = torch.Generator().manual_seed(0)
    rows = {"obs": torch.randn(50, 11, generator=generator), "reward": torch.rand(50)}

    def weighed(algo, episodes):
        act, _ = algo.act({"obs": rows["obs"], "explore": False, "generator": generator})
        weight = (act * Hopping.weight.mean(0)).sum(-1).exp()
        return {"estimate": weight * rows["reward"] / weight.mean(), "weight": weight}

    task = Task(Spec(11, 3), data=rows, evaluate=weighed, headline="estimate")
    found = task.evaluate(Hopping(), 10)
    assert found[task.headline].shape == (50,)
    expected = (found["weight"] * rows["reward"]).sum() / found["weight"].sum()
    assert float(found[task.headline].mean()) == pytest.approx(float(expected))
    rolled = Task(Spec(11, 3), evaluate=Evaluator(factory("hopper"), width=1))
    assert rolled.evaluate(Hopping(), 1)[rolled.headline].shape == (1,)
