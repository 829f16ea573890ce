import doctest
import math

import pytest
import torch
from torch.distributions import Categorical
from torch.nn import functional as F

from offrl.regularizers import Compose, RegInputs
from offrl.regularizers.divergences import f_divergence
from offrl.regularizers.tokens import preference
from offrl.regularizers.tokens.preference import (
    INPO,
    LDDPO,
    RPO,
    SPO,
    GenARM,
    NLLAnchor,
    XPOTerm,
    dpo_loss,
    f_link,
    guided_logp,
    inpo_loss,
    ld_weight,
    sequence_nll,
    spo_reward,
)

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])


def batch(**changes):
    g = torch.Generator().manual_seed(0)
    logp, ref, old = (-torch.rand(4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    given = dict(
        logp=logp.requires_grad_(),
        ref_logp=ref,
        old_logp=old,
        mask=MASK,
        chosen=torch.tensor([True, True, False, False]),
    )
    return RegInputs(**given | changes)


def margins(x, tensor):
    total = (tensor * x.mask).sum(-1)
    return total[:2] - total[2:]


def test_docstring_examples():
    assert doctest.testmod(preference).failed == 0


def test_dpo_is_the_loss_of_sequence_margins():
    x = batch()
    margin = margins(x, x.logp - x.ref_logp)
    out = LDDPO(2.0, beta=0.3)(x)
    torch.testing.assert_close(out.loss, -2 * F.logsigmoid(0.3 * margin).mean())
    torch.testing.assert_close(out.metrics["margin"], margin.mean())
    torch.testing.assert_close(out.metrics["accuracy"], (margin > 0).double().mean())


def test_extreme_margins_stay_finite():
    win = torch.tensor([0.0, -1e5, 1e5], requires_grad=True)
    loss = dpo_loss(win, torch.zeros(3), 1.0)
    torch.testing.assert_close(loss, torch.tensor([math.log(2), 1e5, 0.0]))
    loss.sum().backward()
    torch.testing.assert_close(win.grad, torch.tensor([-0.5, -1.0, 0.0]))


def test_chosen_tells_which_row_of_a_pair_won():
    x = batch()
    flipped = batch(chosen=torch.tensor([False, True, True, False]))
    swap = torch.tensor([2, 1, 0, 3])
    swapped = batch(logp=x.logp[swap], ref_logp=x.ref_logp[swap], mask=MASK[swap])
    torch.testing.assert_close(LDDPO()(flipped).loss, LDDPO()(swapped).loss)


def test_length_desensitized_with_alpha_one_is_dpo():
    x = batch()
    assert torch.equal(ld_weight(MASK, 1.0), torch.ones(4, 4))
    margin = margins(x, x.logp - x.ref_logp)
    torch.testing.assert_close(LDDPO(alpha=1.0)(x).loss, dpo_loss(margin, 0 * margin, 0.1).mean())


def test_length_desensitized_scales_what_exceeds_the_shorter_response():
    x = batch()
    alpha = 0.25
    weight = torch.ones(4, 4, dtype=torch.float64)
    weight[0, 2:] = alpha  # 4 tokens against 2
    weight[3, 2:] = alpha  # 3 tokens against 2
    margin = margins(x, weight * (x.logp - x.ref_logp))
    out = LDDPO(alpha=alpha)(x)
    torch.testing.assert_close(out.loss, dpo_loss(margin, 0 * margin, 0.1).mean())


def test_length_counts_tokens_and_not_positions():
    mask = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 1, 0]])
    weight = ld_weight(mask, 0.5)
    assert (weight * mask).tolist() == [[0, 1, 0, 0.5, 0.5], [0, 0, 0, 1, 0]]


GENERATORS = {
    "kl": lambda u: u * u.log(),
    "reverse-kl": lambda u: -u.log(),
    "js": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "alpha": lambda u: u**0.3 / (0.3 * (0.3 - 1)),
}


def order_of(kind):
    return 0.3 if kind == "alpha" else None


@pytest.mark.parametrize("kind", GENERATORS)
def test_links_are_derivatives_of_their_generators(kind):
    rho = torch.linspace(-4, 4, 9, dtype=torch.float64)
    u = rho.exp().requires_grad_()
    (slope,) = torch.autograd.grad(GENERATORS[kind](u).sum(), u)
    torch.testing.assert_close(f_link(rho, kind, order_of(kind)), slope - slope[4])


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_of_the_links_give_the_divergences_of_that_name(kind):
    p, q = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([0.6, 0.3, 0.1]).double()
    f = GENERATORS[kind]
    by_hand = (q * f(p / q)).sum() - f(torch.ones(()).double())
    name = f_divergence(Categorical(p), Categorical(q), kind, order_of(kind))
    torch.testing.assert_close(by_hand, 2 * name if kind == "js" else name)


@pytest.mark.parametrize("kind", GENERATORS)
def test_the_best_policy_under_a_divergence_has_the_link_as_reward(kind):
    g = torch.Generator().manual_seed(3)
    ref, reward = (torch.randn(5, generator=g).double() for _ in range(2))
    ref, price = ref.log_softmax(0), 0.7
    logits = ref.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [logits],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure():
        solver.zero_grad()
        logp = logits.log_softmax(0)
        f = GENERATORS[kind]((logp - ref).exp())
        loss = price * (ref.exp() * f).sum() - (logp.exp() * reward).sum()
        loss.backward()
        return loss

    solver.step(closure)
    link = price * f_link(logits.detach().log_softmax(0) - ref, kind, order_of(kind))
    torch.testing.assert_close(link - link[0], reward - reward[0], atol=1e-5, rtol=1e-5)


def test_alpha_links_end_at_both_kl():
    rho = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for order, kind in ((1.0, "kl"), (1 + 1e-9, "kl"), (0.0, "reverse-kl")):
        torch.testing.assert_close(f_link(rho, "alpha", order), f_link(rho, kind))


def test_links_of_extreme_ratios_stay_finite():
    for kind in GENERATORS:
        rho = torch.tensor([-1e4, 1e4], requires_grad=True)
        value = f_link(rho, kind, order_of(kind))
        value.sum().backward()
        assert value.isfinite().all()
        assert rho.grad.isfinite().all()


def test_dpo_of_another_divergence_is_the_loss_of_linked_ratios():
    x = batch()
    rho = ((x.logp - x.ref_logp) * x.mask).sum(-1)
    margin = (1 - (-rho[:2]).exp()) - (1 - (-rho[2:]).exp())
    out = LDDPO(beta=0.3, divergence="reverse-kl")(x)
    torch.testing.assert_close(out.loss, -F.logsigmoid(0.3 * margin).mean())


def test_rpo_without_eta_is_dpo():
    x = batch()
    for reduction in ("sum", "seq-mean", "token-mean"):
        loss = RPO(beta=0.2, eta=0.0, sft_reduction=reduction)(x).loss
        assert torch.equal(loss, LDDPO(beta=0.2)(x).loss)


def test_rpo_at_its_defaults_pays_a_twenty_thousandth_of_a_nat():
    """Margin 3: log(1 + e^-0.03) = 0.678260; 0.01 0.005 20 = 0.001, as in the released trainer."""
    logp = torch.tensor([[-5.0, -15.0], [-10.0, -20.0]], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([[-11.0, -11.0], [-9.0, -20.0]], dtype=torch.float64)
    x = RegInputs(logp=logp, ref_logp=ref_logp, chosen=torch.tensor([True, False]))
    loss = RPO()(x).loss
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.03)) + 0.001, abs=1e-15)
    assert loss.item() == pytest.approx(0.679260, abs=1e-6)
    pull = 0.01 / (1 + math.exp(0.03))
    (gradient,) = torch.autograd.grad(loss, logp)
    expected = torch.tensor([[-pull - 5e-5], [pull]], dtype=torch.float64).expand(2, 2)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("reduction", "mode"),
    [
        ("sum", "seq-mean-token-sum"),
        ("seq-mean", "seq-mean-token-mean"),
        ("token-mean", "token-mean"),
    ],
)
def test_rpo_is_dpo_and_an_anchor_on_the_chosen_responses(reduction, mode):
    x = batch()
    loss = RPO(beta=0.2, eta=0.3, sft_reduction=reduction)(x).loss
    parts = Compose([LDDPO(beta=0.2), NLLAnchor(0.2 * 0.3, mode)])
    torch.testing.assert_close(loss, parts.run_loss(x)[0].to(loss))
    by_hand = {
        "sum": -(x.logp * MASK)[:2].sum(-1).mean(),
        "seq-mean": -((x.logp * MASK)[:2].sum(-1) / torch.tensor([4, 2])).mean(),
        "token-mean": -(x.logp * MASK)[:2].sum() / 6,
    }[reduction]
    torch.testing.assert_close(loss, LDDPO(beta=0.2)(x).loss + 0.06 * by_hand)
    nll = sequence_nll(x.logp[:2], MASK[:2], reduction)
    torch.testing.assert_close(nll.mean(), by_hand)


def test_the_anchor_equals_cross_entropy_over_the_chosen_tokens():
    # TRL's "sft" loss: cross-entropy of the labels at the chosen completions' tokens.
    logits = torch.randn(4, 4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(7, (4, 4))
    logp = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    out = NLLAnchor(0.2, reduction="token-mean", rows="chosen")(batch(logp=logp))
    kept = MASK[:2].bool()
    expected = 0.2 * F.cross_entropy(logits[:2][kept], labels[:2][kept])
    torch.testing.assert_close(out.loss, expected)
    got, want = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (out.loss, expected))
    torch.testing.assert_close(got, want)


def test_the_anchor_on_all_rows_clones_actions():
    logp = -torch.rand(6)
    loss, _, _ = Compose([NLLAnchor(0.5, rows="all")]).run_loss(RegInputs(logp=logp))
    torch.testing.assert_close(loss, -0.5 * logp.mean())


def test_optimism_pushes_down_what_the_reference_sampled():
    x = batch(extra={"from_reference": torch.tensor([True, False, False, True])})
    out = XPOTerm(0.1)(x)
    total = (x.logp * MASK).sum(-1)
    torch.testing.assert_close(out.loss, 0.1 * (total[0] + total[3]) / 2)
    out.loss.backward()
    assert torch.equal(x.logp.grad != 0, MASK.bool() & torch.tensor([[1], [0], [0], [1]]).bool())
    assert (x.logp.grad >= 0).all()


def test_win_rates_of_complementary_preferences_sum_to_half_the_group():
    raw = torch.rand(7, 7)
    upper = raw.triu(1)
    preferences = upper + (1 - upper).T.tril(-1)
    group = torch.tensor([2, 0, 2, 0, 2, 0, 5])
    preferences[group.unsqueeze(0) != group.unsqueeze(1)] = math.nan
    reward = spo_reward(preferences, group)
    torch.testing.assert_close(reward[group == 2].sum(), torch.tensor(1.5))
    torch.testing.assert_close(reward[group == 0].sum(), torch.tensor(1.5))
    assert reward[6] == 0
    torch.testing.assert_close(reward[0], (preferences[0, 2] + preferences[0, 4]) / 2)
    x = RegInputs(rewards=torch.ones(7), group=group, extra={"preferences": preferences})
    torch.testing.assert_close(SPO(2.0)(x).rewards, 1 + 2 * reward)


def test_nash_iteration_with_ratio_one_is_ipo():
    x = batch()
    margin = margins(x, x.logp - x.ref_logp)
    loss = INPO(eta=0.25, ratio=1.0)(x).loss
    torch.testing.assert_close(loss, (margin - 2.0).square().mean())


def test_nash_iteration_mixes_reference_and_previous_policy():
    x = batch()
    policy, ref, old = (margins(x, part) for part in (x.logp, x.ref_logp, x.old_logp))
    h = policy - ref / 3 - 2 * old / 3
    torch.testing.assert_close(INPO(eta=0.1)(x).loss, (h - 5).square().mean())
    optimum = ref / 3 + 2 * old / 3 + 5
    zero = inpo_loss(optimum, ref, old, eta=0.1)
    torch.testing.assert_close(zero, torch.zeros(2, dtype=torch.float64))


def test_the_token_reward_model_needs_no_reference():
    x = batch(ref_logp=None, old_logp=None)
    loss = GenARM(beta=0.5)(x).loss
    torch.testing.assert_close(loss, -F.logsigmoid(0.5 * margins(x, x.logp)).mean())


def test_guided_decoding_equals_the_released_decoder():
    base, reward, alpha = torch.randn(5), torch.randn(5), 2.5
    temperature = 1 / (1 + alpha)
    released = (base.log_softmax(-1) + alpha * reward.log_softmax(-1)) / (1 + alpha)
    expected = (released / temperature).softmax(-1)
    torch.testing.assert_close(guided_logp(base, reward, alpha).exp(), expected)
    torch.testing.assert_close(guided_logp(base, reward, 0.0), base.log_softmax(-1))


@pytest.mark.parametrize("module", [LDDPO(alpha=0.5), RPO(eta=1.0), INPO(), GenARM()])
def test_a_pair_that_lost_a_response_to_the_mask_is_left_out(module):
    mask = MASK.clone()
    mask[3] = 0
    x = batch(mask=mask)
    whole = batch()
    only = batch(
        logp=whole.logp[[0, 2]],
        ref_logp=whole.ref_logp[[0, 2]],
        old_logp=whole.old_logp[[0, 2]],
        mask=MASK[[0, 2]],
        chosen=torch.tensor([True, False]),
    )
    torch.testing.assert_close(module(x).loss, module(only).loss)


@pytest.mark.parametrize("module", [LDDPO(alpha=0.5), RPO(), INPO(), GenARM(), NLLAnchor(1.0)])
def test_without_tokens_the_loss_is_zero_with_a_gradient_path(module):
    x = batch(mask=torch.zeros(4, 4))
    loss = module(x).loss
    assert loss == 0
    loss.backward()
    assert torch.equal(x.logp.grad, torch.zeros(4, 4, dtype=torch.float64))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="alpha"):
        LDDPO(alpha=1.5)
    with pytest.raises(ValueError, match="kind must be kl"):
        LDDPO(divergence="forward_kl")
    with pytest.raises(ValueError, match="needs order="):
        LDDPO(divergence="alpha")
    with pytest.raises(ValueError, match="needs order="):
        LDDPO(order=0.5)
    with pytest.raises(ValueError, match="rows"):
        NLLAnchor(1.0, rows="rejected")
    with pytest.raises(ValueError, match="reduction"):
        sequence_nll(torch.zeros(1, 1), None, "mean")
