import doctest
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offrl.regularizers.functional import (
    Head,
    LogMass,
    MinP,
    Nucleus,
    SetEntropy,
    Threshold,
    token_stats,
    token_stats_from_logits,
)
from offrl.regularizers.tokens import statistics, sweep, token_sets

T, H, V = 5, 4, 7
SETS = {
    "nucleus": Nucleus(0.7),
    "inner": Nucleus(0.7, include_crossing=False),
    "min_p": MinP(0.2),
    "threshold": Threshold(0.1),
}
ALL = {name: name for name in statistics.PLAIN + statistics.RELATIVE}
ALL |= {f"{name}_entropy": SetEntropy(s) for name, s in SETS.items()}
ALL |= {f"{name}_mass": LogMass(s) for name, s in SETS.items()}
# At the size of these draws no row's probabilities lie within finite differences of a set's edge.


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inside(p, token_set):
    """Membership by sorting every row, one row at a time."""
    if isinstance(token_set, MinP):
        return p >= token_set.share * p.amax(-1, keepdim=True)
    if isinstance(token_set, Threshold):
        return p >= token_set.probability
    rows = torch.zeros_like(p, dtype=torch.bool)
    for row, own in zip(rows, p, strict=True):
        mass = 0.0
        for j in own.argsort(descending=True).tolist():
            if token_set.include_crossing and mass >= token_set.mass:
                break
            mass += own[j].item()
            if not token_set.include_crossing and mass > token_set.mass:
                break
            row[j] = True
    return rows


def naive(logits, targets, want, reference=None):
    """The same statistics from whole distributions, by their definitions."""
    logp, found = logits.log_softmax(-1), {}
    p = logp.exp()
    log_r = None if reference is None else reference.log_softmax(-1)
    for name, s in want.items():
        if isinstance(s, str):
            found[name] = {
                "logp": lambda: logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
                "entropy": lambda: -(p * logp).sum(-1),
                "lse": lambda: logits.logsumexp(-1),
                "log_sum_sq": lambda: p.square().sum(-1).log(),
                "kl": lambda: (p * (logp - log_r)).sum(-1),
                "reverse_kl": lambda: (log_r.exp() * (log_r - logp)).sum(-1),
                "log1p_chi2": lambda: (p.square() / log_r.exp()).sum(-1).log(),
                "tv": lambda: (p - log_r.exp()).abs().sum(-1) / 2,
            }[s]()
        else:
            member = inside(p.detach(), s.set)
            mass = torch.where(member, p, 0).sum(-1, keepdim=True)
            q = torch.where(member, p / mass.clamp(min=1e-30), 1)
            entropy = -(q * q.log()).sum(-1)
            found[name] = entropy if isinstance(s, SetEntropy) else mass.squeeze(-1).log()
    return found


def gradients(found, leaves, seed=3):
    """Of a sum of all results with random weights."""
    g = torch.Generator().manual_seed(seed)
    total = 0.0
    for value in found.values():
        total = total + (value.double() * torch.randn(value.shape, generator=g).double()).sum()
    return torch.autograd.grad(total, leaves)


def test_docstring_examples():
    for module in (statistics, sweep, token_sets):
        assert doctest.testmod(module).failed == 0


FINITE = {name: s for name, s in ALL.items() if name != "inner_mass"}  # that one can be -inf


@pytest.mark.parametrize("chunk", [1, 3, V])
def test_gradients_by_finite_differences(chunk):
    hidden, weight, bias = (normal(*s).requires_grad_() for s in [(T, H), (V, H), (V,)])
    targets, reference = torch.arange(T), normal(T, V, seed=1)
    options = dict(temperature=0.8, logit_scale=1.3, softcap=4.0, chunk_tokens=chunk)

    def values(*head):
        found = token_stats(*head, targets, FINITE, reference, **options, chunk_vocab=chunk)
        return torch.stack(list(found.values()))

    assert torch.autograd.gradcheck(values, (hidden, weight, bias), fast_mode=chunk == 1)


@pytest.mark.parametrize("name", FINITE)
def test_gradients_of_logits_by_finite_differences(name):
    logits, reference = normal(T, V, seed=2).requires_grad_(), normal(T, V, seed=1)
    options = dict(want={name: ALL[name]}, reference=reference, chunk_vocab=3)
    assert torch.autograd.gradcheck(
        lambda z: token_stats_from_logits(z, torch.arange(T), **options)[name], (logits,)
    )


@pytest.mark.parametrize("chunk", [1, 3, V])
def test_values_and_gradients_equal_the_naive_form(chunk):
    hidden, weight, bias = (normal(*s).requires_grad_() for s in [(T, H), (V, H), (V,)])
    reference, targets = normal(T, V, seed=1), torch.arange(T)
    found = token_stats(
        hidden,
        weight,
        bias,
        targets,
        FINITE,
        reference,
        temperature=0.8,
        chunk_tokens=chunk,
        chunk_vocab=chunk,
    )
    expected = naive((hidden @ weight.T + bias) / 0.8, targets, FINITE, reference / 0.8)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    leaves = (hidden, weight, bias)
    for ours, theirs in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "offset", "one-hot", "huge one-hot"])
def test_low_precision_offsets_and_certain_rows_equal_float64(kind):
    logits = 3 * normal(T, V)
    if kind == "offset":
        logits = logits.float().double() + 1e4
    elif kind != "float32" and kind != "bfloat16":
        logits = (50.0 if kind == "one-hot" else 1e4) * torch.eye(T, V, dtype=torch.float64)
    logits = logits.to(torch.bfloat16 if kind == "bfloat16" else torch.float32).requires_grad_()
    reference, targets = normal(T, V, seed=1).float(), torch.arange(T).flip(0)
    exact = logits.detach().double().requires_grad_()
    want = FINITE
    if kind == "huge one-hot":  # divergences to it are infinite in the naive form
        want = {n: s for n, s in want.items() if n not in ("log1p_chi2", "reverse_kl")}
    found = token_stats_from_logits(logits, targets, want, reference, chunk_vocab=3)
    expected = naive(exact, targets, want, reference.double())
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=2e-6, msg=name)
    (ours,), (theirs,) = gradients(found, (logits,)), gradients(expected, (exact,))
    assert ours.dtype == logits.dtype
    tolerance = 1e-2 if kind == "bfloat16" else 1e-5
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_changes_lse_alone(offset):
    logits = (64 * normal(T, V, dtype=torch.float32)).round() / 64  # exact beside the offset
    reference, targets = logits.flip(-1), torch.arange(T)
    plain = token_stats_from_logits(logits, targets, ALL, reference, chunk_vocab=3)
    moved = token_stats_from_logits(logits + offset, targets, ALL, reference, chunk_vocab=3)
    for name, value in plain.items():
        expected = value + offset if name == "lse" else value
        torch.testing.assert_close(moved[name], expected, rtol=1e-6, atol=1e-6, msg=name)


def test_every_gradient_is_by_the_formula_of_the_table():
    z, z_ref, a = normal(T, V), normal(T, V, seed=1), torch.arange(T)
    p, r = z.softmax(-1), z_ref.softmax(-1)
    log_p, log_r, one = p.log(), r.log(), torch.nn.functional.one_hot(a, V)
    sign, square = (p - r).sign(), p.square()

    def mean(x):
        return (p * x).sum(-1, keepdim=True)

    def entropy(q):
        return -torch.special.xlogy(q, q).sum(-1, keepdim=True)

    formulas = {
        "logp": one - p,
        "entropy": -p * (log_p + entropy(p)),
        "lse": p,
        "log_sum_sq": 2 * (square / square.sum(-1, keepdim=True) - p),
        "kl": p * (log_p - log_r - mean(log_p - log_r)),
        "reverse_kl": p - r,
        "log1p_chi2": 2 * ((2 * z - z_ref).softmax(-1) - p),
        "tv": p * (sign - mean(sign)) / 2,
    }
    for name, token_set in SETS.items():
        member = inside(p, token_set)
        q = torch.where(member, p, 0)
        some = member.any(-1, keepdim=True)
        q = q / q.sum(-1, keepdim=True).clamp(min=1e-30)
        formulas[f"{name}_entropy"] = -torch.special.xlogy(q, q) - q * entropy(q)
        formulas[f"{name}_mass"] = torch.where(some, q - p, 0)
    assert formulas.keys() == ALL.keys()
    z.requires_grad_()
    for name, formula in formulas.items():
        value = token_stats_from_logits(z, a, {name: ALL[name]}, z_ref, chunk_vocab=3)[name]
        (gradient,) = torch.autograd.grad(value.sum(), z)
        torch.testing.assert_close(gradient, formula, msg=name)


@pytest.mark.parametrize("token_set", [*SETS.values(), MinP(1e-3), Nucleus(0.999), Threshold(1e-3)])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_sets_reach_as_far_as_they_must(token_set, scale):
    """Flat rows hold many more tokens than are kept of a tile at first."""
    z = scale * normal(4, 1200)
    want = {"entropy": SetEntropy(token_set), "mass": LogMass(token_set)}
    found = token_stats_from_logits(z.requires_grad_(), None, want, chunk_tokens=2, chunk_vocab=500)
    expected = naive(z, None, want)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    if found["mass"].isfinite().all():
        torch.testing.assert_close(gradients(found, (z,)), gradients(expected, (z,)))


def test_tokens_of_equal_logits_enter_a_nucleus_together():
    z = torch.tensor([[3.0, 1.0, 1.0, 1.0, -2.0]]).double()
    p = z.softmax(-1)[0]

    def mass(s):
        return token_stats_from_logits(z, want={"m": LogMass(s)})["m"].exp().item()

    between = (p[0] + p[1]).item()
    assert mass(Nucleus(between)) == pytest.approx(p[:4].sum().item())
    assert mass(Nucleus(between, include_crossing=False)) == pytest.approx(p[0].item())


def test_a_set_without_the_crossing_token_can_be_empty():
    z = torch.tensor([[5.0, 0.0, 0.0]], requires_grad=True)
    empty = Nucleus(0.8, include_crossing=False)
    want = {"entropy": SetEntropy(empty), "mass": LogMass(empty)}
    found = token_stats_from_logits(z, want=want)
    assert found["entropy"].item() == 0
    assert found["mass"].item() == -math.inf
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in found.values()), z)
    assert torch.equal(gradient, torch.zeros(1, 3))


def test_set_entropy_has_no_gradient_outside_the_set():
    z = normal(T, V).requires_grad_()
    value = token_stats_from_logits(z, want={"h": SetEntropy(Nucleus(0.7))})["h"]
    (gradient,) = torch.autograd.grad(value.sum(), z)
    outside = ~inside(z.detach().softmax(-1), Nucleus(0.7))
    assert outside.any()
    assert torch.equal(gradient != 0, ~outside)


def test_padding_reaches_nothing():
    hidden, weight = normal(2, T, H).requires_grad_(), normal(V, H, seed=1).requires_grad_()
    reference, targets = normal(2, T, V, seed=2), torch.arange(2 * T).view(2, T) % V
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]])
    bad = torch.where(mask.bool().unsqueeze(-1), hidden, torch.nan).detach().requires_grad_()
    bad_reference = torch.where(mask.bool().unsqueeze(-1), reference, torch.inf)
    bad_targets = torch.where(mask.bool(), targets, -100)
    good = token_stats(hidden, weight, None, targets, FINITE, reference, mask)
    found = token_stats(bad, weight, None, bad_targets, FINITE, bad_reference, mask)
    for name, value in found.items():
        assert value.shape == (2, T)
        assert torch.equal(value, good[name])
        assert (value[mask == 0] == 0).all()
    expected, ours = gradients(good, (hidden, weight)), gradients(found, (bad, weight))
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))
    assert (ours[0][mask == 0] == 0).all()


def test_forbidden_tokens_count_as_absent():
    z = normal(T, V)
    allowed = torch.arange(V) % 3 != 0
    forbidden = torch.where(allowed, z, -torch.inf).requires_grad_()
    small, a = z[:, allowed].requires_grad_(), torch.zeros(T, dtype=torch.int64)
    reference = normal(T, V, seed=1)
    hidden_reference = torch.where(allowed, reference, -torch.inf)
    found = token_stats_from_logits(forbidden, a + 1, FINITE, hidden_reference, chunk_vocab=1)
    expected = token_stats_from_logits(small, a, FINITE, reference[:, allowed])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    torch.testing.assert_close(
        gradients(found, (forbidden,))[0][:, allowed], gradients(expected, (small,))[0]
    )


def test_a_reference_may_be_a_head():
    hidden, weight, bias = normal(T, H), normal(V, H, seed=1), normal(V, seed=2)
    z, want = normal(T, V, seed=3), statistics.RELATIVE
    by_head = token_stats_from_logits(z, None, want, Head(hidden, weight, bias), chunk_vocab=3)
    by_logits = token_stats_from_logits(z, None, want, hidden @ weight.T + bias)
    for name in want:
        torch.testing.assert_close(by_head[name], by_logits[name])


def test_divergences_to_itself_are_zero_with_zero_gradient():
    z = normal(T, V, dtype=torch.float32).requires_grad_()
    for name in statistics.RELATIVE:
        value = token_stats_from_logits(z, None, [name], z, chunk_vocab=3)[name]
        (gradient,) = torch.autograd.grad(value.sum(), z)
        torch.testing.assert_close(value, torch.zeros(T), rtol=0, atol=1e-6)
        torch.testing.assert_close(gradient, torch.zeros(T, V), rtol=0, atol=1e-6)


def test_a_target_outside_the_vocabulary_is_not_a_number():
    targets = torch.tensor([0, V, -100, 1, 2])
    found = token_stats_from_logits(normal(T, V), targets)["logp"]
    assert found.isnan().tolist() == [False, True, True, False, False]


def test_a_control_actor_has_one_leading_axis_and_no_tokens_are_fine():
    assert token_stats_from_logits(normal(3, V), torch.zeros(3).long())["logp"].shape == (3,)
    hidden, weight = normal(0, H).requires_grad_(), normal(V, H).requires_grad_()
    found = token_stats(hidden, weight, want={"h": "entropy", "n": SetEntropy(Nucleus(0.5))})
    assert found["n"].shape == (0,)
    assert torch.equal(torch.autograd.grad(found["h"].sum(), weight)[0], torch.zeros(V, H))


def test_autocast_with_a_large_vocabulary_stays_within_a_hundredth():
    size = 50_000
    hidden = normal(4, 16).bfloat16()
    weight, other = (0.7 * normal(size, 16, seed=s) for s in (1, 2))
    other = (weight + 0.3 * other).float()  # autocast leaves the weights in float32
    weight = weight.float()
    want = {"entropy": "entropy", "kl": "kl", "reverse_kl": "reverse_kl", "tv": "tv"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_stats(hidden, weight, want=want, reference=Head(hidden, other))
    exact = hidden.double() @ weight.double().T, hidden.double() @ other.double().T
    for name, value in naive(exact[0], None, want, exact[1]).items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), value, rtol=1e-2, atol=0, msg=name)


class Sizes(TorchDispatchMode):
    """Sizes of the tensors made, and the shapes of products."""

    def __init__(self):
        super().__init__()
        self.made, self.products = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.made += [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if "mm" in str(function):
            self.products.append(tuple(out.shape))
        return out


def test_no_tensor_is_larger_than_a_tile():
    hidden, weight = normal(64, H).requires_grad_(), normal(2000, H, seed=1)
    want = {"logp": "logp", "entropy": "entropy", "n": SetEntropy(Nucleus(0.8))}
    targets = torch.zeros(64).long()
    with Sizes() as sizes:
        found = token_stats(hidden, weight, None, targets, want, chunk_tokens=16, chunk_vocab=250)
        gradients(found, (hidden,))
    assert max(sizes.made) <= max(16 * 250, 64 * 8 * sweep.TOP)


def test_a_frozen_head_costs_no_product():
    hidden, weight = normal(T, H).requires_grad_(), normal(V, H, seed=1)
    for frozen, products in (
        (True, [(T, V), (T, V), (T, H)]),
        (False, [(T, V), (T, V), (T, H), (V, H)]),
    ):
        weight.requires_grad_(not frozen)
        with Sizes() as sizes:
            token_stats(hidden, weight, want=["entropy"])["entropy"].sum().backward()
        assert sizes.products == products


def test_one_unused_result_does_not_disturb_the_gradient_of_another():
    z = normal(T, V).requires_grad_()
    found = token_stats_from_logits(z, torch.arange(T), ALL, normal(T, V, seed=1))
    alone = token_stats_from_logits(z, want=["entropy"])
    ours = torch.autograd.grad(found["entropy"].sum(), z)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(alone["entropy"].sum(), z)[0])


def test_requests_that_cannot_be_met_are_refused_in_words():
    z = normal(T, V)
    with pytest.raises(ValueError, match="'entropie' must be one of"):
        token_stats_from_logits(z, want=["entropie"])
    with pytest.raises(ValueError, match="logp needs targets"):
        token_stats_from_logits(z)
    with pytest.raises(ValueError, match="kl needs a reference"):
        token_stats_from_logits(z, want=["kl"])
    with pytest.raises(ValueError, match="temperature"):
        token_stats_from_logits(z, want=["lse"], temperature=0.0)
    for make in (lambda: MinP(0.0), lambda: Threshold(1.0), lambda: Nucleus(1.0)):
        with pytest.raises(ValueError, match="must lie in"):
            make()
