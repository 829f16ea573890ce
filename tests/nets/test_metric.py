import pytest
import torch

from offrl.nets.metric import IQE


@pytest.fixture
def latents():
    g = torch.Generator().manual_seed(0)
    return IQE(4, (8,), 32, (), g, False), torch.randn(3, 500, 32, generator=g, dtype=torch.float64)


def test_the_distance_is_zero_from_a_point_to_itself_and_never_negative(latents):
    metric, (x, y, _) = latents
    assert float(metric.distance(x, x).detach().abs().max()) == 0.0
    assert float(metric.distance(x, y).detach().min()) > 0.0


def test_the_triangle_inequality_holds(latents):
    metric, (x, y, z) = latents
    direct, detour = metric.distance(x, z), metric.distance(x, y) + metric.distance(y, z)
    assert bool((direct <= detour + 1e-9).all())
    assert bool((direct < detour - 1e-3).any())


def test_there_and_back_differ(latents):
    metric, (x, y, _) = latents
    assert float((metric.distance(x, y) - metric.distance(y, x)).detach().abs().min()) > 1e-6


def test_a_component_is_the_length_of_a_union_of_intervals():
    metric = IQE(4, (8,), 8, (), None, False)
    x = torch.tensor([[0.0, 1.0, 5.0, 9.0, 0.0, 0.0, 0.0, 0.0]])
    y = torch.tensor([[2.0, 3.0, 6.0, 8.0, 0.5, 0.0, -1.0, 0.0]])
    # [0, 2], [1, 3] and [5, 6]; an interval that ends before it begins is empty
    torch.testing.assert_close(metric.distance(x, y), torch.tensor([4.0]))


def test_components_are_mixed_by_mean_and_maximum_in_equal_parts_at_first():
    metric = IQE(4, (8,), 16, (), None, False)
    x, y = torch.zeros(1, 16), torch.zeros(1, 16)
    y[0, 0] = 4.0  # components 4 and 0: mean 2, maximum 4
    torch.testing.assert_close(metric.distance(x, y), torch.tensor([3.0]))


def test_gradients_equal_numerical_ones(latents):
    metric, (x, y, _) = latents
    x, y = x[:2].clone().requires_grad_(), y[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(metric.double().distance, (x, y))


def test_a_latent_that_is_no_multiple_of_a_component_is_refused():
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        IQE(4, (8,), 12, (), None, False)
