"""The forms of the selective scan equal its definition, and the definition its closed forms."""

import logging
import sys
from types import ModuleType

import pytest
import torch

from offrl.nets.kernels import fused_backbone, fused_scan, scan
from tests.nets.gcc import needs_gcc


def doubling(u, delta, A, B, C, D):
    """Hillis and Steele: after k passes every step has taken in the 2^k - 1 before it."""
    decay, h = (delta.unsqueeze(-1) * A).exp(), (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    reach = 1
    while reach < u.shape[1]:
        h = torch.cat([h[:, :reach], h[:, reach:] + decay[:, reach:] * h[:, :-reach]], 1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], 1)
        reach *= 2
    return (h @ C.unsqueeze(-1)).squeeze(-1) + D * u


def cumulative(u, delta, A, B, C, D):
    """Inputs divided by all decay before them; only while that does not overflow."""
    total = (delta.unsqueeze(-1) * A).cumsum(1)
    if total.detach().abs().max() > 60:
        return scan.chunked(u, delta, A, B, C, D)
    h = total.exp() * ((-total).exp() * (delta * u).unsqueeze(-1) * B.unsqueeze(2)).cumsum(1)
    return (h @ C.unsqueeze(-1)).squeeze(-1) + D * u


# The last two are not offered: on a CPU they are slower, and one of them overflows. They confirm
# the definition in another way.
FORMS = [
    scan.recompute,
    scan.chunked,
    scan.chunked_again,
    pytest.param(fused_scan.fused, marks=needs_gcc),
    doubling,
    cumulative,
]
CPU = torch.device("cpu")


def inputs(length, batch=2, channels=5, states=16, step=0.5, dtype=torch.float64):
    g = torch.Generator().manual_seed(length)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)  # noqa: E731
    u, delta = draw(batch, length, channels), step * draw(batch, length, channels).exp()
    A = -torch.arange(1, states + 1, dtype=dtype) * draw(channels, states).exp()
    B, C, D = draw(batch, length, states), draw(batch, length, states), draw(channels)
    return [x.requires_grad_() for x in (u, delta, A, B, C, D)]


def gradients(form, x):
    y = form(*x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    return torch.autograd.grad(y, x, weight, materialize_grads=True)


@pytest.fixture(params=FORMS, ids=lambda form: form.__name__)
def form(request):
    return request.param


@pytest.mark.parametrize("length", [1, 2, 3, 60, 61])
# sums of delta A over all steps: up to 45, then beyond 100, where `cumulative` falls back
@pytest.mark.parametrize("step", [0.002, 0.5, 30.0])
def test_forms_equal_the_definition_in_values_and_gradients(form, length, step):
    x = inputs(length, step=step)
    torch.testing.assert_close(form(*x), scan.loop(*x), rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(form, x), gradients(scan.loop, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradients_are_the_finite_differences(form):
    assert torch.autograd.gradcheck(form, inputs(5, channels=2, states=16))


@needs_gcc
def test_compiled_loops_in_float32_lose_nothing_but_rounding():
    x = inputs(60)
    y = fused_scan.fused(*(part.float() for part in x))
    torch.testing.assert_close(y.double(), scan.loop(*x), rtol=1e-5, atol=1e-5)


@needs_gcc
def test_compiled_loops_give_the_same_bits_on_any_number_of_threads():
    x = inputs(20, batch=7, dtype=torch.float32)
    one = gradients(fused_scan.fused, x)
    torch.set_num_threads(2)
    try:
        two = gradients(fused_scan.fused, x)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


@needs_gcc
def test_compiled_loops_take_inputs_that_are_not_contiguous():
    x = inputs(6)
    strided = [part.movedim(0, -1).contiguous().movedim(-1, 0) for part in x]
    assert not strided[0].is_contiguous()
    assert torch.equal(fused_scan.fused(*strided), fused_scan.fused(*x))


@needs_gcc
def test_compiled_loops_take_an_output_gradient_that_is_not_contiguous():
    x = inputs(60, batch=8, channels=64)
    grads = [torch.autograd.grad(f(*x).sum(), x) for f in (fused_scan.fused, scan.loop)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_gcc
def test_compiled_loops_let_nan_and_infinity_through():
    x = [part.detach() for part in inputs(4)]
    x[0][0, 1, 2], x[0][1, 3, 0] = torch.nan, torch.inf
    torch.testing.assert_close(fused_scan.fused(*x), scan.loop(*x), equal_nan=True)


def test_constant_inputs_give_a_geometric_sum():
    # B = C = u = 1, D = 0: y_t = delta (1 - q^t) / (1 - q), q = exp(-alpha delta)
    delta, alpha, t = 0.3, 0.7, torch.arange(1, 13, dtype=torch.float64)
    one = torch.ones(1, 12, 1, dtype=torch.float64)
    y = scan.selective_scan(one, delta * one, -alpha * one[0, :1], one, one, 0 * one[0, 0])
    q = torch.tensor(-alpha * delta, dtype=torch.float64).exp()
    torch.testing.assert_close(y[0, :, 0], delta * (1 - q**t) / (1 - q))


def test_steps_of_size_zero_leave_the_direct_path_alone():
    u, delta, A, B, C, D = inputs(9)
    torch.testing.assert_close(scan.selective_scan(u, 0 * delta, A, B, C, D), D * u)


def test_huge_steps_erase_the_memory():
    u, _, A, B, C, D = inputs(9)
    delta = torch.full_like(u, 1e4)
    y = scan.selective_scan(u, delta, A, B, C, D)
    torch.testing.assert_close(y, (C * B).sum(-1, keepdim=True) * delta * u + D * u)


def test_single_steps_equal_the_scan():
    u, delta, A, B, C, D = inputs(7)
    h, ys = torch.zeros(2, 5, 16, dtype=torch.float64), []
    for t in range(7):
        y, h = scan.selective_step(h, u[:, t], delta[:, t], A, B[:, t], C[:, t], D)
        ys.append(y)
    torch.testing.assert_close(torch.stack(ys, 1), scan.selective_scan(u, delta, A, B, C, D))


def test_half_precision_is_computed_in_float32():
    x = [part.detach().bfloat16() for part in inputs(20)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = scan.selective_scan(*x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, scan.loop(*(part.float() for part in x)), rtol=1e-5, atol=1e-5)


def test_mixed_precision_is_computed_in_the_highest():
    x = inputs(6)
    x[0], x[3] = x[0].detach().float(), x[3].detach().bfloat16()
    y = scan.selective_scan(*x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, scan.loop(*(part.double() for part in x)))


def test_tensors_of_several_devices_are_refused():
    u, *rest = inputs(5)
    with pytest.raises(ValueError, match="one device"):
        scan.selective_scan(u.to("meta"), *rest)


def test_shapes_that_do_not_fit_are_refused():
    u, delta, A, B, C, D = inputs(5)
    with pytest.raises(ValueError, match=r"B and C \(batch, L, N\)"):
        scan.selective_scan(u, delta, A, B[:, 1:], C, D)


def test_without_a_compiler_the_scan_runs_and_says_why(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    fused_scan.compiled.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert scan.fastest(CPU, torch.float32, 16) is scan.recompute
            with torch.no_grad():
                assert not fused_backbone.serves(torch.zeros(1, 3, 16))
        assert "gcc" in caplog.text
        x = inputs(5, dtype=torch.float32)
        torch.testing.assert_close(scan.selective_scan(*x), scan.loop(*x))
    finally:
        fused_scan.compiled.cache_clear()


@pytest.mark.parametrize(("factor", "good"), [(1.0, True), (1.01, False)])
def test_a_foreign_kernel_is_used_only_if_it_agrees(monkeypatch, caplog, factor, good):
    def selective_scan_fn(u, delta, A, B, C, D):  # time last, as the package has it
        return factor * scan.loop(u.mT, delta.mT, A, B.mT, C.mT, D).mT

    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    scan.agrees.cache_clear()
    try:
        assert scan.agrees(scan.mamba_ssm, CPU) is good
        assert ("fails its check" in caplog.text) is not good
    finally:
        scan.agrees.cache_clear()


def test_a_missing_foreign_kernel_is_no_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    scan.agrees.cache_clear()
    assert not scan.agrees(scan.mamba_ssm, CPU)
    assert not caplog.text
    scan.agrees.cache_clear()
