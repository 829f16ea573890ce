import torch

from offrl.nets import Critics


def test_stacked_critics_hold_independent_networks():
    critics = Critics(3, 2, (8,), count=2, seeds=(4,), generator=torch.Generator().manual_seed(0))
    obs, act = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    q = critics(obs, act)
    assert q.shape == (4, 2, 5)
    assert not torch.allclose(q[:, 0], q[:, 1])
    torch.testing.assert_close(critics.first(obs, act), q[:, 0])
