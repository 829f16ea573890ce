import pytest
import torch

from offrl.nets.sequence.mamba import Mixer


def mixer(width=8):
    return Mixer(width, torch.Generator().manual_seed(0))


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_release_size_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in mixer(768).parameters()) == 3_770_880


def test_initial_step_sizes_and_decay_rates():
    m = mixer(64)
    steps = torch.nn.functional.softplus(m.delta_bias)
    assert steps.min() >= 1e-4
    assert steps.max() <= 0.1 + 1e-6
    rates = torch.arange(1.0, 17.0).expand(128, 16)
    torch.testing.assert_close(m.A_log.exp(), rates)


def test_same_generator_seed_same_weights():
    for p, q in zip(mixer().parameters(), mixer().parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("changed", [0, 3, 6])
def test_later_inputs_do_not_change_earlier_outputs(changed):
    m, x = mixer(), draw(2, 7, 8)
    other = x.clone()
    other[:, changed:] += 1
    before, after = m(x), m(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.isclose(before[:, changed], after[:, changed]).all()


def test_left_padded_windows_give_the_outputs_of_unpadded_ones():
    m, x = mixer(), draw(2, 5, 8)
    padded = torch.cat([draw(2, 6, 8, seed=2), x], 1)
    mask = torch.arange(11).expand(2, 11) >= 6
    torch.testing.assert_close(m(padded, mask)[:, 6:], m(x), rtol=0, atol=1e-6)
    assert (m(padded)[:, 6:] - m(x)).abs().max() > 1e-3  # without the mask, pads leave a trace


def test_what_lies_in_the_pads_does_not_matter():
    m, x = mixer(), draw(2, 7, 8)
    mask = torch.arange(7).expand(2, 7) >= 3
    other = torch.where(mask.unsqueeze(-1), x, draw(2, 7, 8, seed=2))
    assert torch.equal(m(x, mask)[:, 3:], m(other, mask)[:, 3:])


def test_steps_equal_the_whole_window():
    m, x = mixer(), draw(3, 9, 8)
    memory, outs = m.start(3), []
    for t in range(9):
        out, memory = m.step(x[:, t], memory)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), m(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [1, 4, 7])
def test_only_the_last_outputs_can_be_asked_for(kept):
    m, x = mixer(), draw(2, 7, 8)
    torch.testing.assert_close(m(x, kept=kept), m(x)[:, -kept:])


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
