"""What modules are made of: coefficients, reductions, groups, and their composition."""

import doctest
import math
from itertools import pairwise

import pytest
import torch

from offrl.regularizers import (
    Compose,
    DualVariable,
    RegInputs,
    RegOutput,
    Regularizer,
    Schedule,
    coefficients,
    reductions,
)
from offrl.regularizers.functional import (
    dense_groups,
    group_extreme,
    group_mean,
    group_std,
    group_sum,
    masked_mean,
    masked_reduce,
)

# -- coefficients ------------------------------------------------------------------------------


def trajectory(dual: DualVariable, violations: list[float]) -> list[float]:
    values = []
    for violation in violations:
        dual.update(torch.tensor(violation))
        values.append(dual.value.item())
    return values


def test_docstring_examples():
    for module in (coefficients, reductions):
        assert doctest.testmod(module).failed == 0


def test_sac_temperature_follows_adam_on_its_logarithm():
    dual = DualVariable(0.2, link="exp", rule="adam", lr=3e-4)
    log_alpha = torch.tensor(math.log(0.2), requires_grad=True)
    adam = torch.optim.Adam([log_alpha], lr=3e-4)
    for step in range(50):
        violation = torch.tensor(math.sin(step) + 0.3)  # target entropy - entropy
        adam.zero_grad()
        (-log_alpha * violation).backward()  # ascent: more weight where entropy falls short
        adam.step()
        dual.update(violation)
        torch.testing.assert_close(dual.value, log_alpha.exp().detach(), rtol=1e-5, atol=0)
    assert dual.value > 0.2


def test_adaptive_entropy_adds_its_step_within_bounds_and_acts_at_or_below_the_target():
    dual = DualVariable(0.0, rule="additive", delta=0.005, bounds=(0.0, 0.012), gate=True)
    assert dual.value == 0
    # target - entropy: above the target; below; below; below (bound); at it; above (inactive)
    violations = [-0.1, 0.1, 0.2, 0.3, 0.0, -0.1, 0.1]
    expected = [0.0, 0.005, 0.010, 0.012, 0.012, 0.0, 0.012]
    assert trajectory(dual, violations) == pytest.approx(expected)


def test_kl_controller_multiplies_by_the_clipped_relative_error():
    dual = DualVariable(0.2, rule="proportional", clip=0.2, scale=256 / 10_000)
    # KL / target - 1
    found = trajectory(dual, [0.1, 5.0, -5.0])
    first = 0.2 * (1 + 0.1 * 0.0256)
    second = first * (1 + 0.2 * 0.0256)
    assert found == pytest.approx([first, second, second * (1 - 0.2 * 0.0256)], rel=1e-6)


def test_kl_penalty_is_doubled_or_halved():
    dual = DualVariable(1.0, rule="factor", factor=2.0)
    assert trajectory(dual, [0.01, 3.0, -0.5, -0.5]) == pytest.approx([2.0, 4.0, 2.0, 1.0])
    gentle = DualVariable(1.0, rule="factor", factor=1.5)
    assert trajectory(gentle, [1.0, -1.0]) == pytest.approx([1.5, 1.0])


@pytest.mark.parametrize(
    ("link", "init", "squash"),
    [("sigmoid", 0.5, lambda x: 1 / (1 + math.exp(-x))), ("tanh", 0.0, math.tanh)],
)
def test_constrained_rlhf_multipliers_by_momentum_and_clipped_violations(link, init, squash):
    dual = DualVariable(init, link, "sgd", lr=0.01, momentum=0.1, clip=0.5)
    # threshold - J: 2 and -3 are clipped to 0.5 and -0.5
    momenta = [0.5, 0.1 * 0.5 + 0.2, 0.1 * 0.25 - 0.5]
    raw = [0.01 * sum(momenta[: i + 1]) for i in range(3)]
    assert trajectory(dual, [2.0, 0.2, -3.0]) == pytest.approx([squash(x) for x in raw])


def test_plain_lagrangian_through_softplus_and_through_a_bound():
    soft = DualVariable(0.5, "softplus", lr=0.1)
    raw = math.log(math.expm1(0.5))
    expected = [math.log1p(math.exp(raw + 0.1)), math.log1p(math.exp(raw - 0.2))]
    assert trajectory(soft, [1.0, -3.0]) == pytest.approx(expected)
    hard = DualVariable(0.5, lr=0.1, bounds=(0.0, math.inf))
    assert trajectory(hard, [-4.0, -4.0, 1.0]) == pytest.approx([0.1, 0.0, 0.1])


@pytest.mark.parametrize("link", ["identity", "exp", "softplus", "sigmoid", "tanh"])
@pytest.mark.parametrize("rule", ["sgd", "adam", "additive"])
def test_more_violation_means_more_weight_within_bounds(link, rule):
    dual = DualVariable(0.3, link, rule, lr=0.5, delta=0.5, bounds=(0.1, 0.6))
    assert dual.value.item() == pytest.approx(0.3)
    rising = trajectory(dual, [1.0] * 30)
    assert all(a <= b + 1e-6 for a, b in pairwise(rising))
    assert rising[0] > 0.3
    assert rising[-1] == pytest.approx(0.6)
    assert trajectory(dual, [-1.0] * 30)[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("rule", ["sgd", "adam", "additive", "proportional", "factor"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_violations_that_are_not_finite_are_ignored(rule, bad):
    dual = DualVariable(0.3, rule=rule, momentum=0.5, gate=True)
    dual.update(torch.tensor(0.2))
    before = {name: value.clone() for name, value in dual.state_dict().items()}
    dual.update(torch.tensor(bad))
    assert all(torch.equal(value, before[name]) for name, value in dual.state_dict().items())


def test_evaluation_changes_no_coefficient():
    dual, schedule = DualVariable(0.3).eval(), Schedule("linear", 1.0, steps=4).eval()
    dual.update(torch.tensor(1.0))
    schedule.update()
    assert dual.value.item() == pytest.approx(0.3)
    assert schedule.value == 1.0


def test_impossible_first_values_are_refused():
    with pytest.raises(ValueError, match="init must lie in"):
        DualVariable(2.0, bounds=(0, 1))
    for link, value in (("exp", 0.0), ("sigmoid", 1.0), ("tanh", -1.0), ("softplus", -0.1)):
        with pytest.raises(ValueError, match="strictly between"):
            DualVariable(value, link)
    with pytest.raises(ValueError, match="steps"):
        Schedule("linear", 1.0, steps=0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule("constant", 0.7, steps=2), [0.7] * 6),
        (Schedule("linear", 1.0, 0.2, steps=4), [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (
            Schedule("cosine", 1.0, 0.0, steps=4),
            [1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5, 0.0, 0.0],
        ),
        (Schedule("exponential", 1.0, 0.3, steps=2, factor=0.5), [1, 1, 0.5, 0.5, 0.3, 0.3]),
    ],
    ids=lambda x: x.kind if isinstance(x, Schedule) else "",
)
def test_schedules_count_optimizer_steps(schedule, expected):
    found = []
    for _ in expected:
        found.append(schedule.value.item())
        schedule.update()
    assert found == pytest.approx(expected)


# -- reductions --------------------------------------------------------------------------------


def ragged():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, generator=g)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0] * 6, [1] * 6])
    return x, mask


def looped(x, mask, mode, norm):
    rows = [
        [v for v, m in zip(*pair, strict=True) if m]
        for pair in zip(x.tolist(), mask.tolist(), strict=True)
    ]
    rows = [row for row in rows if row]
    if mode == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if mode == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / len(rows) / (norm if mode.endswith("norm") else 1)


@pytest.mark.parametrize("mode", reductions.MODES[:-1])
def test_every_reduction_equals_a_loop(mode):
    x, mask = ragged()
    found = masked_reduce(torch.where(mask.bool(), x, torch.nan), mask, mode, norm=10.0)
    assert found.item() == pytest.approx(looped(x, mask, mode, 10.0), rel=1e-5)
    full = torch.ones_like(mask)
    found = masked_reduce(x, None, mode, norm=10.0)
    assert found.item() == pytest.approx(looped(x, full, mode, 10.0), rel=1e-5)


def test_no_reduction_keeps_the_shape_and_zeroes_what_does_not_count():
    x, mask = ragged()
    assert torch.equal(masked_reduce(x, mask, "none"), x * mask)


@pytest.mark.parametrize("mode", reductions.MODES[:-1])
def test_one_axis_is_one_token_per_sequence(mode):
    x, mask = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1, 0, 1])
    expected = masked_reduce(x.unsqueeze(1), mask.unsqueeze(1), mode, norm=2.0)
    torch.testing.assert_close(masked_reduce(x, mask, mode, norm=2.0), expected)


@pytest.mark.parametrize("mode", reductions.MODES[:-1])
def test_averaging_over_ranks_with_a_global_count_gives_the_global_mean(mode):
    x, mask = ragged()
    tokens, sequences = mask.sum() / 2, (mask.sum(-1) > 0).sum() / 2
    count = tokens if mode == "token-mean" else sequences
    ranks = [
        masked_reduce(x[rows], mask[rows], mode, count, norm=10.0)
        for rows in (slice(0, 3), slice(3, 4))
    ]
    torch.testing.assert_close(sum(ranks) / 2, masked_reduce(x, mask, mode, norm=10.0))


@pytest.mark.parametrize("mode", reductions.MODES[:-1])
def test_nothing_that_counts_gives_zero_with_a_gradient(mode):
    x = torch.full((2, 3), torch.nan, requires_grad=True)
    found = masked_reduce(x, torch.zeros(2, 3), mode, norm=10.0)
    found.backward()
    assert found.item() == 0
    assert torch.equal(x.grad, torch.zeros(2, 3))


def test_half_precision_is_reduced_in_float32():
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert masked_reduce(x, None, "seq-mean-token-sum").item() == 4096
    assert masked_reduce(x).dtype == torch.float32


def test_a_reduction_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="token-mean"):
        masked_reduce(torch.zeros(2), mode="mean")
    with pytest.raises(ValueError, match="norm="):
        masked_reduce(torch.zeros(2), mode="seq-mean-token-sum-norm")


def test_masked_mean_over_an_axis_equals_a_loop():
    x, mask = ragged()
    expected = [sum(r) / max(len(r), 1) for r in (x[i][mask[i].bool()].tolist() for i in range(4))]
    found = masked_mean(torch.where(mask.bool(), x, torch.inf), mask)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_group_statistics_equal_loops_over_scattered_groups():
    group = torch.tensor([2, 0, 2, 5, 0, 2, 1])
    x = torch.tensor([1.0, 5.0, 4.0, -1.0, 7.0, 10.0, 3.0])
    members = [[x[j].item() for j in range(7) if group[j] == g] for g in group]
    mean = [sum(m) / len(m) for m in members]
    for correction in (0, 1):
        spread = [
            sum((v - a) ** 2 for v in m) / max(len(m) - correction, 1)
            for m, a in zip(members, mean, strict=True)
        ]
        found = group_std(x, group, correction).tolist()
        assert found == pytest.approx([v**0.5 for v in spread], abs=1e-6)
    assert group_sum(x, group).tolist() == pytest.approx([sum(m) for m in members])
    assert group_mean(x, group).tolist() == pytest.approx(mean)
    assert group_extreme(x, group).tolist() == [max(m) for m in members]
    assert group_extreme(x, group, largest=False).tolist() == [min(m) for m in members]


def test_group_mean_counts_masked_rows_only_and_groups_without_any_give_zero():
    group, x = torch.tensor([1, 0, 1, 0]), torch.tensor([1.0, torch.nan, 5.0, torch.inf])
    mask = torch.tensor([1, 0, 1, 0])
    assert group_mean(x, group, mask).tolist() == [3.0, 0.0, 3.0, 0.0]


def test_dense_groups_keeps_which_rows_belong_together():
    ids = torch.tensor([70, -3, 70, 10**12, -3])
    dense = dense_groups(ids)
    assert dense.max() < 5
    assert torch.equal(dense[:, None] == dense, ids[:, None] == ids)


# -- composition -------------------------------------------------------------------------------


class Add(Regularizer):
    """Adds its coefficient; as a token hook it weighs by it, as a loss it is that times logp."""

    def __init__(self, coef=1.0, hook="advantage", factor=1.0):
        super().__init__(coef)
        self.hook, self.factor = hook, factor
        self.requires = frozenset({"logp", f"extra.{hook}"})
        self.register_buffer("seen", torch.tensor(0.0))

    def forward(self, x: RegInputs) -> RegOutput:
        observed = dict(
            metrics={"weight": torch.as_tensor(self.weight)},
            sync={"sum": torch.tensor([1.0, 2.0]) * self.weight, "count": torch.tensor(3)},
        )
        if self.hook in ("reward", "advantage"):
            before = x.need(f"{self.hook}s")
            return RegOutput(**{f"{self.hook}s": before * self.factor + self.weight}, **observed)
        if self.hook == "token":
            return RegOutput(token_weight=torch.full_like(x.logp, self.weight), **observed)
        if self.hook == "model":
            return RegOutput(per_element=torch.full_like(x.logp, self.weight), **observed)
        return RegOutput(per_element=self.weight * x.need("logp"), **observed)

    def update(self, sync):
        super().update(sync)
        self.seen += sync["sum"].sum() + sync["count"]


def test_modules_of_a_hook_act_in_the_order_given():
    one, two = Add(1.0, factor=3.0), Add(5.0, factor=2.0)
    x = RegInputs(advantages=torch.tensor([1.0, 2.0]))
    assert Compose([one, two]).run("advantage", x).advantages.tolist() == [13.0, 19.0]
    assert Compose([two, one]).run("advantage", x).advantages.tolist() == [22.0, 28.0]
    assert x.advantages.tolist() == [1.0, 2.0]


def test_stages_do_not_see_each_other():
    reg = Compose([Add(5.0), Add(1.0, "reward")])
    out = reg.run("reward", RegInputs(rewards=torch.tensor([0.5])))
    assert out.rewards.item() == 1.5
    assert out.advantages is None
    assert reg.hooks == {"reward", "advantage"}
    assert Compose([]).run("reward", RegInputs()).rewards is None


def test_token_weights_multiply_losses_and_spare_the_model_hook():
    parts = [Add(7.0, "model"), Add(0.1, "loss"), Add(2.0, "token"), Add(3.0, "token")]
    logp = torch.tensor([[1.0, 3.0]], requires_grad=True)
    loss, _, _ = Compose(parts).run_loss(RegInputs(logp=logp))
    assert loss.item() == pytest.approx(7.0 + 0.1 * 6.0 * 2.0)
    loss.backward()
    assert logp.grad.tolist() == [[pytest.approx(0.3), pytest.approx(0.3)]]


def test_token_means_use_the_count_of_tokens_and_sequence_means_that_of_sequences():
    x = RegInputs(logp=torch.tensor([[2.0, 4.0]]))
    part = Add(1.0, "loss")
    reg = Compose([part])
    assert reg.run_loss(x, count=6.0, sequences=0.5)[0].item() == pytest.approx(1.0)
    part.reduction = "seq-mean-token-sum"
    assert reg.run_loss(x, count=6.0, sequences=0.5)[0].item() == pytest.approx(12.0)
    assert reg.run_loss(x, count=6.0)[0].item() == pytest.approx(6.0)


def test_metrics_and_sums_carry_the_name_of_their_module():
    x = RegInputs(logp=torch.zeros(1, 2), advantages=torch.zeros(1))
    _, metrics, sync = Compose([Add(), Add(0.5, "loss")]).run_loss(x)
    assert set(metrics) == {"1_Add/weight"}
    assert set(sync) == {"1_Add/sum", "1_Add/count"}
    assert set(Compose({"bonus": Add()}).run("advantage", x).metrics) == {"bonus/weight"}


def test_metrics_are_detached():
    x = RegInputs(logp=torch.zeros(1, 2, requires_grad=True))
    part = Add(1.0, "loss")
    part.forward = lambda x: RegOutput(loss=x.logp.sum(), metrics={"a": x.logp.sum()})
    _, metrics, _ = Compose([part]).run_loss(x)
    assert not metrics["0_Add/a"].requires_grad


def test_requirements_are_those_of_the_active_modules():
    reg = Compose([Add(), Add(0.0, "reward"), Add(DualVariable(0.0), "loss")])
    assert reg.requires == {"logp", "extra.advantage", "extra.loss"}


def test_flat_sums_return_in_their_shapes_and_reach_their_module():
    reg = Compose([Add(1.0, "loss"), Add(2.0, "loss")])
    _, _, sync = reg.run_loss(RegInputs(logp=torch.zeros(1, 2)))
    flat = reg.flatten(sync)
    assert flat.dtype == torch.float64
    assert flat.tolist() == [1.0, 2.0, 3.0, 2.0, 4.0, 3.0]
    back = reg.unflatten(flat * 2)
    assert back.keys() == sync.keys()
    assert all(torch.equal(back[key], 2 * value.double()) for key, value in sync.items())
    reg.update(back)
    assert [part.seen.item() for part in reg.parts.values()] == [12.0, 18.0]
    assert Compose([]).flatten({}).numel() == 0


def test_sums_that_change_their_layout_are_refused():
    reg = Compose([Add(1.0, "loss")])
    reg.flatten({"a": torch.zeros(2)})
    with pytest.raises(ValueError, match="sync entries changed"):
        reg.flatten({"b": torch.zeros(2)})


def test_update_rests_in_evaluation():
    part = Add(Schedule("linear", 1.0, steps=2), "loss")
    reg, sync = Compose([part]), {"0_Add/sum": torch.ones(2), "0_Add/count": torch.ones(())}
    reg.eval().update(sync)
    assert part.seen.item() == 0
    assert part.weight == 1.0
    reg.train().update(sync)
    assert part.seen.item() == 3.0
    assert part.weight == 0.5


def test_an_input_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"'stats\.lse'"):
        RegInputs().need("stats.lse")
    with pytest.raises(ValueError, match="'logp'"):
        Compose([Add(1.0, "loss")]).run_loss(RegInputs())
    assert RegInputs(stats={"lse": torch.ones(1)}).need("stats.lse").item() == 1


def test_state_of_a_composition_holds_every_coefficient():
    reg = Compose({"a": Add(DualVariable(0.5), "loss"), "b": Add(Schedule("linear", 1.0), "loss")})
    reg.parts["a"].coef.update(torch.tensor(1.0))
    other = Compose({"a": Add(DualVariable(0.1), "loss"), "b": Add(Schedule("linear", 1.0))})
    other.load_state_dict(reg.state_dict())
    assert other.parts["a"].weight == reg.parts["a"].weight
    assert not list(reg.parameters())
