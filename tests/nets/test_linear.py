import torch

from offrl.nets import Linear


def test_one_network_takes_rows_with_extra_axes():
    layer = Linear(4, 3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(6, 2, 4)
    torch.testing.assert_close(layer(x), x @ layer.weight + layer.bias)


def test_initialization_is_uniform_within_the_inverse_root_of_the_inputs():
    layer = Linear(100, 400, generator=torch.Generator().manual_seed(0))
    for p in (layer.weight, layer.bias):
        assert p.abs().max() <= 0.1
        assert p.abs().max() > 0.098
        assert abs(float(p.detach().mean())) < 0.01
