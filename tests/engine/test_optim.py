import pytest
import torch
from torch import nn

from offrl.engine.optim import adam, adamw, descend, polyak, warm_up


def test_descend_touches_only_its_own_parameters():
    mine, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = adam([mine], 0.1)
    descend(opt, (mine * other).sum(), {})
    assert (mine < 1).all()
    assert torch.equal(other, torch.ones(3))
    assert other.grad is None


def test_first_adam_step_moves_by_the_learning_rate():
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    descend(adam([p], 0.01), (p * torch.tensor([3.0, -0.5])).sum(), {})
    torch.testing.assert_close(p.detach(), torch.tensor([0.99, -1.99]))


def test_clipping_is_per_seed():
    p = nn.Parameter(torch.zeros(2, 4))
    slope = torch.stack([torch.full((4,), 100.0), torch.full((4,), 0.01)])
    opt = torch.optim.SGD([p], lr=1.0)
    descend(opt, (p * slope).sum(-1), {}, clip=1.0)
    norms = p.detach().norm(dim=-1)
    assert float(norms[0]) == pytest.approx(1.0, rel=1e-5)
    assert float(norms[1]) == pytest.approx(0.02, rel=1e-4)  # below the bound: untouched


def test_unused_parameters_get_zero_gradient():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    descend(torch.optim.SGD([used, unused], lr=1.0), used.sum(), {})
    assert torch.equal(unused, torch.ones(2))


def test_polyak_moves_every_parameter_by_tau():
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    before = [p.clone() for p in a.parameters()]
    polyak(a, b, 0.25)
    for old, new, online in zip(before, a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * online)


def test_a_single_seeds_clip_is_joint_over_tensors():
    one, other = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 2))
    opt = torch.optim.SGD([one, other], lr=1.0)
    descend(opt, 30 * one.sum() + 40 * other.sum(), {}, clip=1.0)
    torch.testing.assert_close(one.detach(), torch.full((4,), -0.3))
    torch.testing.assert_close(other.detach(), torch.full((2, 2), -0.4))
    descend(opt, 0.03 * one.sum() + 0.04 * other.sum(), {}, clip=1.0)  # below the bound
    torch.testing.assert_close(one.detach(), torch.full((4,), -0.33))


def test_warm_up_raises_every_group_linearly_and_stops():
    one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    opt = adamw([([one], 0.1), ([other], 0.0)])
    rates = []
    for _ in range(5):
        warm_up(opt, 0.4, 4)
        rates.append([float(group["lr"]) for group in opt.param_groups])
    assert rates == [pytest.approx([rate] * 2) for rate in (0.1, 0.2, 0.3, 0.4, 0.4)]


def test_only_groups_with_weight_decay_decay_and_the_rate_is_read_from_its_tensor():
    one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    opt = adamw([([one], 0.5), ([other], 0.0)])
    warm_up(opt, 0.1, 1)
    descend(opt, 0 * one.sum() + 0 * other.sum(), {})
    assert float(one.detach()) == pytest.approx(1 - 0.1 * 0.5)
    assert float(other.detach()) == 1
