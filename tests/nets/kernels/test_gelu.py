import pytest
import torch

from offrl.nets.goal import held
from offrl.nets.mlp import MLP
from tests.nets.test_mlp import by_hand


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * 3


@pytest.mark.parametrize("lead", [(), (2, 3)])
@pytest.mark.parametrize("norm", [True, False])
def test_network_by_network_has_the_values_and_gradients_of_ordinary_operators(lead, norm):
    net = MLP((3, 8, 7, 2), lead, activation="gelu", norm=norm).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(draw(*p.shape) / 10)
    x = draw(*(2, 1)[: len(lead)], 600, 3).requires_grad_()
    ours, theirs = net(x), by_hand(net, x)
    torch.testing.assert_close(ours, theirs)
    along, inputs = draw(*ours.shape), [x, *net.parameters()]
    for pair in zip(*(torch.autograd.grad(y, inputs, along) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(*pair)
    with torch.no_grad():
        assert torch.equal(net(x), ours)


def test_networks_held_fixed_pass_gradients_on_and_receive_none():
    net = MLP((3, 8, 2), (2,), activation="gelu", norm=True).double()
    x = draw(1, 5, 3).requires_grad_()
    y = held(net, x)
    assert all(
        grad is None
        for grad in torch.autograd.grad(
            y.sum(), [*net.parameters()], allow_unused=True, retain_graph=True
        )
    )
    expected = torch.autograd.grad(by_hand(net, x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), expected)


def test_large_inputs_neither_overflow_nor_lose_their_gradient():
    net = MLP((1, 1, 1), activation="gelu")
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.fill_(1)
    x = torch.tensor([[-1e4], [-50.0], [0.0], [50.0], [1e4]], requires_grad=True)
    y = net(x)
    assert y.flatten().tolist() == [0.0, 0.0, 0.0, 50.0, 1e4]
    assert torch.autograd.grad(y.sum(), x)[0].flatten().tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
