import doctest

import pytest
import torch
from torch import nn

from offrl.regularizers import LipschitzPenalty, RegInputs, lipschitz
from offrl.regularizers.lipschitz import (
    lipschitz_bound,
    lipschitz_penalty,
    spectral_clip,
    spectral_refresh,
)

WEIGHT = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def linear(x):
    return x @ WEIGHT


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1)).double()
    return net, lambda x: net(x).squeeze(-1)


def points(count=64):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, generator=g, dtype=torch.float64)
    return x, torch.rand(count, 3, generator=g, dtype=torch.float64) * 2 - 1


def test_docstring_examples():
    assert doctest.testmod(lipschitz).failed == 0


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_a_linear_value_reaches_its_norm_with_every_solver(norm):
    x, start = points()
    size = WEIGHT.abs().sum() if norm == "inf" else WEIGHT.norm()
    expected = (0.1 * size).square().expand(64)
    signs = lipschitz_penalty(linear, x, 0.1, norm)
    torch.testing.assert_close(signs, expected)
    torch.testing.assert_close(lipschitz_penalty(linear, x, 0.1, norm, start), expected)
    climbed = lipschitz_penalty(linear, x, 0.1, norm, start, steps=10)
    torch.testing.assert_close(climbed, expected, rtol=1e-9 if norm == "inf" else 0.05, atol=0)
    torch.testing.assert_close(lipschitz_penalty(linear, x, 0.3, norm), 9 * expected)


def test_a_start_at_zero_is_the_trap_and_a_random_one_is_not():
    x, start = points()
    _, f = network()
    trapped = lipschitz_penalty(f, x, 0.1, start=torch.zeros_like(x))
    assert torch.equal(trapped, torch.zeros_like(trapped))
    assert (lipschitz_penalty(f, x, 0.1, start=start) > 0).any()


def test_adversarial_noise_beats_random_noise_and_stays_in_the_ball():
    x, start = points()
    seen = []

    def f(z):
        seen.append(z.detach())
        return z.square().sum(-1).sin()

    for norm in ("inf", "2"):
        seen.clear()
        worst = lipschitz_penalty(f, x, 0.1, norm)
        size = (seen[-1] - x).abs().amax(-1) if norm == "inf" else (seen[-1] - x).norm(dim=-1)
        assert (size <= 0.1 + 1e-9).all()
        noise = lipschitz.into_ball(0.1 * start, 0.1, norm)
        assert (worst >= (f(x + noise) - f(x)).square() - 1e-3).all()
        assert worst.mean() > 2 * (f(x + noise) - f(x)).square().mean()


def test_the_gradient_treats_the_noise_as_fixed_and_leaves_no_other_trace():
    x, _ = points(8)
    x.requires_grad_()
    net, f = network()
    penalty = lipschitz_penalty(f, x, 0.1).sum()
    assert all(p.grad is None for p in net.parameters())
    penalty.backward()
    assert x.grad is None
    delta = lipschitz.two_signs(f, x.detach(), 0.1, "inf", None)
    expected = torch.autograd.grad((f(x + delta) - f(x)).square().sum(), list(net.parameters())[:2])
    for p, grad in zip(net.parameters(), expected, strict=False):
        torch.testing.assert_close(p.grad, grad)


def test_detaching_the_clean_value_halves_the_reach_of_the_gradient():
    x, _ = points(8)
    bias = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    for detach, moves in ((False, False), (True, True)):
        penalty = lipschitz_penalty(lambda z: linear(z) + bias, x, 0.1, detach_clean=detach)
        (grad,) = torch.autograd.grad(penalty.sum(), bias)
        assert bool(grad.any()) == moves


def test_constants_cost_nothing_and_scale_counts_squared():
    x, _ = points()
    _, f = network()
    assert not lipschitz_penalty(lambda z: 0 * f(z) + 3, x, 0.1).any()
    torch.testing.assert_close(
        lipschitz_penalty(lambda z: 3 * f(z), x, 0.1), 9 * lipschitz_penalty(f, x, 0.1)
    )


def test_masked_rows_cost_nothing_whatever_they_hold():
    x, start = points(4)
    mask = torch.tensor([1, 0, 1, 0])
    bad = torch.where(mask.bool().unsqueeze(-1), x, torch.nan)
    _, f = network()
    for given in (None, start):
        penalty = lipschitz_penalty(f, bad, 0.1, start=given, mask=mask)
        whole = lipschitz_penalty(f, x, 0.1, start=given)
        torch.testing.assert_close(penalty, whole * mask)


def test_the_module_scales_once():
    x, start = points()
    extra = {"value_function": linear, "inputs": x, "start": start}
    out = LipschitzPenalty(0.5, 0.1)(RegInputs(extra=extra))
    torch.testing.assert_close(out.per_element, 0.5 * lipschitz_penalty(linear, x, 0.1))
    torch.testing.assert_close(out.metrics["slope"], WEIGHT.abs().sum())
    climbed = LipschitzPenalty(0.5, 0.1, norm="2", random_start=True, steps=4)
    expected = lipschitz_penalty(linear, x, 0.1, "2", start, 4)
    torch.testing.assert_close(climbed(RegInputs(extra=extra)).per_element, 0.5 * expected)
    assert climbed.requires == {"extra.value_function", "extra.inputs", "extra.start"}


def test_clipped_layers_are_untouched_below_the_bound_and_end_at_it_above():
    torch.manual_seed(0)
    small, large = nn.Linear(6, 5).double(), nn.Linear(6, 5).double()
    with torch.no_grad():
        large.weight.mul_(20)
    before = small.weight.detach().clone()
    for layer in (small, large):
        spectral_clip(layer, 2.0)
        spectral_refresh(layer, 50)
    assert torch.equal(small.weight, before)
    top = torch.linalg.matrix_norm(large.weight.detach(), 2)
    torch.testing.assert_close(top, torch.tensor(2.0, dtype=torch.float64), rtol=1e-3, atol=0)
    hard = spectral_clip(nn.Linear(6, 5), 3.0, "hard")
    spectral_refresh(hard, 50)
    top = torch.linalg.matrix_norm(hard.weight.detach(), 2)
    torch.testing.assert_close(top, torch.tensor(3.0), rtol=1e-3, atol=0)


def test_a_clipped_network_obeys_its_bound():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(8)
    spectral_clip(net, 1.5)
    spectral_refresh(net, 50)
    bound = lipschitz_bound(net)
    assert bound <= 1.5**3 * 1.001
    x, y = torch.randn(500, 4), torch.randn(500, 4)
    ratio = (net(x) - net(y)).norm(dim=-1) / (x - y).norm(dim=-1)
    assert (ratio <= bound * 1.001).all()
    assert lipschitz_bound(nn.Linear(2, 2)) == 1


def test_stacked_layers_have_their_own_norms():
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            scale = torch.tensor([0.1, 10.0]).view(2, 1, 1)
            self.weight = nn.Parameter(torch.eye(3).expand(2, 3, 3) * scale)

    layer = spectral_clip(Stacked(), 1.0)
    spectral_refresh(layer)
    torch.testing.assert_close(layer.weight[0], 0.1 * torch.eye(3))
    torch.testing.assert_close(layer.weight[1], torch.eye(3))
    torch.testing.assert_close(lipschitz_bound(layer), torch.tensor([0.1, 1.0]))


def test_the_norm_is_differentiated_and_only_refreshing_moves_its_vectors():
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    clip = lipschitz.SpectralClip(weight.detach(), 0.1)
    state = {key: value.clone() for key, value in clip.state_dict().items()}
    assert torch.autograd.gradcheck(lambda w: clip.double()(w), (weight,))
    for key, value in clip.state_dict().items():
        torch.testing.assert_close(value, state[key].double())
    assert not list(clip.parameters())
    with pytest.raises(ValueError, match="mode"):
        lipschitz.SpectralClip(weight, 1.0, "soft")
