import doctest
import math

import pytest
import torch

from offrl.regularizers import (
    Compose,
    DualVariable,
    EntropyAnchor,
    EntropyBand,
    EntropyBonus,
    PeakEntropyMask,
    RegInputs,
    Schedule,
    TemperatureController,
)
from offrl.regularizers.functional import masked_quantile, peak_mask, reinforce_positive
from offrl.regularizers.tokens import entropy
from offrl.regularizers.tokens.statistics import Nucleus, SetEntropy, token_stats_from_logits

close = torch.testing.assert_close


def entropy_of(logits):
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def nucleus_of(logits, mass=0.8, include_crossing=True):
    """Membership of the smallest set of the most likely tokens whose mass reaches `mass`."""
    probs, order = logits.softmax(-1).sort(-1, descending=True)
    total = probs.cumsum(-1)
    inside = total - probs < mass if include_crossing else total <= mass
    return torch.zeros_like(inside).scatter(-1, order, inside)


def nucleus_entropy(logits, inside):
    q = logits.masked_fill(~inside, -1e30).log_softmax(-1)
    terms = torch.where(inside, q.exp() * q, 0.0)
    return -terms.sum(-1)


def sums(total, count):
    return {"entropy": torch.as_tensor(total), "count": torch.as_tensor(count)}


def test_docstring_examples():
    assert doctest.testmod(entropy).failed == 0


# Bonus


def test_bonus_ascends_the_entropy_once_times_its_coefficient():
    logits = torch.randn(4, 3, 5, requires_grad=True)
    mask = torch.tensor([[1, 1, 0]] * 4)
    h = entropy_of(logits)
    loss = Compose([EntropyBonus(0.3)]).run_loss(RegInputs(entropy=h, mask=mask))[0]
    close(loss, -0.3 * h[:, :2].mean())
    expected = torch.autograd.grad(-0.3 * h[:, :2].mean(), logits, retain_graph=True)[0]
    close(torch.autograd.grad(loss, logits)[0], expected)


def test_constant_coefficient_of_zero_costs_nothing_and_needs_nothing():
    compose = Compose([EntropyBonus(0.0)])
    assert compose.requires == frozenset()
    assert compose.run_loss(RegInputs())[0] == 0


def test_adaptive_coefficient_follows_the_controller_of_trl():
    """Replays the rule on scalars: gate by the last entropy, bounds, ties count as too low."""
    coef = DualVariable(0.0, rule="additive", delta=0.005, bounds=(0.0, 0.012), gate=True)
    module, value = EntropyBonus(coef, target=0.2), 0.0
    levels = [0.5, 0.1, 0.1, 0.1, 0.3, 0.25, 0.25, 0.25, 0.125, 0.2]
    for level in levels:
        module.update(sums(level * 4, 4.0))
        value = min(value + 0.005, 0.012) if level <= 0.2 else max(value - 0.005, 0.0)
        close(coef.value, torch.tensor(value if level <= 0.2 else 0.0))
    assert value == pytest.approx(0.01)


def test_every_part_of_a_step_uses_the_coefficient_of_the_step_before():
    module = EntropyBonus(DualVariable(0.1, rule="additive", bounds=(0, 1)), target=2.0)
    halves = [RegInputs(entropy=torch.full((3,), 0.5)), RegInputs(entropy=torch.full((1,), 1.5))]
    outs = [module(x) for x in halves]
    close(outs[0].per_element, torch.full((3,), -0.05))
    close(outs[1].per_element, torch.full((1,), -0.15))
    total = {name: outs[0].sync[name] + outs[1].sync[name] for name in outs[0].sync}
    close(total["entropy"] / total["count"], torch.tensor(0.75))  # of tokens, not of parts
    module.update(total)
    close(module.weight, torch.tensor(0.105))


def test_controller_ignores_an_empty_step_and_rests_in_evaluation():
    module = EntropyBonus(DualVariable(0.1, rule="additive", bounds=(0, 1)), target=2.0)
    module.update(sums(0.0, 0.0))
    module.eval()
    module.update(sums(0.0, 1.0))
    close(module.weight, torch.tensor(0.1))


def test_scheduled_bonus_decays_by_optimizer_steps():
    module = EntropyBonus(Schedule("linear", 0.2, 0.0, steps=4))
    for step in range(6):
        close(module.weight, torch.tensor(max(0.2 - 0.05 * step, 0.0)))
        module.update(sums(1.0, 1.0))


def test_adaptive_bonus_needs_a_target():
    with pytest.raises(ValueError, match="target"):
        EntropyBonus(DualVariable())


def test_minus_log_probability_estimates_the_entropy_but_its_gradient_is_zero_in_mean():
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(-1)
    estimate = -(logp.exp().detach() * logp).sum()
    close(estimate, entropy_of(logits))
    zero = torch.zeros(5, dtype=torch.float64)
    close(torch.autograd.grad(estimate, logits)[0], zero)


def test_control_actor_and_token_policy_of_one_token_agree():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=g)
    anchor = EntropyAnchor(0.5, 0.5, "batch", mass=None)
    anchor.update(sums(1.0, 1))
    band = EntropyBand(0.2, high=0.9)
    band.update(sums([1.5], [1.0]))
    compose = Compose([EntropyBonus(0.3), anchor, band, PeakEntropyMask(0.3)])
    values, grads = [], []
    for shape in ((6, 5), (6, 1, 5)):
        leaf = logits.view(shape).clone().requires_grad_()
        values.append(compose.run_loss(RegInputs(entropy=entropy_of(leaf)))[0])
        grads.append(torch.autograd.grad(values[-1], leaf)[0].view(6, 5))
    close(values[0], values[1])
    close(grads[0], grads[1])


# Peak tokens


@pytest.mark.parametrize("quantile", [0.0, 0.2, 0.35, 0.8, 1.0])
def test_quantile_of_valid_entries_equals_that_of_torch(quantile):
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(5, 11, generator=g), torch.rand(5, 11, generator=g) > 0.4
    mask[:, 0] = True
    padded = torch.where(mask, x, torch.nan)
    close(masked_quantile(padded, quantile, mask)[0], torch.quantile(x[mask], quantile))
    rows = torch.stack([torch.quantile(v[m], quantile) for v, m in zip(x, mask, strict=True)])
    close(masked_quantile(padded, quantile, mask, rowwise=True)[:, 0], rows)


def test_peak_tokens_of_a_batch_are_those_of_trl():
    """Its own example: 12 tokens, 10 valid; the top fifth are the two largest valid ones."""
    h = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.7, 0.8, 0.9, 1.0, 1.1, 1.2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    out = PeakEntropyMask(0.8)(RegInputs(entropy=h, mask=mask))
    close(out.token_weight, torch.tensor([[0.0] * 6, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]]))
    close(out.metrics["share"], torch.tensor(0.2))


def test_peak_tokens_of_sequences_do_not_depend_on_the_batch():
    g = torch.Generator().manual_seed(0)
    h = torch.rand(4, 10, generator=g)
    whole = peak_mask(h, 0.7, scope="sequence")
    assert whole.sum(-1).tolist() == [3] * 4
    assert torch.equal(whole[:2], peak_mask(h[:2], 0.7, scope="sequence"))
    assert not torch.equal(peak_mask(h, 0.7)[:2], peak_mask(h[:2], 0.7))


def test_quantile_zero_keeps_all_valid_tokens_and_one_the_largest():
    h, mask = torch.tensor([[0.3, 0.1, 0.7, 9.0]]), torch.tensor([[1, 1, 1, 0]])
    assert peak_mask(h, 0.0, mask).tolist() == [[True, True, True, False]]
    assert peak_mask(h, 1.0, mask).tolist() == [[False, False, True, False]]


def test_ties_are_kept_unless_strict():
    h = torch.ones(2, 3)
    assert peak_mask(h, 0.8).all()
    assert not peak_mask(h, 0.8, strict=True).any()


def test_control_inputs_have_no_sequences():
    with pytest.raises(ValueError, match="batch"):
        peak_mask(torch.ones(3), 0.8, scope="sequence")


def test_mask_removes_the_loss_of_other_tokens_but_not_their_count():
    h = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    loss = Compose([PeakEntropyMask(0.8), EntropyBonus(1.0)]).run_loss(RegInputs(entropy=h))[0]
    close(loss, torch.tensor(-5.0 / 5))  # only the largest is kept, five are counted


# Anchor (SIREN)


def anchor_inputs(logits, inside, mask=None):
    return RegInputs(stats={"nucleus_entropy": nucleus_entropy(logits, inside)}, mask=mask)


def test_anchor_is_still_in_the_first_step_and_then_frozen():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 10, 6, generator=g, requires_grad=True)
    module = EntropyAnchor(0.5)
    x = anchor_inputs(logits, nucleus_of(logits))
    out = module(x)
    assert out.loss == 0
    assert (torch.autograd.grad(out.loss, logits)[0] == 0).all()
    module.update(out.sync)
    close(module.anchor, out.metrics["entropy"])
    module.update(sums(7.0, 1))
    close(module.anchor, out.metrics["entropy"])


def test_level_is_a_mean_over_sequences_of_means_over_their_peak_tokens():
    h = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.9], [0.2, 0.1, 0.0, torch.nan, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    out = EntropyAnchor(quantile=0.5)(RegInputs(stats={"nucleus_entropy": h}, mask=mask))
    close(out.metrics["entropy"], torch.tensor(((0.4 + 0.5 + 0.9) / 3 + 0.2) / 2))
    close(out.sync["count"], torch.tensor(2))


@pytest.mark.parametrize(("anchor", "sign"), [(0.0, -1), (9.0, 1)])
def test_entropy_is_pushed_towards_the_anchor(anchor, sign):
    logits = torch.randn(1, 10, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inside = nucleus_of(logits)
    module = EntropyAnchor(0.5)
    module.update(sums(anchor, 1))
    x = anchor_inputs(logits, inside)
    step = torch.autograd.grad(module(x).loss, logits)[0]
    after = module(anchor_inputs(logits - 0.1 * step, inside)).metrics["entropy"]
    assert sign * (after - module(x).metrics["entropy"]) > 0


def test_logits_outside_the_nucleus_and_tokens_below_the_quantile_get_no_gradient():
    logits = torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inside = nucleus_of(logits)
    module = EntropyAnchor(0.5)
    module.update(sums(0.1, 1))
    x = anchor_inputs(logits, inside)
    grad = torch.autograd.grad(module(x).loss, logits)[0]
    peak = peak_mask(x.stats["nucleus_entropy"], 0.8, scope="sequence", strict=True)
    assert (grad[~inside] == 0).all()
    assert (grad[~peak] == 0).all()
    assert (grad[peak][inside[peak]] != 0).any()


def test_without_the_crossing_token_confident_tokens_have_an_empty_nucleus():
    logits = torch.tensor([[[3.0, 0.0, 0.0], [1.0, 0.9, 0.8]]], requires_grad=True)
    assert logits.softmax(-1)[0, 0, 0] > 0.8
    inside = nucleus_of(logits, include_crossing=False)
    h = nucleus_entropy(logits, inside)
    assert h[0, 0] == 0
    assert (torch.autograd.grad(h[0, 0], logits)[0] == 0).all()
    assert nucleus_of(logits)[0].any(-1).all()


@pytest.mark.parametrize("include_crossing", [True, False])
def test_token_statistics_make_the_nucleus_entropy(include_crossing):
    logits = torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(0))
    module = EntropyAnchor(mass=0.7, include_crossing=include_crossing)
    statistic = SetEntropy(Nucleus(module.mass, module.include_crossing))
    found = token_stats_from_logits(logits, want={"nucleus_entropy": statistic})
    close(
        found["nucleus_entropy"], nucleus_entropy(logits, nucleus_of(logits, 0.7, include_crossing))
    )


def test_anchor_of_the_whole_entropy_needs_no_nucleus():
    assert EntropyAnchor(mass=None).requires == {"entropy"}
    assert EntropyAnchor().requires == {"stats.nucleus_entropy"}


def test_anchor_waits_for_a_step_with_tokens_and_rests_in_evaluation():
    module = EntropyAnchor()
    module.update(sums(0.0, 0))
    assert module.anchored == 0
    module.eval()
    module.update(sums(3.0, 2))
    assert module.anchored == 0
    module.train()
    module.update(sums(3.0, 2))
    assert module.anchor == 1.5


def test_over_micro_batches_the_anchor_adds_the_variance_among_them():
    entropy = torch.tensor([[1.0, 2.0], [1.0, 5.0]])
    module = EntropyAnchor(1.0, mass=None)
    module.anchor.fill_(3.0)
    module.anchored.fill_(1)
    levels = torch.tensor([2.0, 5.0])  # of the peak tokens
    whole = module(RegInputs(entropy=entropy)).loss
    torch.testing.assert_close(whole, (levels.mean() - 3).square())
    parts = [module(RegInputs(entropy=row[None])).loss for row in entropy]
    torch.testing.assert_close(sum(parts) / 2, whole + levels.var(correction=0))


def test_batch_without_a_peak_costs_nothing_after_anchoring():
    h = torch.rand(2, 3, requires_grad=True)
    module = EntropyAnchor()
    module.update(sums(3.0, 2))
    loss = module(RegInputs(stats={"nucleus_entropy": h}, mask=torch.zeros(2, 3))).loss
    assert loss == 0
    assert (torch.autograd.grad(loss, h)[0] == 0).all()


# Band (EPO)


def band(mode="hinge", turns=1, history=1.0, **options):
    module = EntropyBand(0.1, turns=turns, low=0.5, high=2.0, mode=mode, **options)
    module.update(sums([history] * turns, [1.0] * turns))
    return module


H = [0.2, 0.5, 1.0, 2.0, 2.6]


@pytest.mark.parametrize(
    ("mode", "cost", "slope"),
    [
        ("hinge", [0.3, 0, 0, 0, 0.6], [-1, 0, 0, 0, 1]),
        ("square", [0.09, 0, 0, 0, 0.36], [-0.6, 0, 0, 0, 1.2]),
        ("indicator", [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]),
    ],
)
def test_cost_and_gradient_outside_the_band(mode, cost, slope):
    h = torch.tensor(H, requires_grad=True)
    value = band(mode)(RegInputs(entropy=h)).per_element
    close(value, 0.1 * torch.tensor(cost, dtype=torch.float32))
    close(torch.autograd.grad(value.sum(), h)[0], 0.1 * torch.tensor(slope, dtype=torch.float32))


def test_history_of_ragged_episodes_equals_means_by_hand():
    steps = [
        ([[1.0, 2.0, 3.0], [5.0, 9.0, 9.0]], [[0, 1, 2], [0, -1, -1]]),
        ([[2.0, 4.0, 6.0], [8.0, 8.0, 8.0]], [[0, 0, 1], [-1, -1, -1]]),
        ([[7.0, 7.0, 9.0], [1.0, 3.0, 5.0]], [[9, 9, 3], [1, 1, 2]]),  # 9.0 is masked
    ]
    module = EntropyBand(0.1, turns=4)
    for h, turn in steps:
        turn, h = torch.tensor(turn), torch.tensor(h)
        x = RegInputs(entropy=h, turn=turn, mask=(turn >= 0) & (h < 8.5))
        module.update(module(x).sync)
    # Turn 0 was reached in steps 1 and 2, turn 1 in all, turn 2 in 1 and 3, turn 3 never.
    expected = [(3 + 3) / 2, (2 + 6 + 2) / 3, (3 + 5) / 2, 0.0]
    close(module.history, torch.tensor(expected))
    assert module.count.tolist() == [2, 3, 2, 0]


def test_parts_of_a_step_count_as_one_in_the_history():
    h, turn = torch.tensor([[1.0, 2.0], [4.0, 3.0], [4.0, 5.0]]), torch.tensor([[0, 1]] * 3)
    whole, parts = (EntropyBand(0.1, turns=2) for _ in range(2))
    whole.update(whole(RegInputs(entropy=h, turn=turn)).sync)
    first = parts(RegInputs(entropy=h[:1], turn=turn[:1])).sync
    second = parts(RegInputs(entropy=h[1:], turn=turn[1:])).sync
    parts.update({name: first[name] + second[name] for name in first})
    close(whole.history, parts.history)
    assert parts.count.tolist() == [1, 1]


def test_no_cost_without_history_before_the_first_turn_or_outside_the_turns():
    module = EntropyBand(1.0, turns=4, low=0.5)
    module.update(sums([1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]))
    turn = torch.tensor([[0, 1, 2, 3, 4, -1]])
    cost = module(RegInputs(entropy=torch.full((1, 6), 9.0), turn=turn)).per_element
    close(cost, torch.tensor([[0.0, 0.0, 7.0, 0.0, 0.0, 0.0]]))
    cost = EntropyBand(1.0)(RegInputs(entropy=torch.full((6,), 9.0))).per_element
    assert (cost == 0).all()


def test_history_rests_in_evaluation():
    module = band().eval()
    module.update(sums([9.0], [1.0]))
    close(module.history, torch.ones(1))


def test_single_answers_need_no_turns():
    assert EntropyBand(0.1).requires == {"entropy"}
    assert EntropyBand(0.1, turns=3).requires == {"entropy", "turn"}
    with pytest.raises(ValueError, match="low"):
        EntropyBand(0.1, low=3.0)


def test_phase_schedule_has_the_numbers_of_the_released_code():
    schedule = Schedule("two-phase", 1.0, steps=150)
    values = {}
    for k in range(151):
        values[k] = schedule.value.item()
        schedule.update()
    assert values[0] == 1
    assert values[75] == pytest.approx(0.827, abs=5e-4)
    assert values[76] == pytest.approx(0.8 * math.exp(-3 / 75), rel=1e-4)  # a jump, not a bend
    assert values[150] == pytest.approx(0.040, abs=5e-4)
    close(schedule.value, torch.tensor(values[150]))


# Temperature (AEPO)


def test_temperature_is_hot_at_or_below_the_target_and_cold_above():
    module = TemperatureController(0.5)
    assert module.temperature == 1
    for level, temperature in [(0.6, 0.8), (0.5, 1.2), (0.7, 0.8), (0.1, 1.2)]:
        logp = torch.tensor([[-level, torch.nan]])
        module.update(module(RegInputs(logp=logp, mask=torch.tensor([[1, 0]]))).sync)
        close(module.temperature, torch.tensor(temperature))
    module.update(sums(0.0, 0.0))
    close(module.temperature, torch.tensor(1.2))


def test_reinforce_positive_gives_the_gradient_of_correct_log_probabilities_only():
    logp = torch.tensor([[-1.0, -2.0], [-1.0, torch.nan]], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]])
    loss = reinforce_positive(logp, torch.tensor([True, True]), mask)
    close(loss, torch.tensor([[1.0, 2.0], [1.0, 0.0]]))
    close(torch.autograd.grad(loss.sum(), logp)[0], -mask.float())
    assert (reinforce_positive(logp, torch.tensor([False, False]), mask) == 0).all()


@pytest.mark.parametrize(("temperature", "sign"), [(1.2, 1), (0.8, -1)])
def test_positive_samples_of_a_temperature_move_the_entropy_its_way(temperature, sign):
    logits = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    drawn = (logits.detach() / temperature).softmax(-1)
    loss = (drawn * reinforce_positive(logits.log_softmax(-1), torch.ones(3))).sum()
    step = torch.autograd.grad(loss, logits)[0]
    assert sign * (entropy_of(logits - 0.01 * step) - entropy_of(logits)) > 0
