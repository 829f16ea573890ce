"""What every module of the package keeps to, and the parts that modules are made of."""

import copy
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from offrl.regularizers import (
    Compose,
    RegInputs,
    RegOutput,
    Regularizer,
)
from offrl.regularizers.functional import (
    masked_reduce,
)
from tests.regularizers.cases import Case, all_cases

CASES = all_cases()
B, T = 8, 5  # T differs from B, so that shapes tell rows from tokens
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def some(keep: Callable[[Case], bool]):
    cases = [case for case in CASES if keep(case)]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(x: RegInputs) -> dict[str, Tensor]:
    """All tensors by name, as `RegInputs.need` spells it."""
    found = {}
    for f in fields(x):
        value = getattr(x, f.name)
        items = value.items() if isinstance(value, dict) else [("", value)]
        found |= {f"{f.name}.{k}".rstrip("."): v for k, v in items if isinstance(v, Tensor)}
    return found


def changed(x: RegInputs, change: Callable[[str, Tensor], Tensor]) -> RegInputs:
    """The same inputs with every tensor replaced; leaves stay leaves that require gradient."""
    new = replace(x, stats=dict(x.stats), extra=dict(x.extra))
    for name, value in tensors(x).items():
        head, _, key = name.partition(".")
        made = change(name, value.detach()).clone().requires_grad_(value.requires_grad)
        if key:
            getattr(new, head)[key] = made
        else:
            setattr(new, head, made)
    for name in ("dist", "ref_dist"):
        dist = getattr(x, name)
        if dist is not None:
            parameters = {k: getattr(dist, k) for k in dist.arg_constraints if k in vars(dist)}
            made = {k: change(f"{name}.{k}", v.detach()) for k, v in parameters.items()}
            setattr(new, name, type(dist)(**made))
    return new


def result(out: RegOutput) -> Tensor:
    """Whatever the module returned; 0 if it only observes."""
    found = (out.rewards, out.advantages, out.token_weight, out.per_element, out.loss)
    given = [v for v in found if v is not None]
    assert len(given) <= 1
    return given[0] if given else torch.zeros(())


def scalar(module: Regularizer, x: RegInputs) -> Tensor:
    """A number that depends on all of the result that counts: the loss, or a weighted sum."""
    out = module(x)
    value = result(out)
    if value.dim() == 0:
        return value
    if out.per_element is not None:
        return masked_reduce(value, x.mask, module.reduction)
    weight = torch.linspace(1, 2, value.numel()).view_as(value)
    return masked_reduce(value * weight, x.mask if value.dim() == 2 else None)


def gradients(module: Regularizer, x: RegInputs, names: tuple[str, ...]) -> list[Tensor]:
    if not names:
        return []
    leaves = [tensors(x)[name] for name in names]
    value = scalar(module, x)
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for g, v in zip(found, leaves, strict=True)]


def trained(case: Case, steps: int = 2) -> Regularizer:
    """A module after some optimizer steps."""
    module = case.make()
    for step in range(steps):
        learn(module, case.inputs(generator(10 + step), B, T))
    return module


def learn(module: Regularizer, x: RegInputs) -> None:
    with torch.no_grad():
        module.update({k: v.detach() for k, v in module(x).sync.items()})


def assert_same(one: RegOutput, other: RegOutput, **tolerance) -> None:
    torch.testing.assert_close(result(one), result(other), **tolerance)
    for name in ("metrics", "sync"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], equal_nan=True, **tolerance)


# -- every module -----------------------------------------------------------------------------


@every
def test_reads_only_what_it_requires_and_writes_one_result(case):
    module, x = trained(case), case.inputs(generator(), B, T)
    read = {"mask", *module.requires}
    lacking = RegInputs()
    for name, value in tensors(x).items():
        head, _, key = name.partition(".")
        if name in read or head in read:
            if key:
                getattr(lacking, head)[key] = value
            else:
                setattr(lacking, head, value)
    for name in {"dist", "ref_dist"} & read:
        setattr(lacking, name, getattr(x, name))
    out = module(lacking)
    assert_same(out, module(x))
    assert not list(module.parameters())
    assert all(v.dim() == 0 for v in out.metrics.values())
    stage = {"reward": "rewards", "advantage": "advantages", "token": "token_weight"}
    others = {"rewards", "advantages", "token_weight", "per_element", "loss"}
    others -= {stage.get(module.stage)} if module.stage in stage else {"per_element", "loss"}
    assert all(getattr(out, name) is None for name in others)
    assert module.stage not in stage or not result(out).requires_grad


@every
def test_padding_changes_no_result_and_no_gradient(case):
    module, x = trained(case), case.inputs(generator(), B, T)
    if x.mask is None:
        pytest.skip("no mask")
    valid = x.mask.bool()

    def spoiled(name, value):
        if name == "mask" or value.shape[:2] != (B, T):
            return value
        bad = torch.nan if value.is_floating_point() else (-1 if name == "turn" else 0)
        keep = valid.view(*valid.shape, *[1] * (value.dim() - 2))
        return torch.where(keep, value, bad)

    def widened(name, value):
        if value.shape[:2] != (B, T):
            return value
        bad = 0 if not value.is_floating_point() or name == "mask" else torch.inf
        bad = -1 if name == "turn" else bad
        return torch.cat([value, torch.full_like(value[:, :3], bad)], 1)

    expected, names = module(x), case.differentiable
    for other in (changed(x, spoiled), changed(changed(x, spoiled), widened)):
        found = module(other)
        assert found.metrics.keys() == expected.metrics.keys()
        for own in ("metrics", "sync"):
            for key, value in getattr(expected, own).items():
                torch.testing.assert_close(getattr(found, own)[key], value, equal_nan=True)
        ours, theirs = result(found), result(expected)
        if theirs.dim() == 2:
            ours, theirs = ours[:, :T][valid], theirs[valid]
        torch.testing.assert_close(ours, theirs)
        ours, theirs = gradients(module, other, names), gradients(module, x, names)
        for g, h in zip(ours, theirs, strict=True):
            torch.testing.assert_close(g[:, :T] if h.shape[:2] == (B, T) else g, h)
            assert g.isfinite().all()


@every
def test_permuting_rows_permutes_the_result(case):
    module, x = trained(case), case.inputs(generator(), B, T)
    half = torch.randperm(B // 2, generator=generator(1))
    order = torch.cat([half, half + B // 2])  # preference pairs stay i and i + B/2

    def permuted(name, value):
        if value.shape[:2] == (B, B):
            return value[order][:, order]
        return value[order] if value.dim() and len(value) == B else value

    out, expected = module(changed(x, permuted)), module(x)
    ours, theirs = result(out), result(expected)
    torch.testing.assert_close(ours, theirs[order] if theirs.dim() else theirs)
    for key, value in expected.metrics.items():
        torch.testing.assert_close(out.metrics[key], value, equal_nan=True)


@some(lambda case: not case.rows_mix)
def test_a_row_alone_gives_what_it_gives_in_a_batch(case):
    module, x = trained(case), case.inputs(generator(), B, T)
    expected = result(module(x))
    if expected.dim() == 0 or x.group is not None:
        pytest.skip("a scalar, or groups of two rows")
    own = result(module(changed(x, lambda name, v: v[2:3] if v.dim() and len(v) == B else v)))
    torch.testing.assert_close(own, expected[2:3])


@every
def test_coefficient_zero_gives_exact_zeros_and_needs_no_input(case):
    module = case.make()
    del module.coef
    module.coef = 0.0
    reg = Compose([module])
    assert not reg.stages
    assert not reg.requires
    loss, metrics, sync = reg.run_loss(RegInputs())
    assert loss.item() == 0.0
    assert not metrics
    assert not sync
    for stage in ("reward", "advantage", "token"):
        out = reg.run(stage, RegInputs())
        assert out.rewards is out.advantages is out.token_weight is None
    reg.update({})


@every
def test_a_batch_without_valid_elements_is_finite_with_a_gradient_path(case):
    module, x = trained(case), case.inputs(generator(), B, T)
    if x.mask is None:
        pytest.skip("no mask")
    x = changed(x, lambda name, v: torch.zeros_like(v) if name == "mask" else v)
    if module.stage not in ("loss", "model"):
        assert result(module(x)).isfinite().all()
        return
    loss, metrics, sync = Compose([module]).run_loss(x)
    assert loss.item() == 0
    if case.differentiable:
        assert loss.grad_fn is not None
        for g in torch.autograd.grad(loss, [tensors(x)[n] for n in case.differentiable],
                                     allow_unused=True):  # fmt: skip
            assert g is None or torch.equal(g, torch.zeros_like(g))
    before = copy.deepcopy(module.state_dict())
    module.update({key.split("/", 1)[1]: value for key, value in sync.items()})
    for key, value in module.state_dict().items():
        assert value.isfinite().all(), key
        if "step" not in key:
            torch.testing.assert_close(value, before[key], msg=f"{key} learned from nothing")
    del metrics


@every
def test_state_continues_bit_for_bit_after_a_round_trip(case, tmp_path):
    module = trained(case)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other = case.make()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(2):
        x = case.inputs(generator(20 + step), B, T)
        assert_same(module(x), other(x), rtol=0, atol=0)
        learn(module, x)
        learn(other, x)
    for key, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


@every
def test_a_copy_goes_its_own_way_and_evaluation_learns_nothing(case):
    module = trained(case)
    other, before = copy.deepcopy(module), copy.deepcopy(module.state_dict())
    learn(other, case.inputs(generator(30), B, T))
    Compose([module]).eval().update(
        {f"0_{type(module).__name__}/{k}": v
         for k, v in module(case.inputs(generator(30), B, T)).sync.items()}
    )  # fmt: skip
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
    buffers = {b.data_ptr() for b in module.buffers() if b.numel()}
    assert not buffers & {b.data_ptr() for b in other.buffers() if b.numel()}


@every
def test_forward_changes_neither_state_nor_inputs(case):
    module, x = trained(case), case.inputs(generator(), B, T)
    state = copy.deepcopy(module.state_dict())
    before = {name: value.detach().clone() for name, value in tensors(x).items()}
    module(x)
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key])
    for name, value in tensors(x).items():
        torch.testing.assert_close(value.detach(), before[name], rtol=0, atol=0, equal_nan=True)


@some(lambda case: case.control)
def test_a_control_actor_and_a_token_policy_of_one_token_agree(case):
    module, x = trained(case), case.inputs(generator(), B, 1)
    flat = changed(x, lambda name, v: v.squeeze(1) if v.shape[:2] == (B, 1) else v)
    torch.testing.assert_close(scalar(module, flat), scalar(module, x))
    ours = gradients(module, flat, case.differentiable)
    theirs = gradients(module, x, case.differentiable)
    for g, h in zip(ours, theirs, strict=True):
        torch.testing.assert_close(g, h.squeeze(1) if h.shape[:2] == (B, 1) else h)


@every
def test_half_precision_inputs_are_computed_in_float32(case):
    module, x = trained(case), case.inputs(generator(), B, T)
    half = changed(x, lambda name, v: v.bfloat16() if v.is_floating_point() else v)
    full = changed(half, lambda name, v: v.float() if v.is_floating_point() else v)
    expected = scalar(module, full)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scalar(module, half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@some(lambda case: bool(case.differentiable) and case.exact_gradient)
def test_gradients_are_those_of_the_value(case):
    module, x = trained(case).double(), case.inputs(generator(), 4, 3)
    x = changed(x, lambda name, v: v.double() if v.is_floating_point() else v)
    names = case.differentiable

    def value(*leaves):
        given = dict(zip(names, leaves, strict=True))
        own = replace(x, stats=dict(x.stats), extra=dict(x.extra))
        for name, leaf in given.items():
            head, _, key = name.partition(".")
            if key:
                getattr(own, head)[key] = leaf
            else:
                setattr(own, head, leaf)
        return scalar(module, own)

    assert torch.autograd.gradcheck(value, tuple(tensors(x)[name] for name in names))


def compiled_agrees(case: Case, backend: str, counted: bool) -> None:
    """One graph serves two sequence lengths and a changed multiplier, and agrees with eager."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    module = trained(case)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for rows, tokens in ((B, T), (B + 2, T + 4)):
        x = case.inputs(generator(rows), rows, tokens)
        assert_same(compiled(x), module(x))
        learn(module, x)
    if counted:
        assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
@every
def test_compiles_into_one_graph(case):
    compiled_agrees(case, "aot_eager", counted=True)


@pytest.mark.slow
@some(lambda case: case.name in ("kl-adaptive", "entropy-band-hinge"))
def test_compiles_with_inductor(case):
    compiled_agrees(case, "inductor", counted=True)


@some(lambda case: case.name in ("kl-adaptive", "entropy-anchor"))
def test_two_modules_compile_into_one_graph(case):
    compiled_agrees(case, "eager", counted=True)
