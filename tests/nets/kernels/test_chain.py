from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from offrl.nets.kernels.chain import chain

SHAPES = [((), ()), ((2,), ()), ((2,), (1,)), ((3, 2), (3, 1)), ((3, 2), (3, 2)), ((3,), (3,))]


def plain(x, layers, rectified=False):
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight + bias
        x = x.relu() if rectified or i < len(layers) - 1 else x
    return x


def pairs(params):
    return list(zip(params[::2], params[1::2], strict=True))


def drawn(lead, rows, dims, dtype=torch.float32, batch=5):
    """x (*rows, batch, dims[0]) and weight, bias of each layer in turn."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype, requires_grad=True)  # noqa: E731
    params = [draw(*lead, n, o) for i, o in pairwise(dims) for n in (i, 1)]
    return draw(*rows, batch, dims[0]), params


@pytest.mark.parametrize(("lead", "rows"), [*SHAPES, ((), (2,)), ((), (3, 2))])
def test_shapes_on_cuda_are_those_on_a_cpu(lead, rows):
    x, params = drawn(lead, rows, (4, 7, 3))
    wanted = chain(x, pairs(params)).shape
    with FakeTensorMode():
        x, *params = (torch.empty(value.shape, device="cuda") for value in (x, *params))
        assert chain(x, pairs(params)).shape == wanted


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("dims", [(4, 3), (4, 7, 3), (4, 7, 6, 1)])
@pytest.mark.parametrize(("lead", "rows"), SHAPES)
def test_values_and_gradients_equal_the_plain_product(lead, rows, dims, rectified):
    x, params = drawn(lead, rows, dims)
    outs = chain(x, pairs(params), rectified), plain(x, pairs(params), rectified)
    torch.testing.assert_close(*outs)
    seed = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(1))
    kept = seed.clone()
    grads = [torch.autograd.grad(out, [x, *params], seed) for out in outs]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(seed, kept)  # masking in place spares what the caller owns


@pytest.mark.parametrize("width", [1, 2, 6, 8, 31, 33])
@pytest.mark.parametrize("batch", [63, 64])
def test_narrow_products_equal_the_plain_ones(width, batch):
    """Values, and the gradient of the last weight, on both sides of where they are transposed."""
    x, params = drawn((2,), (1,), (9, batch, width), torch.float64, batch)
    outs = chain(x, pairs(params)), plain(x, pairs(params))
    torch.testing.assert_close(*outs)
    ours, theirs = (torch.autograd.grad(out.square().sum(), [x, *params]) for out in outs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("asked", [[0], [1], [3], [4], [0, 5], [2, 6]])
def test_a_part_of_the_gradients_is_that_part_of_all(asked):
    x, params = drawn((2,), (1,), (4, 7, 6, 3))
    values = [x, *params]
    whole = torch.autograd.grad(chain(x, pairs(params)).square().sum(), values)
    some = [value if i in asked else value.detach() for i, value in enumerate(values)]
    out = chain(some[0], pairs(some[1:])).square().sum()
    for i, grad in zip(asked, torch.autograd.grad(out, [values[i] for i in asked]), strict=True):
        torch.testing.assert_close(grad, whole[i])


@pytest.mark.parametrize("rectified", [False, True])
def test_second_derivatives_exist_and_are_right(rectified):
    x, params = drawn((2,), (1,), (4, 7, 3), torch.float64)

    def value(x, *params):
        return chain(x, pairs(params), rectified).square()

    assert torch.autograd.gradgradcheck(value, (x, *params))
