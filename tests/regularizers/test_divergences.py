import doctest
import math

import pytest
import torch
from torch.distributions import Beta, Categorical, Independent, Laplace, Normal

from offrl.regularizers import divergences
from offrl.regularizers.divergences import f_divergence, robust_value

F64 = torch.float64


def normal(mean, std):
    return Normal(torch.tensor(mean, dtype=F64), torch.tensor(std, dtype=F64))


def categorical(*logits):
    return Categorical(logits=torch.tensor(logits, dtype=F64))


def integral(p, q, grid, term):
    """Trapezoidal rule for the integral of term(p(x), q(x))."""
    return torch.trapezoid(term(p.log_prob(grid).exp(), q.log_prob(grid).exp()), grid)


LINE, UNIT = (
    torch.linspace(-30, 30, 40001, dtype=F64),
    torch.linspace(1e-6, 1 - 1e-6, 40001).to(F64),
)
PAIRS = [
    (normal(0.3, 0.8), normal(-0.2, 1.1), LINE),
    (normal(0.0, 1.3), normal(0.5, 1.0), LINE),
    (
        Beta(torch.tensor(3.0, dtype=F64), torch.tensor(2.5, dtype=F64)),
        Beta(torch.tensor(2.0, dtype=F64), torch.tensor(4.0, dtype=F64)),
        UNIT,
    ),
]
TERMS = {
    "kl": lambda p, q: p * (p / q).clamp(min=1e-300).log(),
    "reverse-kl": lambda p, q: q * (q / p).clamp(min=1e-300).log(),
    "chi2": lambda p, q: p.square() / q - q,
}


def test_docstring_examples():
    assert doctest.testmod(divergences).failed == 0


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("pair", range(3))
def test_closed_forms_equal_integrals(kind, pair):
    p, q, grid = PAIRS[pair]
    grid = grid if pair == 2 else grid[(grid.abs() < 12)]
    expected = integral(p, q, grid, TERMS[kind])
    torch.testing.assert_close(f_divergence(p, q, kind), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", [-0.5, 0.5, 1.5])
@pytest.mark.parametrize("pair", range(3))
def test_alpha_divergences_equal_integrals(order, pair):
    p, q, grid = PAIRS[pair]
    grid = grid if pair == 2 else grid[(grid.abs() < 12)]
    expected = integral(p, q, grid, lambda a, b: a**order * b ** (1 - order)) - 1
    value = f_divergence(p, q, "alpha", order)
    torch.testing.assert_close(value, expected / (order * (order - 1)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stds", [(0.8, 1.1), (1.0, 1.0), (1.0, 1.0 + 1e-9), (2.0, 0.1)])
@pytest.mark.parametrize("gap", [0.0, 0.5, -3.0])
def test_total_variation_of_gaussians_equals_the_integral(stds, gap):
    p, q = normal(0.2, stds[0]), normal(0.2 + gap, stds[1])
    expected = integral(p, q, LINE, lambda a, b: (a - b).abs() / 2)
    torch.testing.assert_close(f_divergence(p, q, "tv"), expected, rtol=1e-3, atol=1e-5)


def test_total_variation_of_equal_scales_is_an_error_function_with_a_finite_gradient():
    mean = torch.tensor(0.7, dtype=F64, requires_grad=True)
    std = torch.tensor(1.0, dtype=F64, requires_grad=True)
    tv = f_divergence(Normal(mean, std), normal(0.0, 1.0), "tv")
    torch.testing.assert_close(tv, torch.erf(mean / 2 / math.sqrt(2)))
    slope, spread = torch.autograd.grad(tv, (mean, std))
    torch.testing.assert_close(slope, (-(mean**2) / 8).exp() / math.sqrt(2 * math.pi))
    assert spread.isfinite()


@pytest.mark.parametrize("kind", ["kl", "reverse-kl", "chi2", "tv", "js", "alpha"])
def test_categorical_divergences_are_sums_and_vanish_at_equality(kind):
    p, q = categorical(0.3, -1.0, 0.8), categorical(0.0, 0.5, -0.4)
    a, b = p.probs, q.probs
    expected = {
        "kl": (a * (a / b).log()).sum(),
        "reverse-kl": (b * (b / a).log()).sum(),
        "chi2": (a.square() / b).sum() - 1,
        "tv": (a - b).abs().sum() / 2,
        "js": (a * (2 * a / (a + b)).log() + b * (2 * b / (a + b)).log()).sum() / 2,
        "alpha": ((a**0.3 * b**0.7).sum() - 1) / (0.3 * -0.7),
    }[kind]
    torch.testing.assert_close(f_divergence(p, q, kind, 0.3), expected)
    same = f_divergence(p, p, kind, 0.3)
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("p", "q"),
    [(categorical(0.3, -1.0), categorical(0.0, 0.5)), (normal(0.3, 0.8), normal(-0.2, 1.1))],
)
def test_alpha_tends_to_kl_at_one_and_to_reverse_kl_at_zero(p, q):
    for order, kind in ((1, "kl"), (0, "reverse-kl")):
        exact = f_divergence(p, q, kind)
        assert torch.equal(f_divergence(p, q, "alpha", order), exact)
        near = f_divergence(p, q, "alpha", order + 1e-6)
        torch.testing.assert_close(near, exact, rtol=1e-4, atol=0)
    chi2 = f_divergence(p, q, "chi2")
    torch.testing.assert_close(f_divergence(p, q, "alpha", 2.0), chi2 / 2)


def test_gaussian_chi2_is_the_formula_and_infinite_outside_its_range():
    s, t, gap = 0.9, 0.7, 0.4
    value = f_divergence(normal(gap, s), normal(0.0, t), "chi2")
    room = 2 * t**2 - s**2
    expected = t**2 / (s * math.sqrt(room)) * math.exp(gap**2 / room) - 1
    torch.testing.assert_close(value, torch.tensor(expected, dtype=F64))
    for shift, finite in ((-1e-6, False), (1e-6, True)):
        edge = normal(0.0, math.sqrt(0.5) + shift)
        assert bool(f_divergence(normal(0.0, 1.0), edge, "chi2").isfinite()) == finite


def test_beta_chi2_needs_twice_the_concentrations():
    q = Beta(torch.tensor(4.0), torch.tensor(2.0))
    p = Beta(torch.tensor([2.0, 2.1, 3.0]), torch.tensor([2.0, 2.0, 1.0]))
    assert (f_divergence(p, q, "chi2") == math.inf).tolist() == [True, False, True]


def test_where_chi2_is_infinite_gradients_stay_finite_and_kl_can_stand_in():
    std = torch.tensor([2.0, 1.0], requires_grad=True)
    p, q = Normal(torch.zeros(2), std), Normal(torch.zeros(2), torch.ones(2))
    value = f_divergence(p, q, "chi2")
    assert value[0] == math.inf
    value[1].backward()
    assert std.grad.isfinite().all()
    stand_in = f_divergence(p, q, "chi2", infinite="kl")
    torch.testing.assert_close(stand_in[0], f_divergence(p, q, "kl")[0])
    stand_in.sum().backward()
    assert std.grad.isfinite().all()
    assert std.grad[0] != 0


def test_independent_dimensions_multiply_in_chi2_and_add_in_kl():
    p = Normal(torch.randn(5, 3) / 4, torch.ones(5, 3))
    q = Normal(torch.randn(5, 3) / 4, torch.full((5, 3), 1.2))
    joint = [Independent(d, 1) for d in (p, q)]
    chi2 = (f_divergence(p, q, "chi2") + 1).prod(-1) - 1
    torch.testing.assert_close(f_divergence(*joint, "chi2"), chi2)
    torch.testing.assert_close(f_divergence(*joint, "kl"), f_divergence(p, q, "kl").sum(-1))


def test_squashing_both_sides_changes_nothing():
    p, q, _ = PAIRS[0]
    grid = torch.linspace(-1 + 1e-9, 1 - 1e-9, 200001, dtype=F64)
    jacobian = 1 - grid.square()
    a, b = ((d.log_prob(grid.atanh()).exp() / jacobian) for d in (p, q))
    squashed = torch.trapezoid(a.square() / b.clamp(min=1e-300) - b, grid)
    torch.testing.assert_close(f_divergence(p, q, "chi2"), squashed, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["kl", "reverse-kl", "chi2", "tv", "js", "alpha"])
def test_forbidden_actions_leave_gradients_finite(kind):
    logits = torch.tensor([[0.5, 0.1, -math.inf], [0.2, 0.4, 0.6]], requires_grad=True)
    other = torch.tensor([[0.1, 0.9, -math.inf], [0.3, 0.1, -math.inf]])
    value = f_divergence(Categorical(logits=logits), Categorical(logits=other), kind, 0.5)
    (grad,) = torch.autograd.grad(value[0], logits)
    assert value[0].isfinite()
    assert grad.isfinite().all()
    assert (value[1] == math.inf) == (kind in ("kl", "chi2"))


def test_huge_divergences_saturate():
    mean = torch.tensor(40.0, requires_grad=True)
    value = f_divergence(Normal(mean, 1.0), Normal(0.0, 1.0), "chi2")
    value.backward()
    assert value.isfinite()
    assert mean.grad == 0


def test_what_has_no_closed_form_is_refused():
    p, q, _ = PAIRS[0]
    with pytest.raises(ValueError, match="closed form"):
        f_divergence(p, q, "js")
    with pytest.raises(ValueError, match="closed form"):
        f_divergence(
            Independent(normal([0.0], [1.0]), 1), Independent(normal([0.0], [1.0]), 1), "tv"
        )
    with pytest.raises(TypeError, match="Laplace"):
        f_divergence(Laplace(0.0, 1.0), Laplace(0.0, 1.0), "kl")
    with pytest.raises(TypeError, match="Categorical"):
        f_divergence(p, categorical(0.0, 1.0), "kl")
    with pytest.raises(ValueError, match="alpha="):
        f_divergence(p, q, "alpha")


VALUES = torch.tensor([0.3, -0.5, 1.4], dtype=F64)
PROBS = torch.tensor([0.5, 0.2, 0.3], dtype=F64)


@pytest.mark.parametrize("kind", ["tv", "kl", "chi2"])
@pytest.mark.parametrize("lam", [0.05, 0.3, 1.0, 5.0])
def test_robust_values_equal_the_minimum_over_distributions(kind, lam):
    side = torch.linspace(0, 1, 1001, dtype=F64)
    a, b = torch.meshgrid(side, side, indexing="ij")
    inside = a + b <= 1
    other = torch.stack([a[inside], b[inside], 1 - a[inside] - b[inside]], -1).clamp(min=0)
    distance = {
        "tv": (other - PROBS).abs().sum(-1) / 2,
        "kl": torch.xlogy(other, other / PROBS).sum(-1),
        "chi2": ((other - PROBS).square() / PROBS).sum(-1),
    }[kind]
    best = (other @ VALUES + lam * distance).min()
    value = robust_value(VALUES, PROBS, kind, lam)
    assert value <= best + 1e-12
    torch.testing.assert_close(value, best, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["tv", "kl", "chi2"])
def test_robust_values_grow_with_the_price_from_the_least_value_to_the_mean(kind):
    values = torch.randn(6, 9, dtype=F64)
    probs = torch.rand(6, 9, dtype=F64).softmax(-1)
    lams = torch.logspace(-6, 7, 40, dtype=F64)
    ladder = torch.stack([robust_value(values, probs, kind, lam) for lam in lams])
    mean = (values * probs).sum(-1)
    assert (ladder.diff(dim=0) >= -1e-9).all()
    assert (ladder <= mean + 1e-9).all()
    torch.testing.assert_close(ladder[0], values.amin(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(ladder[-1], mean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["tv", "kl", "chi2"])
def test_the_gradient_of_a_robust_value_is_a_distribution_that_prefers_bad_states(kind):
    values = VALUES.clone().requires_grad_()
    (worst,) = torch.autograd.grad(robust_value(values, PROBS, kind, 0.7), values)
    torch.testing.assert_close(worst.sum(), torch.ones((), dtype=F64))
    assert (worst >= 0).all()
    assert worst[1] > PROBS[1]
    assert worst[2] < PROBS[2]


@pytest.mark.parametrize("kind", ["tv", "kl", "chi2"])
def test_masked_samples_count_nothing(kind):
    values = torch.tensor([[0.1, math.nan, 0.7, -0.2], [math.inf] * 4], requires_grad=True)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]])
    value = robust_value(values, None, kind, 0.5, mask)
    kept = robust_value(torch.tensor([0.1, 0.7, -0.2]), None, kind, 0.5)
    torch.testing.assert_close(value, torch.stack([kept, torch.zeros(())]))
    value.sum().backward()
    assert values.grad.isfinite().all()
    weighted = robust_value(values, torch.full((2, 4), 0.25), kind, 0.5, mask)
    torch.testing.assert_close(weighted, value)


def test_impossible_states_matter_to_total_variation_only():
    values, probs = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(robust_value(values, probs, "tv", 0.3), torch.tensor(0.3))
    for kind in ("kl", "chi2"):
        torch.testing.assert_close(robust_value(values, probs, kind, 0.3), torch.tensor(1.0))


def test_a_price_per_row_is_used_row_by_row():
    values = torch.randn(2, 5)
    lam = torch.tensor([0.2, 2.0])
    for kind in ("tv", "kl", "chi2"):
        rows = [robust_value(values[i], None, kind, float(lam[i])) for i in range(2)]
        torch.testing.assert_close(robust_value(values, None, kind, lam), torch.stack(rows))


def test_compiled_divergences_trace_as_one_graph():
    def total(a, b, c, d, values):
        p, q = (Normal(m, s, validate_args=False) for m, s in ((a, b), (c, d)))
        kinds = [f_divergence(p, q, kind) for kind in ("kl", "chi2", "tv")]
        robust = [robust_value(values, None, kind, 0.5) for kind in ("tv", "kl", "chi2")]
        return sum(kinds).sum() + sum(robust).sum()

    arguments = [torch.randn(3), torch.rand(3) + 1, torch.randn(3), torch.rand(3) + 1]
    compiled = torch.compile(total, backend="eager", fullgraph=True, dynamic=True)
    for size in (4, 6):
        values = torch.randn(3, size)
        torch.testing.assert_close(compiled(*arguments, values), total(*arguments, values))
