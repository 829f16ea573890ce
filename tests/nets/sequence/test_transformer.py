import torch
from torch import nn

from offrl.nets.sequence.transformer import Dropout, Transformer

B, T, D = 2, 5, 8


def make(layers=2, heads=1, dropout=0.0):
    generator = torch.Generator().manual_seed(0)
    net = Transformer(D, layers, heads, dropout, generator)
    with torch.no_grad():  # away from the start, whose attention is nearly even
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return net


def tokens(seed=1):
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))


def test_blocks_equal_torchs_own_with_the_same_weights():
    net, x = make(heads=2), tokens()
    mask = torch.ones(B, T)
    mask[1, :2] = 0
    expected = x
    for block in net.blocks:
        twin = nn.TransformerEncoderLayer(
            D, 2, 4 * D, 0.0, "relu", batch_first=True, norm_first=True
        )
        pairs = (
            (twin.self_attn.in_proj_weight, block.qkv.weight.T),
            (twin.self_attn.in_proj_bias, block.qkv.bias[0]),
            (twin.self_attn.out_proj.weight, block.out.weight.T),
            (twin.self_attn.out_proj.bias, block.out.bias[0]),
            (twin.linear1.weight, block.up.weight.T),
            (twin.linear1.bias, block.up.bias[0]),
            (twin.linear2.weight, block.down.weight.T),
            (twin.linear2.bias, block.down.bias[0]),
            (twin.norm1.weight, block.norm_attention.weight),
            (twin.norm1.bias, block.norm_attention.bias),
            (twin.norm2.weight, block.norm_mlp.weight),
            (twin.norm2.bias, block.norm_mlp.bias),
        )
        with torch.no_grad():
            for target, source in pairs:
                target.copy_(source)
        future = torch.ones(T, T).triu(1).bool()
        expected = twin(expected, src_mask=future, src_key_padding_mask=mask == 0)
        expected = torch.nan_to_num(expected)  # torch's pads are NaN
    real = mask.bool()
    torch.testing.assert_close(net(x, mask)[real], net.norm(expected)[real], rtol=1e-4, atol=1e-5)


def test_nothing_sees_later_tokens():
    net, x, mask = make(), tokens(), torch.ones(B, T)
    before = net(x, mask)
    x[:, 3] *= -1
    after = net(x, mask)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] - after[:, 3:]).abs().amax((0, 2)).min() > 1e-3


def test_what_pads_hold_and_how_many_there_are_makes_no_difference():
    net, x, mask = make(), tokens(), torch.ones(B, T)
    mask[:, :2] = 0
    other = x.clone()
    other[:, :2] = 100.0
    real = net(x[:, 2:], mask[:, 2:])
    torch.testing.assert_close(net(x, mask)[:, 2:], real, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net(other, mask)[:, 2:], real, rtol=1e-5, atol=1e-6)
    assert net(x, torch.zeros(B, T)).isfinite().all()


def test_positions_in_the_window_have_no_meaning_of_their_own():
    """With one block the last token does not know the order of those before it."""
    net, x, mask = make(layers=1), tokens(), torch.ones(B, T)
    order = torch.tensor([2, 0, 3, 1, 4])
    torch.testing.assert_close(net(x, mask)[:, -1], net(x[:, order], mask)[:, -1])


def test_dropout_keeps_the_mean_draws_from_its_generator_and_rests_in_evaluation():
    x, state = torch.ones(200_000), torch.get_rng_state()
    one = Dropout(0.1, torch.Generator().manual_seed(3))(x)
    other = Dropout(0.1, torch.Generator().manual_seed(3))(x)
    assert torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())
    assert abs(float((one == 0).float().mean()) - 0.1) < 0.005
    assert abs(float(one.mean()) - 1) < 0.005
    net = make(dropout=0.5).eval()
    assert torch.equal(net(tokens(), torch.ones(B, T)), net(tokens(), torch.ones(B, T)))


def test_initial_weights_are_those_of_gpt2():
    net = Transformer(128, 1, 1, 0.1, torch.Generator().manual_seed(0))
    for name, p in net.named_parameters():
        if "norm" not in name and name.endswith("weight"):
            assert abs(float(p.detach().std()) - 0.02) < 0.001
        elif name.endswith("bias"):
            assert (p == 0).all()
