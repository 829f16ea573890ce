import pytest
import torch

from offrl.nets import fused_mixer
from offrl.nets.mamba import Mixer
from tests.nets.gcc import needs_gcc


@pytest.fixture(params=["operators", pytest.param("compiled", marks=needs_gcc)])
def form(request):
    """The two forms of `forward`: for gradients, and without."""
    with torch.set_grad_enabled(request.param == "operators"):
        assert fused_mixer.serves(torch.zeros(1)) == (request.param == "compiled")
        yield request.param


either_form = pytest.mark.usefixtures("form")


def mixer(width=8):
    return Mixer(width, torch.Generator().manual_seed(0))


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_release_size_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in mixer(768).parameters()) == 3_770_880


def test_initial_step_sizes_and_decay_rates():
    m = mixer(64)
    steps = torch.nn.functional.softplus(m.time.delta_bias)
    assert steps.min() >= 1e-4
    assert steps.max() <= 0.1 + 1e-6
    rates = torch.arange(1.0, 17.0).expand(128, 16)
    torch.testing.assert_close(m.time.A_log.exp(), rates)


def test_same_generator_seed_same_weights():
    for p, q in zip(mixer().parameters(), mixer().parameters(), strict=True):
        assert torch.equal(p, q)


@either_form
@pytest.mark.parametrize("changed", [0, 3, 6])
def test_later_inputs_do_not_change_earlier_outputs(changed):
    m, x = mixer(), draw(2, 7, 8)
    other = x.clone()
    other[:, changed:] += 1
    before, after = m(x), m(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.isclose(before[:, changed], after[:, changed]).all()


@either_form
def test_left_padded_windows_give_the_outputs_of_unpadded_ones():
    m, x = mixer(), draw(2, 5, 8)
    padded = torch.cat([draw(2, 6, 8, seed=2), x], 1)
    mask = torch.arange(11).expand(2, 11) >= 6
    torch.testing.assert_close(m(padded, mask)[:, 6:], m(x), rtol=0, atol=1e-6)
    assert (m(padded)[:, 6:] - m(x)).abs().max() > 1e-3  # without the mask, pads leave a trace


@either_form
def test_what_lies_in_the_pads_does_not_matter():
    m, x = mixer(), draw(2, 7, 8)
    mask = torch.arange(7).expand(2, 7) >= 3
    other = torch.where(mask.unsqueeze(-1), x, draw(2, 7, 8, seed=2))
    assert torch.equal(m(x, mask)[:, 3:], m(other, mask)[:, 3:])


@either_form
def test_steps_equal_the_whole_window():
    m, x = mixer(), draw(3, 9, 8)
    memory, outs = m.start(3), []
    for t in range(9):
        out, memory = m.step(x[:, t], memory)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), m(x), rtol=0, atol=1e-5)


@either_form
@pytest.mark.parametrize("kept", [1, 4, 7])
def test_only_the_last_outputs_can_be_asked_for(kept):
    m, x = mixer(), draw(2, 7, 8)
    torch.testing.assert_close(m(x, kept=kept), m(x)[:, -kept:])


@needs_gcc
@pytest.mark.parametrize("size", [1.0, 30.0])  # 30: step sizes from 1e-13 to 60, decays to 0
@pytest.mark.parametrize("length", [1, 3, 60])
@pytest.mark.parametrize("masked", [True, False])
def test_the_compiled_form_equals_the_operators(size, length, masked):
    m, x = mixer(width=10), size * draw(3, length, 10)  # 20 channels: no whole number of vectors
    mask = torch.arange(length).expand(3, length) >= length // 3 if masked else None
    real = slice(length // 3, None)
    with torch.no_grad():
        m.time.weight_delta.mul_(size)
        compiled = m(x, mask)[:, real]
    wanted = m.double()(x.double(), mask)[:, real]
    assert (compiled - wanted).abs().max() < 1e-6 * wanted.abs().max()


@needs_gcc
def test_the_compiled_form_gives_the_same_bits_on_any_number_of_threads():
    m, x = mixer(), draw(7, 20, 8)
    with torch.no_grad():
        one = m(x)
        torch.set_num_threads(2)
        try:
            two = m(x)
        finally:
            torch.set_num_threads(1)
    assert torch.equal(one, two)


@needs_gcc
def test_the_compiled_form_lets_nan_through():
    m, x = mixer(), draw(2, 9, 8)
    x[0, 4, 2] = torch.nan
    with torch.no_grad():
        y = m(x)
    assert y[0, 4:].isnan().all()
    assert y[0, :4].isfinite().all()
    assert y[1].isfinite().all()


def test_autocast_keeps_the_state_in_float32():
    m, x = mixer(), draw(2, 9, 8)
    memory = m.start(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m(x)
        for t in range(9):
            last, memory = m.step(x[:, t], memory)
    assert y.dtype == last.dtype == torch.bfloat16
    assert all(part.dtype == torch.float32 for part in memory)
    torch.testing.assert_close(y.float(), m(x), rtol=0.05, atol=0.01)
    torch.testing.assert_close(last.float(), m(x)[:, -1], rtol=0.05, atol=0.01)


def test_every_parameter_learns_and_pads_teach_nothing():
    m, x = mixer(), draw(2, 6, 8).requires_grad_()
    mask = torch.arange(6).expand(2, 6) >= 2
    loss = m(x, mask)[:, 2:].square().sum()
    grads = torch.autograd.grad(loss, [x, *m.parameters()])
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert torch.equal(grads[0][:, :2], torch.zeros(2, 2, 8))
    assert (grads[0][:, 2:] != 0).all()
