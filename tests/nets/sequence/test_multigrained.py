"""The compiled form of Decision Mamba's blocks equals the operators that gradients need."""

import platform

import pytest
import torch

from offrl.nets.kernels import fused_backbone
from offrl.nets.kernels.fused_scan import compiled
from offrl.nets.kernels.scan import STATES
from offrl.nets.sequence.multigrained import Backbone
from tests.nets.gcc import needs_gcc

pytestmark = needs_gcc


def backbone(width=16, fine=True, grouping="causal"):
    return Backbone(2, width, fine, grouping, torch.Generator().manual_seed(0))


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask(batch, steps):
    """Row i lacks its first i steps, but for the last one."""
    return (torch.arange(steps) >= torch.arange(batch).clamp(max=steps - 1).unsqueeze(1)).float()


def assert_equal_where_real(net, x, real, kept=None, tolerance=3e-6):
    with torch.no_grad():
        assert fused_backbone.serves(x)
        found = net(x, real, kept)
    wanted = net.double()(x.double(), real)[:, -found.shape[1] :]
    error = (found - wanted).abs()
    if real is not None:
        error = error[real.repeat_interleave(3, 1)[:, -found.shape[1] :].bool()]
    assert error.max() < tolerance * wanted.abs().max()


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("fine", [True, False])
def test_it_equals_the_operators(steps, masked, fine):
    real = mask(4, steps) if masked else None
    assert_equal_where_real(backbone(fine=fine), draw(4, 3 * steps, 16), real)


@pytest.mark.parametrize("width", [16, 48, 64, 320])  # 320: rates of step sizes in two vectors
def test_it_equals_the_operators_in_any_width_of_whole_vectors(width):
    assert_equal_where_real(backbone(width), draw(2, 15, width), mask(2, 5))


@pytest.mark.parametrize("kept", [1, 4])
def test_it_equals_the_operators_where_only_the_last_steps_are_asked_for(kept):
    assert_equal_where_real(backbone(), draw(5, 21, 16), mask(5, 7), kept)


def test_a_pad_amid_real_steps_is_left_out_too():
    real = mask(3, 6)
    real[0, 3] = 0
    assert_equal_where_real(backbone(), draw(3, 18, 16), real, kept=1)


def test_it_equals_the_operators_where_step_sizes_span_twenty_magnitudes():
    net = backbone()
    with torch.no_grad():
        for block in net.blocks:
            block.coarse.weight_in.mul_(10)
            block.coarse.weight_delta.mul_(30)  # step sizes from 0 to 100, decays to 0
    # the operators in float32 deviate by 2.7e-5
    assert_equal_where_real(net, draw(3, 60, 16), mask(3, 20), tolerance=2e-5)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of another processor")
def test_it_equals_the_operators_without_avx512(monkeypatch):
    narrow = compiled(fused_backbone.SOURCE, f"-DSTATES={STATES}", "-mno-avx512f")
    monkeypatch.setattr(fused_backbone, "library", lambda: narrow)
    assert_equal_where_real(backbone(48), draw(4, 60, 48), mask(4, 20))


def test_what_lies_in_the_pads_does_not_matter():
    net, x, real = backbone(), draw(3, 18, 16), mask(3, 6)
    spread = real.repeat_interleave(3, 1).unsqueeze(-1)
    other = torch.where(spread == 1, x, draw(3, 18, 16, seed=2))
    with torch.no_grad():
        assert torch.equal(net(x, real) * spread, net(other, real) * spread)


@pytest.mark.parametrize("changed", [0, 5, 9, 11])
def test_later_tokens_do_not_change_earlier_outputs(changed):
    """A step's R- and s-token come together: the fine path shows each the other."""
    net, x = backbone(), draw(2, 12, 16)
    other = x.clone()
    other[:, changed:] += 1
    with torch.no_grad():
        before, after = net(x, None), net(other, None)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.isclose(before[:, changed], after[:, changed]).all()


def test_a_window_has_the_same_bits_alone_and_in_a_batch_on_any_number_of_threads():
    net, x, real = backbone(), draw(7, 18, 16), mask(7, 6)
    with torch.no_grad():
        together = net(x, real)
        alone = torch.cat([net(x[i : i + 1], real[i : i + 1]) for i in range(7)])
        torch.set_num_threads(2)
        try:
            threaded = net(x, real)
        finally:
            torch.set_num_threads(1)
    assert torch.equal(together, alone)
    assert torch.equal(together, threaded)


def test_its_input_is_left_as_it_was():
    net, x = backbone(), draw(2, 12, 16)
    before = x.clone()
    with torch.no_grad():
        net(x, None)
    assert torch.equal(x, before)


def test_nan_goes_through_and_stays_in_its_window():
    net, x = backbone(), draw(2, 12, 16)
    x[0, 5, 2] = torch.nan
    with torch.no_grad():
        y = net(x, None)
    assert y[0, 5:].isnan().all()
    assert y[0, :5].isfinite().all()
    assert y[1].isfinite().all()


def test_where_it_cannot_serve_the_operators_do(monkeypatch):
    monkeypatch.setattr(fused_backbone, "forward", None)  # would raise
    with torch.no_grad():
        backbone(width=24)(draw(1, 6, 24), None)
        backbone(grouping="release")(draw(1, 6, 16), None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            backbone()(draw(1, 6, 16), None)
        backbone().double()(draw(1, 6, 16).double(), None)
    backbone()(draw(1, 6, 16), None)
