"""One perceptron: every activation, with and without norms, alone and in stacks."""

import math

import pytest
import torch
from torch.nn import functional as F

from offrl.nets.mlp import MLP

ACTIVATIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}
every = pytest.mark.parametrize("activation", ACTIVATIONS)
normed = pytest.mark.parametrize("norm", [False, True])


def made(dims, lead=(), activation="relu", norm=False):
    """A network in float64 whose biases and norms are not at their initial values."""
    net = MLP(dims, lead, torch.Generator().manual_seed(0), activation, norm).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(drawn(*p.shape) / 10)
    return net


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(net, x):
    """The network in torch's own operators."""
    for i, (weight, bias, *scale) in enumerate(net.maps()):
        x = x @ weight + bias
        if i < len(net.layers) - 1:
            x = ACTIVATIONS[net.activation](x)
        if scale:
            x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale[0] + scale[1]
    return x


@every
@normed
@pytest.mark.parametrize(("lead", "rows"), [((), ()), ((), (4,)), ((2,), ()), ((3, 2), (3, 1))])
def test_values_and_gradients_are_those_of_torchs_own_operators(activation, norm, lead, rows):
    net, x = made((3, 8, 7, 2), lead, activation, norm), drawn(*rows, 5, 3).requires_grad_()
    assert len(net.maps()[0]) == (4 if norm else 2)
    outs = net(x), by_hand(net, x)
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad(out.square().sum(), [x, *net.parameters()]) for out in outs]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert torch.equal(net(x), outs[0])


@every
@normed
def test_second_derivatives_exist_and_are_right(activation, norm):
    net = made((3, 5, 4, 2), (2,), activation, norm)
    names = [name for name, _ in net.named_parameters()]

    def value(x, *params):
        weights = dict(zip(names, params, strict=True))
        return torch.func.functional_call(net, weights, (x,)).square()

    params = [p.detach().requires_grad_() for p in net.parameters()]
    assert torch.autograd.gradgradcheck(value, (drawn(1, 4, 3).requires_grad_(), *params))


@every
@normed
def test_a_penalty_on_the_slope_reaches_the_weights(activation, norm):
    """The gradient of |dy/dx|^2 against that of torch's own operators."""
    net, x = made((3, 8, 8, 1), (), activation, norm), drawn(6, 3).requires_grad_()
    found = []
    for out in (net(x), by_hand(net, x)):
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        penalty = slope.square().sum()
        found.append(torch.autograd.grad(penalty, net.layers[0].weight)[0])
    torch.testing.assert_close(*found)
    assert float(found[0].abs().max()) > 0


@every
@normed
def test_features_and_head_make_the_network(activation, norm):
    net, x = made((3, 8, 7, 2), (2,), activation, norm), drawn(5, 3)
    torch.testing.assert_close(net.head(net.features(x)), net(x))
    assert net.features(x).shape == (2, 5, 7)


@every
@normed
def test_frozen_weights_receive_no_gradient(activation, norm):
    net, x = made((4, 8, 3), (), activation, norm), drawn(5, 4).requires_grad_()
    out = net(x, frozen=True)
    of_x, *others = torch.autograd.grad(out.sum(), [x, *net.parameters()], allow_unused=True)
    assert others == [None] * len(others)
    assert torch.equal(of_x, torch.autograd.grad(net(x).sum(), x)[0])


@every
@normed
def test_members_of_a_stack_are_networks_of_their_own(activation, norm):
    net, x = made((3, 8, 2), (2, 3), activation, norm), drawn(2, 1, 5, 3)
    whole = net(x)
    for i in range(2):
        for j in range(3):
            one = MLP((3, 8, 2), activation=activation, norm=norm).double()
            with torch.no_grad():
                for p, q in zip(one.parameters(), net.parameters(), strict=True):
                    p.copy_(q[i, j])
            torch.testing.assert_close(whole[i, j], one(x[i, 0]))


@pytest.mark.parametrize("dims", [(5, 8, 3), (64, 256, 256, 1)])
def test_features_and_head_make_a_relu_network_bit_for_bit(dims):
    net = MLP(dims, (2,), torch.Generator().manual_seed(0))
    x = torch.randn(64, dims[0], generator=torch.Generator().manual_seed(1))
    outs = net(x), net.head(net.features(x))
    assert torch.equal(*outs)
    grads = [torch.autograd.grad(out.square().sum(), list(net.parameters())) for out in outs]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_weights_of_tanh_are_orthogonal_and_biases_zero():
    net = MLP((6, 8, 4), (2,), torch.Generator().manual_seed(0), "tanh", last=0.01)
    for layer, gain in zip(net.layers, (math.sqrt(2), 0.01), strict=True):
        for weight in layer.weight:
            small = weight @ weight.mT if len(weight) < weight.shape[-1] else weight.mT @ weight
            torch.testing.assert_close(small / gain**2, torch.eye(len(small)))
        assert float(layer.bias.detach().abs().max()) == 0.0


def test_weights_of_gelu_are_xavier_uniform_and_biases_zero():
    net = MLP((100, 300, 50), (), torch.Generator().manual_seed(0), "gelu", last=0.1)
    for layer, scale in zip(net.layers, (1.0, 0.1), strict=True):
        bound = scale * (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.99 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert float(layer.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)
        assert float(layer.bias.detach().abs().max()) == 0.0
