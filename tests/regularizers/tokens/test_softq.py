import doctest
import math

import pytest
import torch
from torch.nn import functional as F

from offrl.regularizers import Compose, RegInputs
from offrl.regularizers.tokens import softq
from offrl.regularizers.tokens.softq import InverseSoftQ, next_values, soft_q_weight

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]])


def batch(logits, labels, **changes):
    lse = logits.logsumexp(-1)
    logp = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - lse
    return RegInputs(**dict(logp=logp, stats={"lse": lse}, mask=MASK) | changes)


def random(seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 4, 7, generator=g, dtype=torch.float64).requires_grad_()
    return logits, torch.randint(7, (3, 4), generator=g)


def loss_of(module, x):
    return Compose([module]).run_loss(x)[0]


def test_docstring_examples():
    assert doctest.testmod(softq).failed == 0


def test_infinite_alpha_is_cross_entropy_exactly():
    logits, labels = random()
    x = batch(logits, labels)
    out = InverseSoftQ(alpha=math.inf, gamma=0.9)(x)
    assert torch.equal(out.per_element, torch.where(MASK.bool(), -x.logp, 0.0))
    loss = loss_of(InverseSoftQ(alpha=math.inf, gamma=0.9), x)
    kept = MASK.bool()
    expected = F.cross_entropy(logits[kept], labels[kept])
    torch.testing.assert_close(loss, expected)
    got, want = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (loss, expected))
    torch.testing.assert_close(got, want)


def test_a_constant_on_all_logits_changes_only_the_regularizer():
    logits, labels = random()
    shifted = logits + 3.0
    plain, moved = (InverseSoftQ()(batch(z, labels)).per_element for z in (logits, shifted))
    torch.testing.assert_close(plain, moved)
    module = InverseSoftQ(alpha=0.5, gamma=0.9)
    before, after = (module(batch(z, labels)).metrics for z in (logits, shifted))
    torch.testing.assert_close(before["nll"], after["nll"])
    # Q moves by 3, gamma V' by 2.7, and by nothing after the last token.
    gap = (after["reward"] - before["reward"]) * MASK.sum()
    torch.testing.assert_close(gap, torch.tensor(5 * 0.3 + 3 * 3.0, dtype=torch.float64))


def test_the_loss_equals_the_inverse_soft_q_objective():
    logits, labels = random()
    alpha, gamma = 0.7, 0.9
    loss = loss_of(InverseSoftQ(alpha, gamma), batch(logits, labels))
    total, count = 0.0, 0
    for i in range(3):
        steps = [t for t in range(4) if MASK[i, t]]
        for t, after in zip(steps, [*steps[1:], None], strict=True):
            value = logits[i, t].logsumexp(-1)
            following = 0.0 if after is None else gamma * logits[i, after].logsumexp(-1)
            reward = logits[i, t, labels[i, t]] - following
            total = total - reward + (value - following) + reward**2 / (4 * alpha)
            count += 1
    torch.testing.assert_close(loss, total / count)
    grads = [torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (loss, total / count)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("divergence", ["hellinger", "kl", "kl-shifted", "js"])
def test_other_divergences_weigh_the_reward_without_gradient(divergence):
    logits = torch.rand(1, 1, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[2]])
    out = InverseSoftQ(divergence=divergence)(batch(logits, labels, mask=None))
    reward, value = logits[0, 0, 2], logits[0, 0].logsumexp(-1)
    r = reward.detach()
    weight = {
        "hellinger": 1 / (1 + r) ** 2,
        "kl": torch.exp(-r),
        "kl-shifted": torch.exp(-r - 1),
        "js": torch.exp(-r) / (2 - torch.exp(-r)),
    }[divergence]
    expected = -weight * reward + value
    torch.testing.assert_close(out.per_element[0, 0], expected)
    (got,), (want,) = (
        torch.autograd.grad(v, logits, retain_graph=True) for v in (out.per_element.sum(), expected)
    )
    torch.testing.assert_close(got, want)


def test_weights_are_one_at_reward_zero_and_stay_finite():
    extreme = torch.tensor([-1e9, -3.0, 1e9])
    for divergence in ("hellinger", "kl", "js"):
        assert soft_q_weight(torch.zeros(1), divergence) == 1
        weight = soft_q_weight(extreme, divergence)
        assert weight.isfinite().all()
        assert (weight >= 0).all()
        assert (weight.diff() <= 0).all()
    with pytest.raises(ValueError, match="divergence"):
        soft_q_weight(extreme, "tv")


def test_the_next_value_skips_what_is_masked():
    values = torch.tensor([[1.0, math.nan, 3.0, 4.0], [5.0, 6.0, math.inf, 0.0]])
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]])
    following, known = next_values(values, mask, torch.tensor([True, False]))
    assert following.tolist() == [[3, 3, 4, 0], [6, 0, 0, 0]]
    assert (known & mask.bool()).tolist() == [[1, 0, 1, 1], [1, 0, 0, 0]]


def test_a_cut_off_sequence_has_no_reward_at_its_last_token():
    logits, labels = random()
    x = batch(logits, labels, finished=torch.tensor([True, False, True]))
    ended = InverseSoftQ(alpha=0.5)(x).per_element
    cut = InverseSoftQ(alpha=0.5, following="truncated")(x).per_element
    differs = (ended != cut).nonzero().tolist()
    assert differs == [[1, 1]]
    torch.testing.assert_close(cut[1, 1], -batch(logits, labels).logp[1, 1])


def test_control_takes_the_next_state_value_from_outside():
    logits, labels = random()
    flat = batch(logits[:, 0], labels[:, 0], mask=None)
    after = logits[:, 1].logsumexp(-1)
    flat.extra["next_lse"] = after
    out = InverseSoftQ(alpha=0.5, gamma=0.9, following="given")(flat)
    reward = flat.logp + flat.stats["lse"] - 0.9 * after
    torch.testing.assert_close(out.per_element, -flat.logp + reward.square() / 2)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="alpha"):
        InverseSoftQ(alpha=0.0)
    with pytest.raises(ValueError, match="divergence"):
        InverseSoftQ(divergence="tv")
