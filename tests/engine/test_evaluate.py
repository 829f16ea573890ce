"""Scenarios in lock-step, on an environment whose rewards are its actions."""

import gymnasium
import numpy as np
import pytest
import torch

from offrl.engine.evaluate import Evaluator

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

    def act(self, now, memory=None, explore=False, generator=None):
        self.seen.append(now)
        act = self.table.gather(-1, now["scenario"]) - now["reward"] / 10
        return act.unsqueeze(-1), memory


def earned(value):
    """Return of an episode whose first action is `value`; a reward is forgotten at a restart."""
    total, reward = 0.0, 0.0
    for _ in range(STEPS):
        reward = value - reward / 10
        total += reward
    return total


def test_every_scenario_is_played_apart_and_the_best_is_the_headline():
    policy = Scripted([1.0, 3.0, 2.0])
    found = Evaluator(Mirror, width=2, scenarios=("low", "high", "middle"))(policy, 2)
    for name, value in (("low", 1.0), ("high", 3.0), ("middle", 2.0)):
        torch.testing.assert_close(found.scenarios[name].returns, torch.full((2,), earned(value)))
    torch.testing.assert_close(found.returns, torch.full((2,), earned(3.0)))
    assert found.lengths.tolist() == [STEPS, STEPS]
    assert list(found.named()) == [
        "return",
        "length",
        "return/low",
        "length/low",
        "return/high",
        "length/high",
        "return/middle",
        "length/middle",
    ]


def test_each_seed_has_its_own_best_scenario():
    policy = Scripted([[1.0, 3.0], [5.0, 2.0]])
    found = Evaluator(Mirror, seeds=(2,), width=2, scenarios=("a", "b"))(policy, 2)
    expected = torch.tensor([[earned(3.0)] * 2, [earned(5.0)] * 2])
    torch.testing.assert_close(found.returns, expected)
    assert found.scenarios["a"].returns.shape == (2, 2)


def test_all_scenarios_are_one_batch_from_the_same_starts():
    policy = Scripted([1.0, 3.0])
    Evaluator(Mirror, width=3, scenarios=("a", "b"))(policy, 3)
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
    assert found.scenarios == {}
    assert list(found.named()) == ["return", "length"]
    assert found.returns.shape == (4,)
    # the reward before a restart is told as it was; `start` says that it is of no use any more
    assert found.returns[0] == pytest.approx(earned(2.0))


def test_start_states_do_not_depend_on_the_number_of_scenarios():
    one, many = Scripted([1.0]), Scripted([1.0, 1.0])
    Evaluator(Mirror, width=2, seed=7)(one, 2)
    Evaluator(Mirror, width=2, seed=7, scenarios=("a", "b"))(many, 2)
    np.testing.assert_array_equal(one.seen[0]["obs"], many.seen[0]["obs"][:2])
