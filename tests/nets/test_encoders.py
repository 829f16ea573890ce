import pytest
import torch
from torch.nn import functional as F

from offrl.nets.encoders import FEATURES, SIDE, Block, Impala, cropped

WIDTH = 3 * SIDE**2


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=4, seed=0):
    draw = torch.randint(0, 256, (count, WIDTH), generator=stream(seed))
    return draw.to(torch.uint8)


def test_a_stage_halves_the_sides_by_the_maximum_of_three_from_each_second_pixel():
    block = Block(1, 1, None)
    with torch.no_grad():
        for conv in (block.enter, block.first, block.second):
            conv.weight.zero_()
            conv.bias.zero_()
        block.enter.weight[0, 0, 1, 1] = 1  # the identity
    x = torch.rand(1, 1, 8, 8, generator=stream())
    out = block(x)
    assert out.shape == (1, 1, 4, 4)
    for i in range(4):
        for j in range(4):
            window = x[0, 0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]  # smaller at the far edges
            assert out[0, 0, i, j] == window.max()


def test_features_are_of_colors_between_zero_and_one_whatever_their_type():
    net, x = Impala(3, stream()), images()
    assert net(x).shape == (4, FEATURES)
    torch.testing.assert_close(net(x), net(x.float()))
    seen = []
    net.stages.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(x)
    torch.testing.assert_close(seen[0], x.view(4, SIDE, SIDE, 3).permute(0, 3, 1, 2).float() / 255)


def test_images_seen_together_lie_side_by_side_in_the_channels():
    net, (x, y), seen = Impala(6, stream()), (images(), images(seed=1)), []
    net.stages.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert not torch.equal(net(x, y), net(y, x))
    torch.testing.assert_close(seen[0][:, 3:], seen[1][:, :3])
    assert net(x.view(2, 2, -1), y.view(2, 2, -1)).shape == (2, 2, FEATURES)


def test_the_size_is_the_published_one():
    flat = 32 * 8 * 8
    convs = sum(9 * i * o + o for i, o in [(3, 16), (16, 32), (32, 32)])
    convs += sum(2 * (9 * o * o + o) for o in (16, 32, 32))
    count = sum(p.numel() for p in Impala(3).parameters())
    assert count == convs + flat * FEATURES + FEATURES


def test_crops_are_windows_of_the_image_with_repeated_edges_the_same_in_all_of_a_row():
    x, y = images(50), images(50, seed=1)
    moved = cropped([x, y], 1.0, stream())
    found = set()
    for row in range(50):
        both = torch.stack([x[row], y[row]]).view(2, SIDE, SIDE, 3).permute(0, 3, 1, 2).float()
        padded = F.pad(both, (3, 3, 3, 3), mode="replicate")
        here = torch.stack([m[row] for m in moved]).view(2, SIDE, SIDE, 3).permute(0, 3, 1, 2)
        fits = [
            (i, j)
            for i in range(7)
            for j in range(7)
            if torch.equal(padded[:, :, i : i + SIDE, j : j + SIDE], here.float())
        ]
        assert len(fits) == 1
        found |= set(fits)
    assert len(found) > 20  # of 49


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.5, 50), (1.0, 100)])
def test_a_share_of_the_batches_is_cropped_whole(share, expected):
    g, x = stream(), images(3)
    moved = sum(not torch.equal(cropped([x], share, g)[0], x) for _ in range(100))
    assert abs(moved - expected) <= (15 if 0 < share < 1 else 0)
