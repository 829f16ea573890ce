import doctest
import math

import pytest
import torch

from offrl.regularizers import ClipCov, Compose, KLCov, LowProbability, RegInputs
from offrl.regularizers.functional import (
    covariance,
    low_probability_loss,
    low_probability_mask,
    proxy_logp,
)
from offrl.regularizers.tokens import selective
from offrl.regularizers.tokens.statistics import LogMass, MinP, Threshold, token_stats_from_logits

close = torch.testing.assert_close


def test_docstring_examples():
    assert doctest.testmod(selective).failed == 0


# Lp-Reg


def proxy_by_hand(logits, action, threshold, mode):
    p = logits.softmax(-1)
    kept = p >= (threshold * p.amax(-1, keepdim=True) if mode == "minp" else threshold)
    q = torch.where(kept, p, 0.0)
    q = q / q.sum(-1, keepdim=True)
    log_mass = torch.where(kept, p, 0.0).sum(-1).log()
    return q.gather(-1, action[..., None])[..., 0].log(), log_mass


@pytest.mark.parametrize("mode", ["minp", "fixed"])
def test_proxy_from_three_numbers_equals_the_renormalized_distribution(mode):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 9, 7, generator=g, dtype=torch.float64) * 2
    action = torch.randint(0, 7, (4, 9), generator=g)
    expected, log_mass = proxy_by_hand(logits, action, 0.05, mode)
    logp = logits.log_softmax(-1)
    taken = logp.gather(-1, action[..., None])[..., 0]
    found = proxy_logp(taken, log_mass, logp.amax(-1), 0.05, mode)
    assert (found == -torch.inf).any()
    close(found, expected)


@pytest.mark.parametrize("mode", ["minp", "fixed"])
def test_token_statistics_make_the_three_numbers(mode):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 9, 7, generator=g, dtype=torch.float64) * 2
    action = torch.randint(0, 7, (4, 9), generator=g)
    kept = MinP(0.05) if mode == "minp" else Threshold(0.05)
    want = {"logp": "logp", "log_mass": LogMass(kept), "log_top": LogMass(MinP(1.0))}
    found = token_stats_from_logits(logits, action, want)
    found = proxy_logp(found["logp"], found["log_mass"], found["log_top"], 0.05, mode)
    close(found, proxy_by_hand(logits, action, 0.05, mode)[0])


def test_relative_threshold_needs_the_largest_probability():
    with pytest.raises(ValueError, match="log_top"):
        proxy_logp(torch.zeros(2), torch.zeros(2))


def tokens():
    """Six tokens: 0 and 5 have no negative advantage, 2 was filtered out of the proxy."""
    logp = torch.tensor([[-6.0, -4.0, -5.0], [-3.0, -1.0, -9.0]])
    proxy = torch.tensor([[-5.0, -3.5, -torch.inf], [-2.5, -1.5, -8.0]])
    advantages = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 0.0]])
    return logp, proxy, advantages


def test_selection_takes_unlikely_negative_tokens_below_their_proxy():
    logp, proxy, advantages = tokens()
    chosen = low_probability_mask(logp, proxy, advantages, share=1.0)
    assert chosen.tolist() == [[False, True, False], [True, False, False]]
    chosen = low_probability_mask(logp, proxy, advantages, share=0.5)  # two lowest of four
    assert chosen.tolist() == [[False, True, False], [False, False, False]]
    assert not low_probability_mask(logp, proxy, advantages, share=0.2).any()


def test_no_effect_when_no_advantage_is_negative():
    logp, proxy, advantages = tokens()
    leaf = logp.clone().requires_grad_()
    x = RegInputs(logp=leaf, stats={"proxy_logp": proxy}, advantages=advantages.abs())
    out = LowProbability(share=1.0)(x).per_element
    assert (out == 0).all()
    assert (torch.autograd.grad(out.sum(), leaf)[0] == 0).all()


def test_gradient_raises_the_chosen_tokens_and_touches_no_other():
    logp, proxy, advantages = tokens()
    leaf = logp.clone().requires_grad_()
    x = RegInputs(logp=leaf, stats={"proxy_logp": proxy}, advantages=advantages)
    value = LowProbability(0.5, share=1.0)(x).per_element
    grad = torch.autograd.grad(value.sum(), leaf)[0]
    chosen = low_probability_mask(logp, proxy, advantages, share=1.0)
    d = logp - proxy
    close(value[chosen], 0.5 * (torch.exp(-d) - 1 + d)[chosen])
    assert (grad[chosen] < 0).all()
    assert (grad[~chosen] == 0).all()


def test_padding_is_never_chosen():
    logp, proxy, advantages = tokens()
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    logp[0, 1] = torch.nan
    chosen = low_probability_mask(logp, proxy, advantages, mask, share=1.0)
    assert chosen.tolist() == [[False, False, False], [True, False, False]]


def test_replacement_is_the_unclipped_surrogate_plus_the_penalty():
    logp, proxy, advantages = tokens()
    old = logp + 0.3
    leaf = logp.clone().requires_grad_()
    value = low_probability_loss(leaf, old, advantages, proxy, coef=0.7)
    assert value.isfinite().all()  # also where the proxy is zero
    ratio, d = math.exp(-0.3), logp - proxy
    expected = -advantages * ratio + 0.7 * (torch.exp(-d) - 1 + d)
    close(value[proxy.isfinite()], expected[proxy.isfinite()])
    assert torch.autograd.grad(value.sum(), leaf)[0].isfinite().all()


def test_with_the_released_clip_range_the_module_beside_the_surrogate_is_the_replacement():
    logp, proxy, advantages = tokens()
    old = logp + torch.tensor([[0.3, -2.0, 0.1], [3.0, 0.0, -0.5]])
    leaf = logp.clone().requires_grad_()
    ratio = (leaf - old).exp()
    surrogate = -torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - 1.0, 1 + 9.0))
    x = RegInputs(logp=leaf, stats={"proxy_logp": proxy}, advantages=advantages)
    beside = surrogate + LowProbability(share=1.0)(x).per_element
    chosen = low_probability_mask(leaf, proxy, advantages, share=1.0)
    replaced = torch.where(chosen, low_probability_loss(leaf, old, advantages, proxy), surrogate)
    close(beside, replaced)
    grads = [torch.autograd.grad(v.sum(), leaf, retain_graph=True)[0] for v in (beside, replaced)]
    close(*grads)


# Covariance


def test_covariance_is_centered_over_the_valid_tokens():
    g = torch.Generator().manual_seed(0)
    logp, advantages = torch.randn(4, 5, generator=g), torch.randn(4, generator=g)
    mask = torch.rand(4, 5, generator=g) > 0.3
    found = covariance(logp.masked_fill(~mask, torch.nan), advantages, mask)
    a, b = advantages[:, None].expand(4, 5)[mask], logp[mask]
    close(found[mask], (a - a.mean()) * (b - b.mean()))
    close(found[mask].mean(), torch.cov(torch.stack([a, b]), correction=0)[0, 1])
    assert (found[~mask] == 0).all()


def cov_inputs(rows=40, tokens=50):
    g = torch.Generator().manual_seed(0)
    return RegInputs(
        logp=torch.randn(rows, tokens, generator=g).requires_grad_(),
        old_logp=torch.randn(rows, tokens, generator=g),
        advantages=torch.randn(rows, generator=g),
        mask=torch.rand(rows, tokens, generator=g) > 0.5,
        extra={"noise": torch.rand(rows, tokens, generator=g)},
    )


def test_clip_cov_drops_the_asked_share_of_tokens_within_the_bounds():
    x = cov_inputs()
    weight = ClipCov(fraction=0.02)(x).token_weight
    dropped = weight == 0
    score = covariance(x.logp, x.advantages, x.mask)
    assert dropped.sum() == int(0.02 * x.mask.sum())
    assert ((score[dropped] > 1) & (score[dropped] < 5)).all()
    assert x.mask[dropped].all()
    noise = x.extra["noise"].masked_fill(~((score > 1) & (score < 5) & x.mask), 2.0)
    assert noise[dropped].max() < noise[~dropped].min()


def test_clip_cov_drops_one_token_at_least_and_no_more_than_there_are():
    x = cov_inputs()
    assert (ClipCov(fraction=1e-9)(x).token_weight == 0).sum() == 1
    score = covariance(x.logp, x.advantages, x.mask)
    everything = (ClipCov(fraction=1.0)(x).token_weight == 0).sum()
    assert everything == ((score > 1) & (score < 5) & x.mask).sum()
    assert (ClipCov(low=50.0, high=60.0)(x).token_weight == 1).all()


def test_clip_cov_draws_from_its_generator():
    x = cov_inputs()
    del x.extra["noise"]

    def draw(seed):
        return ClipCov(torch.Generator().manual_seed(seed), fraction=0.02)(x).token_weight

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert "extra.noise" in ClipCov().requires
    with pytest.raises(ValueError, match=r"extra\.noise"):
        ClipCov()(x)


def test_kl_cov_prices_the_drift_of_the_largest_covariances_only():
    x = cov_inputs()
    value = KLCov(0.5, fraction=0.02)(x).per_element
    score = covariance(x.logp, x.advantages, x.mask)
    top = score.masked_fill(~x.mask, -torch.inf).flatten().topk(int(0.02 * x.mask.sum())).indices
    expected = torch.zeros(score.numel()).index_put(
        (top,), 0.5 * (x.logp - x.old_logp).abs().detach().flatten()[top]
    )
    close(value, expected.view_as(score))
    grad = torch.autograd.grad(value.sum(), x.logp)[0]
    close(grad, torch.where(value > 0, 0.5 * (x.logp - x.old_logp).sign(), 0.0))


def test_kl_cov_has_no_gradient_on_the_policy_that_sampled():
    x = cov_inputs()
    x.old_logp = x.logp.detach()
    value = KLCov(fraction=0.02)(x).per_element
    assert (torch.autograd.grad(value.sum(), x.logp)[0] == 0).all()


def test_control_actor_and_token_policy_of_one_token_agree():
    x = cov_inputs(12, 1)
    x.stats["proxy_logp"] = x.old_logp + 0.5
    flat = RegInputs(
        logp=x.logp[:, 0],
        old_logp=x.old_logp[:, 0],
        advantages=x.advantages,
        mask=x.mask[:, 0],
        stats={"proxy_logp": x.stats["proxy_logp"][:, 0]},
        extra={"noise": x.extra["noise"][:, 0]},
    )
    parts = [LowProbability(share=0.5), ClipCov(fraction=0.2, low=0.0), KLCov(fraction=0.2)]
    values = [Compose(parts).run_loss(inputs)[0] for inputs in (x, flat)]
    assert values[0] > 0
    close(values[0], values[1])
