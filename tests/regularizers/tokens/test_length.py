import doctest
import math
import pickle

import pytest
import torch

from offrl.regularizers import Compose, LengthShaper, PromptHistory, RegInputs
from offrl.regularizers.tokens import length
from offrl.regularizers.tokens.length import (
    FORMULAS,
    cosine,
    curriculum,
    grpo_lambda,
    hapo,
    kimi,
    levels,
    overlong,
    truncate,
    truncate_adaptive,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(rows=24, groups=6, seed=0):
    """Rows of groups in no order, every group with 4 rows."""
    g = generator(seed)
    order = torch.randperm(rows, generator=g)
    return RegInputs(
        rewards=torch.rand(rows, generator=g),
        lengths=torch.randint(1, 500, (rows,), generator=g),
        correct=torch.rand(rows, generator=g) > 0.4,
        finished=torch.rand(rows, generator=g) > 0.2,
        group=(torch.arange(rows) % groups)[order],
        prompt_id=(torch.arange(rows) % groups)[order],
        level=torch.randint(0, 3, (rows,), generator=g),
    )


def test_docstring_examples():
    assert doctest.testmod(length).failed == 0


# -- formulas -------------------------------------------------------------------------------------


def test_truncation_takes_the_reward_of_what_is_cut_or_too_long():
    rewards, lengths = torch.tensor([1.0, 1.0, 0.5, 0.0]), torch.tensor([4000, 4001, 10, 10])
    finished = torch.tensor([True, True, False, True])
    assert (rewards + truncate(rewards, lengths, finished)).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_easy_groups_get_the_shorter_limit():
    lengths, correct = torch.tensor([3000] * 4), torch.tensor([True, True, True, False])
    group, finished = torch.tensor([1, 0, 1, 0]), torch.ones(4, dtype=torch.bool)
    change = truncate_adaptive(torch.ones(4), lengths, finished, correct, group)
    assert change.tolist() == [-1.0, 0.0, -1.0, 0.0]  # half of group 0 is not more than half


def test_hapo_at_its_landmarks():
    h = torch.full((4,), 100.0)
    yes, no = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    lengths = torch.tensor([0, 100, 200, 900])
    torch.testing.assert_close(hapo(lengths, yes, h), torch.tensor([1, 0, -0.7, -0.7]))
    torch.testing.assert_close(hapo(lengths, no, h), torch.tensor([0, 0, -1.0, -1.0]))


def test_hapo_without_history_changes_nothing():
    none = torch.full((2,), torch.inf)
    assert hapo(torch.tensor([5, 900]), torch.tensor([True, False]), none).tolist() == [0.0, 0.0]
    x = batch()
    out = LengthShaper("hapo", history=PromptHistory(6))(x)
    assert torch.equal(out.rewards, x.rewards)


def test_kimi_has_no_opinion_on_equal_lengths():
    lengths, correct = torch.tensor([7, 7, 3]), torch.tensor([True, False, True])
    assert kimi(lengths, correct, torch.tensor([0, 0, 1])).tolist() == [0.0, 0.0, 0.0]


def test_only_the_best_groups_are_shortened():
    group = torch.tensor([4, 2, 4, 2, 0, 0, 1, 1, 3, 3])
    correct = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 0, 1]).bool()
    lengths = torch.tensor([10, 50, 30, 60, 10, 10, 10, 10, 10, 10])
    change = grpo_lambda(lengths, correct, group)  # one of five groups: group 4
    expected = torch.zeros(10)
    expected[0], expected[2] = (-0.2 / (1 + math.exp(-z)) for z in (-1.0, 1.0))
    torch.testing.assert_close(change, expected, atol=1e-6, rtol=0)
    more = grpo_lambda(lengths, correct, group, share=0.4)  # of equal groups the lowest id
    torch.testing.assert_close(more[6], torch.tensor(-0.1))
    assert more[[3, 9]].tolist() == [0.0, 0.0]
    assert not grpo_lambda(lengths, correct, group, share=0.0).any()
    assert torch.equal(grpo_lambda(lengths, correct, group, share=1.0) < 0, correct)


def test_levels_punish_only_what_exceeds_the_level():
    level = torch.tensor([0, 1, 1, 1, 7, -1])
    found = levels(torch.tensor([100, 100, 300, 900, 900, 900]), level, targets=(50, 200))
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, -0.5, -1.0, 0.0, 0.0]))


def test_overlong_without_a_buffer_is_a_step():
    assert overlong(torch.tensor([10, 11]), max_length=10, buffer=0).tolist() == [0.0, -1.0]


def test_cosine_runs_between_its_ends_and_stays_there():
    lengths = torch.tensor([0, 100, 250])
    yes, no = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    torch.testing.assert_close(cosine(lengths, yes, max_length=100), torch.tensor([1, 0.5, 0.5]))
    torch.testing.assert_close(cosine(lengths, no, max_length=100), torch.tensor([-1, -0.5, -0.5]))


def test_no_formula_with_a_floor_ranks_correct_below_wrong():
    rows = 200
    lengths = torch.randint(1, 500, (rows,), generator=generator())
    correct = torch.rand(rows, generator=generator(1)) > 0.5
    group = torch.randint(0, 20, (rows,), generator=generator(2))
    history = torch.randint(1, 500, (20,), generator=generator(3)).float()[group]
    for change in (
        hapo(lengths, correct, history),
        kimi(lengths, correct, group),
        grpo_lambda(lengths, correct, group, share=1.0),
        cosine(lengths, correct, max_length=300),
    ):
        shaped = correct.float() + change
        assert shaped[correct].min() > shaped[~correct].max()


# -- groups ---------------------------------------------------------------------------------------

KINDS = {
    "truncate_adaptive": dict(max_length=300, easy_length=100),
    "grpo_lambda": dict(share=0.5),
    "kimi": {},
}


@pytest.mark.parametrize("kind", ["truncate_adaptive", "kimi"])
def test_shaping_of_groups_equals_a_loop_over_groups(kind):
    shaper, x = LengthShaper(kind, **KINDS[kind]), batch()
    whole = shaper(x).rewards
    for g in range(6):
        rows = [i for i in range(24) if x.group[i] == g]
        part = RegInputs(
            **{n: getattr(x, n)[rows] for n in ("rewards", "lengths", "correct", "finished")}
        )
        part.group = torch.zeros(len(rows), dtype=torch.int64)
        torch.testing.assert_close(shaper(part).rewards, whole[rows])


def test_grpo_lambda_equals_a_loop_over_groups():
    x = batch()
    ratio = {g: x.correct[x.group == g].float().mean().item() for g in range(6)}
    best = sorted(range(6), key=lambda g: (-ratio[g], g))[:3]
    expected = torch.zeros(24)
    for g in best:
        mine = (x.group == g) & x.correct
        own = x.lengths[mine].float()
        z = (own - own.mean()) / (own.std(correction=0) + 1e-6)
        expected[mine] = -0.2 * torch.sigmoid(z)
    torch.testing.assert_close(grpo_lambda(x.lengths, x.correct, x.group, share=0.5), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_come_in_any_order(kind):
    shaper, x = LengthShaper(kind, **KINDS[kind]), batch()
    order = torch.randperm(24, generator=generator(5))
    names = ("rewards", "lengths", "correct", "finished", "group")
    y = RegInputs(**{n: getattr(x, n)[order] for n in names})
    torch.testing.assert_close(shaper(y).rewards, shaper(x).rewards[order])


# -- the module -----------------------------------------------------------------------------------


def test_the_coefficient_enters_once():
    x = batch()
    change = kimi(x.lengths, x.correct, x.group)
    torch.testing.assert_close(LengthShaper("kimi", 0.1)(x).rewards, x.rewards + 0.1 * change)


def test_options_are_checked_at_once():
    with pytest.raises(ValueError, match="kind must be one of"):
        LengthShaper("shortest")
    with pytest.raises(ValueError, match="needs \\['max_length'\\]"):
        LengthShaper("overlong", buffer=5)
    with pytest.raises(ValueError, match="got \\['max_lenght'\\]"):
        LengthShaper("truncate", max_lenght=5)
    for kind, history in (("hapo", None), ("kimi", PromptHistory(3))):
        with pytest.raises(ValueError, match="PromptHistory"):
            LengthShaper(kind, history=history)


def test_modules_require_what_their_formula_reads():
    assert LengthShaper("curriculum").requires == {"rewards", "lengths"}
    needs = {"rewards", "lengths", "correct", "prompt_id"}
    assert LengthShaper("hapo", history=PromptHistory(1)).requires == needs
    assert set(FORMULAS) >= {"truncate", "levels", "cosine"}


def test_the_budget_shrinks_with_optimizer_steps():
    shaper = LengthShaper("curriculum")
    reg = Compose([shaper])
    budgets = []
    for step in range(600):
        if step % 150 == 0:
            budgets.append(shaper.budget.value.item())
        reg.update({})
    torch.testing.assert_close(
        torch.tensor(budgets), torch.tensor([256, 256 * 0.7, 256 * 0.49, 256 * 0.343])
    )
    assert budgets[-1] == pytest.approx(87.8, abs=0.1)
    x = RegInputs(rewards=torch.zeros(1), lengths=torch.tensor([40]))
    budget = shaper.budget.value
    torch.testing.assert_close(shaper(x).rewards, 40 / budget.view(1))
    assert curriculum(torch.tensor([1000]), budget).item() == 0


# -- histories ------------------------------------------------------------------------------------


def seen(prompt, length, correct):
    rows = (torch.tensor(prompt), torch.tensor(length), torch.tensor(correct).bool())
    return dict(zip(("prompt_id", "lengths", "correct"), rows, strict=True))


FIRST = seen([2, 0, 2, 0, 2], [70, 90, 50, 30, 10], [1, 1, 1, 0, 0])
SECOND = seen([2, 1, 0], [110, 40, 80], [1, 1, 1])


@pytest.mark.parametrize(
    ("statistic", "once", "twice"),
    [("min", [90, math.inf, 50], [80, 40, 50]), ("mean", [90, math.inf, 60], [85, 40, 230 / 3])],
)
def test_histories_hold_the_length_of_past_correct_responses(statistic, once, twice):
    history, ids = PromptHistory(3, statistic), torch.arange(3)
    assert history.read(ids).tolist() == [math.inf] * 3
    for rows, expected in ((FIRST, once), (SECOND, twice)):
        history.update(history.observe(**rows))
        torch.testing.assert_close(history.read(ids), torch.tensor(expected).float())


def test_a_step_without_rewards_leaves_the_history_alone():
    for statistic in ("min", "mean"):
        history = PromptHistory(3, statistic)
        history.update(history.observe(**FIRST))
        before = history.read(torch.arange(3))
        history.update({"length": torch.zeros(3), "count": torch.zeros(3)})
        assert torch.equal(history.read(torch.arange(3)), before)


def test_copies_of_other_ranks_do_no_harm():
    for statistic in ("min", "mean"):
        one, two = PromptHistory(3, statistic), PromptHistory(3, statistic)
        for rows in (FIRST, SECOND):
            sync = one.observe(**rows)
            one.update(sync)
            two.update({k: 2 * v for k, v in sync.items()})
        torch.testing.assert_close(one.length, two.length)


def test_the_history_is_read_before_this_step_enters_it():
    shaper = LengthShaper("hapo", history=PromptHistory(3))
    x = RegInputs(rewards=FIRST["correct"].float(), **FIRST)
    first = shaper(x)
    assert torch.equal(first.rewards, x.rewards)
    shaper.update(first.sync)
    change = shaper(x).rewards - x.rewards
    expected = hapo(x.lengths, x.correct, torch.tensor([50.0, 90, 50, 90, 50]))
    torch.testing.assert_close(change, expected)
    reg = Compose([LengthShaper("hapo", history=PromptHistory(3))]).eval()
    reg.update(reg.run("reward", x).sync)
    assert torch.equal(reg.run("reward", x).rewards, x.rewards)


# -- plain reward functions -----------------------------------------------------------------------


def right(completions, completion_ids, answer, **columns):
    return [None if a is None else float(c == a) for c, a in zip(completions, answer, strict=True)]


def test_a_plain_function_gives_the_change_of_the_reward():
    function = LengthShaper("kimi", 0.5).as_reward_func(right, group_size=2)
    ids = [[1] * n for n in (3, 5, 2, 10)]
    found = function(
        completions=["a", "b", "c", "d"],
        completion_ids=ids,
        answer=["a", "x", "c", None],
        trainer_state=None,
    )
    assert found == [0.25, -0.25, 0.25, None]
    assert pickle.loads(pickle.dumps(function)).__name__ == "length_kimi"


def test_a_plain_function_needs_no_answers_where_only_lengths_count():
    function = LengthShaper("overlong", max_length=10, buffer=4).as_reward_func()
    assert function([""] * 2, [[0] * 8, [0] * 3]) == [-0.5, 0.0]


def test_a_cut_response_loses_the_reward_of_its_correctness():
    function = LengthShaper("truncate", max_length=5).as_reward_func(right)
    ids = [[0] * 5, [0] * 4, [0] * 5]
    found = function(completions=list("aab"), completion_ids=ids, answer=list("aaa"))
    assert found == [-1.0, 0.0, 0.0]


def test_plain_functions_refuse_split_groups_and_states():
    function = LengthShaper("kimi").as_reward_func(right, group_size=4)
    with pytest.raises(ValueError, match="whole groups"):
        function(completions=["a"] * 6, completion_ids=[[1]] * 6, answer=["a"] * 6)
    with pytest.raises(ValueError, match="group_size"):
        LengthShaper("kimi").as_reward_func(right)
    with pytest.raises(ValueError, match="correct="):
        LengthShaper("cosine", max_length=5).as_reward_func()
    for stateful in (LengthShaper("curriculum"), LengthShaper("hapo", history=PromptHistory(2))):
        with pytest.raises(ValueError, match="state"):
            stateful.as_reward_func(right)
