import doctest
import math

import pytest
import torch
from torch.nn import functional as F

from offrl.regularizers import Compose, ProgressiveTarget, RegInputs, self_evolution
from offrl.regularizers.self_evolution import progressive_target, smoothed_nll


def at_step(step, **options):
    module = ProgressiveTarget(**options)
    for _ in range(step):
        module.update({})
    return module


def batch(prediction, act, previous, mask=None):
    return RegInputs(extra=dict(prediction=prediction, act=act, previous=previous), mask=mask)


def actions(seed=0):
    g = torch.Generator().manual_seed(seed)
    prediction, act, previous = (torch.randn(4, 3, 2, generator=g) for _ in range(3))
    return prediction.requires_grad_(), act, previous


def gradient(module, x, leaf):
    return torch.autograd.grad(Compose([module]).run_loss(x)[0], leaf)[0]


def test_docstring_examples():
    assert doctest.testmod(self_evolution).failed == 0


def test_the_schedule_of_the_released_code_reaches_its_cap_at_stage_24():
    module = ProgressiveTarget()
    blends = []
    for stage in range(41):
        module.step.fill_(2500 * stage)
        blends.append(float(module.blend))
        module.step.fill_(2500 * stage + 2499)
        assert float(module.blend) == blends[-1]
    assert blends[0] == 0
    assert math.isclose(blends[1], 0.85 / 40, rel_tol=1e-6)
    assert blends[23] < 0.5
    assert blends[24:] == [0.5] * 17


def test_stages_end_where_the_blend_changes_next():
    module = ProgressiveTarget(stages=4, stage_steps=3)
    ends, blends = [], []
    for _ in range(7):
        blends.append(float(module.blend))
        module.update({})
        ends.append(bool(module.stage_ends))
    assert ends == [False, False, True, False, False, True, False]
    expected = 0.2125 * torch.tensor([0, 0, 0, 1, 1, 1, 2])
    torch.testing.assert_close(torch.tensor(blends), expected)
    module.eval().update({})
    assert int(module.step) == 7


def test_before_the_first_stage_ends_the_gradient_is_the_plain_one():
    prediction, act, previous = actions()
    x = batch(prediction, act, previous)
    plain = torch.autograd.grad((prediction - act).square().mean(), prediction)[0]
    torch.testing.assert_close(gradient(ProgressiveTarget(), x, prediction), plain)


def test_a_teacher_that_is_the_student_only_rescales_the_gradient():
    prediction, act, _ = actions()
    module = at_step(4, stages=4, stage_steps=1, final=0.4, cap=1.0)
    x = batch(prediction, act, prediction)
    plain = torch.autograd.grad((prediction - act).square().mean(), prediction)[0]
    torch.testing.assert_close(gradient(module, x, prediction), 0.6 * plain)


def test_without_the_detaching_the_student_as_teacher_rescales_the_gradient_twice(monkeypatch):
    """What the released code would do, had it not set its blend to 0."""
    prediction, act, _ = actions()
    attached = lambda act, previous, blend: (1 - blend) * act + blend * previous  # noqa: E731
    monkeypatch.setattr(self_evolution, "progressive_target", attached)
    module = at_step(4, stages=4, stage_steps=1, final=0.4, cap=1.0)
    x = batch(prediction, act, prediction)
    plain = torch.autograd.grad((prediction - act).square().mean(), prediction)[0]
    torch.testing.assert_close(gradient(module, x, prediction), 0.6**2 * plain)


def test_a_lagged_teacher_moves_the_target():
    prediction, act, previous = actions()
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]])
    module = at_step(2, coef=2.0, stages=4, stage_steps=1)
    target = progressive_target(act, previous, 0.425)
    torch.testing.assert_close(target, 0.575 * act + 0.425 * previous)
    loss = Compose([module]).run_loss(batch(prediction, act, previous, mask))[0]
    each = (prediction - target).square().mean(-1) * mask
    torch.testing.assert_close(loss, 2 * each.sum() / 6)
    assert not target.requires_grad


def test_smoothing_interpolates_between_the_token_and_the_earlier_policy():
    logits, previous = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    tokens = torch.arange(5)
    hard = smoothed_nll(logits, tokens, previous, 0.0)
    torch.testing.assert_close(hard, F.cross_entropy(logits, tokens, reduction="none"))
    soft = smoothed_nll(logits, tokens, previous, 1.0)
    teacher = previous.softmax(-1)
    torch.testing.assert_close(
        soft, F.cross_entropy(logits, teacher, reduction="none"), rtol=1e-5, atol=1e-6
    )
    mixed = smoothed_nll(logits, tokens, previous, 0.3)
    torch.testing.assert_close(mixed, 0.7 * hard + 0.3 * soft)
    (grad,) = torch.autograd.grad(mixed.sum(), logits)
    target = 0.7 * F.one_hot(tokens, 7) + 0.3 * teacher
    torch.testing.assert_close(grad, logits.detach().softmax(-1) - target)


def test_excluded_and_masked_tokens_leave_smoothing_finite():
    logits = torch.tensor([[0.1, -math.inf, 0.4], [math.nan] * 3], requires_grad=True)
    previous = torch.tensor([[0.2, -math.inf, 0.1], [math.inf] * 3])
    mask = torch.tensor([1, 0])
    loss = smoothed_nll(logits, torch.tensor([0, -100]), previous, 0.5, mask)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all()
    assert loss[1] == 0
    assert grad.isfinite().all()


def test_shares_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="final and cap"):
        ProgressiveTarget(final=1.5)
