import pytest
import torch

from offrl.nets import MLP, Critics, Linear
from offrl.nets.linear import affine

SHAPES = [((), ()), ((2,), ()), ((2,), (1,)), ((3, 2), (3, 1)), ((3, 2), (3, 2)), ((3,), (3,))]


def plain(x, weight, bias, relu):
    out = x @ weight + bias
    return out.relu() if relu else out


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("lead", "rows"), SHAPES)
def test_values_and_gradients_equal_the_plain_product(lead, rows, relu):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, requires_grad=True)  # noqa: E731
    inputs = draw(*rows, 5, 4), draw(*lead, 4, 3), draw(*lead, 1, 3)
    outs = affine(*inputs, relu), plain(*inputs, relu)
    torch.testing.assert_close(*outs)
    seed = torch.randn(outs[0].shape, generator=g)
    grads = [torch.autograd.grad(out, inputs, seed) for out in outs]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives_exist_and_are_right():
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True)
               for s in ((5, 4), (4, 3), (1, 3)))  # fmt: skip
    assert torch.autograd.gradgradcheck(lambda *a: affine(*a, False).square(), (x, w, b))


def test_one_network_takes_rows_with_extra_axes():
    layer = Linear(4, 3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(6, 2, 4)
    torch.testing.assert_close(layer(x), x @ layer.weight + layer.bias)


def test_frozen_weights_receive_no_gradient():
    layer = Linear(4, 3)
    x = torch.randn(5, 4, requires_grad=True)
    grads = torch.autograd.grad(
        layer(x, frozen=True).sum(), [x, *layer.parameters()], allow_unused=True
    )
    assert grads[0] is not None
    assert grads[1:] == (None, None)


def test_initialization_is_uniform_within_the_inverse_root_of_the_inputs():
    layer = Linear(100, 400, generator=torch.Generator().manual_seed(0))
    for p in (layer.weight, layer.bias):
        assert p.abs().max() <= 0.1
        assert p.abs().max() > 0.098
        assert abs(float(p.detach().mean())) < 0.01


def test_stacked_critics_hold_independent_networks():
    critics = Critics(3, 2, (8,), count=2, seeds=(4,), generator=torch.Generator().manual_seed(0))
    obs, act = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    q = critics(obs, act)
    assert q.shape == (4, 2, 5)
    assert not torch.allclose(q[:, 0], q[:, 1])
    torch.testing.assert_close(critics.first(obs, act), q[:, 0])


def test_mlp_is_affine_maps_with_relu_between():
    net = MLP((4, 8, 2), generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 4)
    one, two = net.layers
    expected = (x @ one.weight + one.bias).relu() @ two.weight + two.bias
    torch.testing.assert_close(net(x), expected)
