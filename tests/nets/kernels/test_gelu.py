import pytest
import torch
from torch.nn import functional as F

from offrl.nets.goal import held
from offrl.nets.kernels.gelu import GeluMLP, plain


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * 3


@pytest.mark.parametrize("lead", [(), (2, 3)])
@pytest.mark.parametrize("norm", [True, False])
def test_network_by_network_has_the_values_and_gradients_of_ordinary_operators(lead, norm):
    net = GeluMLP((3, 8, 7, 2), lead, norm).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(draw(*p.shape) / 10)
    x = draw(*(2, 1)[: len(lead)], 600, 3).requires_grad_()
    ours, theirs = net(x), plain(x, net.parameters_by_layer())
    torch.testing.assert_close(ours, theirs)
    along, inputs = draw(*ours.shape), [x, *net.parameters()]
    for pair in zip(*(torch.autograd.grad(y, inputs, along) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(*pair)
    with torch.no_grad():
        assert torch.equal(net(x), ours)


def test_networks_held_fixed_pass_gradients_on_and_receive_none():
    net = GeluMLP((3, 8, 2), (2,)).double()
    x = draw(1, 5, 3).requires_grad_()
    y = held(net, x)
    assert all(
        grad is None
        for grad in torch.autograd.grad(
            y.sum(), [*net.parameters()], allow_unused=True, retain_graph=True
        )
    )
    expected = torch.autograd.grad(plain(x, net.parameters_by_layer()).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), expected)


def test_large_inputs_neither_overflow_nor_lose_their_gradient():
    net = GeluMLP((1, 1, 1), norm=False)
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.fill_(1)
    x = torch.tensor([[-1e4], [-50.0], [0.0], [50.0], [1e4]], requires_grad=True)
    y = net(x)
    assert y.flatten().tolist() == [0.0, 0.0, 0.0, 50.0, 1e4]
    assert torch.autograd.grad(y.sum(), x)[0].flatten().tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_a_layer_is_affine_then_gelu_then_norm_and_the_last_is_bare():
    net = GeluMLP((3, 8, 8, 2)).double()
    x = draw(5, 3)
    y = x
    for i, layer in enumerate(net.layers):
        y = y @ layer.weight + layer.bias
        if i < 2:
            y = F.layer_norm(F.gelu(y, approximate="tanh"), (8,), eps=1e-6)
    torch.testing.assert_close(net(x), y)


def test_members_of_a_stack_are_networks_of_their_own():
    net = GeluMLP((3, 8, 2), (2, 3)).double()
    with torch.no_grad():
        for p in net.norms.parameters():
            p.copy_(draw(*p.shape))
    x = draw(2, 1, 5, 3)
    whole = net(x)
    for i in range(2):
        for j in range(3):
            one = GeluMLP((3, 8, 2)).double()
            with torch.no_grad():
                for p, q in zip(one.parameters(), net.parameters(), strict=True):
                    p.copy_(q[i, j])
            torch.testing.assert_close(whole[i, j], one(x[i, 0]))


def test_weights_are_xavier_uniform_and_biases_zero():
    net = GeluMLP((100, 300, 50), last_scale=0.1, generator=torch.Generator().manual_seed(0))
    for layer, scale in zip(net.layers, (1.0, 0.1), strict=True):
        bound = scale * (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.99 * bound < float(layer.weight.abs().max()) <= bound
        assert float(layer.weight.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
        assert float(layer.bias.abs().max()) == 0.0


def test_without_norm_there_are_no_norms():
    assert not list(GeluMLP((3, 8, 2), norm=False).norms.parameters())
