"""What every module of the package keeps to, and the parts that modules are made of."""

import copy
import importlib.metadata
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offrl.regularizers import Compose, NLLAnchor, RegInputs, RegOutput, Regularizer
from offrl.regularizers.base import across_ranks
from offrl.regularizers.functional import masked_reduce
from tests.regularizers.cases import Case, all_cases

CASES = all_cases()
B, T = 8, 5  # T differs from B, so that shapes tell rows from tokens
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def some(keep: Callable[[Case], bool]):
    cases = [case for case in CASES if keep(case)]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def masked(case: Case) -> bool:
    """Padding means something to the module."""
    return case.inputs(generator(), B, T).mask is not None


def rowwise(case: Case) -> bool:
    """A row's output is its own: no scalar, no statistics of the batch, no groups of two rows."""
    x = case.inputs(generator(), B, T)
    return not case.rows_mix and x.group is None and result(trained(case)(x)).dim() > 0


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
    functions = {k: v for k, v in x.extra.items() if not isinstance(v, Tensor)}
    lacking.extra |= {k: v for k, v in functions.items() if f"extra.{k}" in read}
    out = module(lacking)
    assert_same(out, module(x))
    assert not list(module.parameters())
    assert all(v.dim() == 0 for v in out.metrics.values())
    hook = {"reward": "rewards", "advantage": "advantages", "token": "token_weight"}
    others = {"rewards", "advantages", "token_weight", "per_element", "loss"}
    others -= {hook.get(module.hook)} if module.hook in hook else {"per_element", "loss"}
    assert all(getattr(out, name) is None for name in others)
    assert module.hook not in hook or not result(out).requires_grad


@some(masked)
def test_padding_changes_no_result_and_no_gradient(case):
    module, x = trained(case), case.inputs(generator(), B, T)
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


@some(rowwise)
def test_a_row_alone_gives_what_it_gives_in_a_batch(case):
    module, x = trained(case), case.inputs(generator(), B, T)
    expected = result(module(x))
    own = result(module(changed(x, lambda name, v: v[2:3] if v.dim() and len(v) == B else v)))
    torch.testing.assert_close(own, expected[2:3])


@every
def test_coefficient_zero_gives_exact_zeros_and_needs_no_input(case):
    module = case.make()
    del module.coef
    module.coef = 0.0
    reg = Compose([module])
    assert not reg.hooks
    assert not reg.requires
    loss, metrics, sync = reg.run_loss(RegInputs())
    assert loss.item() == 0.0
    assert not metrics
    assert not sync
    for hook in ("reward", "advantage", "token"):
        out = reg.run(hook, RegInputs())
        assert out.rewards is out.advantages is out.token_weight is None
    reg.update({})


@some(masked)
def test_a_batch_without_valid_elements_is_finite_with_a_gradient_path(case):
    module, x = trained(case), case.inputs(generator(), B, T)
    x = changed(x, lambda name, v: torch.zeros_like(v) if name == "mask" else v)
    if module.hook not in ("loss", "model"):
        assert result(module(x)).isfinite().all()
        return
    loss, metrics, sync = Compose([module]).run_loss(x)
    assert loss.item() == 0
    if case.differentiable:
        assert loss.grad_fn is not None
        for g in torch.autograd.grad(
            loss, [tensors(x)[n] for n in case.differentiable], allow_unused=True
        ):
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
        {
            f"0_{type(module).__name__}/{k}": v
            for k, v in module(case.inputs(generator(30), B, T)).sync.items()
        }
    )
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


def compiled_agrees(case: Case, backend: str) -> None:
    """One graph serves two sequence lengths and a changed multiplier, and agrees with eager."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    module = trained(case)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for rows, tokens in ((B, T), (B + 2, T + 4)):
        x = case.inputs(generator(rows), rows, tokens)
        assert_same(compiled(x), module(x))
        counts.append(counter.frame_count)
        learn(module, x)
    torch._dynamo.reset()
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
@every
def test_compiles_into_one_graph(case):
    compiled_agrees(case, "aot_eager")


@pytest.mark.slow
@some(lambda case: case.name in ("kl-adaptive", "entropy-band-hinge"))
def test_compiles_with_inductor(case):
    compiled_agrees(case, "inductor")


@some(lambda case: case.name in ("kl-adaptive", "entropy-anchor"))
def test_two_modules_compile_into_one_graph(case):
    compiled_agrees(case, "eager")


# -- several processes --------------------------------------------------------------------------

WORLD = 2


def rows_of_ranks(reg: Compose) -> tuple[list[int], ...]:
    """Pairs (i, i + B/2) stay together; groups (two rows) do where trainers gather rows first."""
    if reg.hooks & {"reward", "advantage"}:
        return [0, 1, 4, 5], [2, 3, 6, 7]
    return [0, 2, 4, 6], [1, 3, 5, 7]


def uneven(case: Case) -> RegInputs:
    """The case's inputs with a row that has no token, so that ranks hold unequal counts."""
    x = case.inputs(generator(), B, T)
    if x.mask is not None:
        x.mask = x.mask.clone()
        x.mask[0] = 0
    return x


def rows_of(x: RegInputs, rows: list[int]) -> RegInputs:
    def own(name, value):
        if value.shape[:2] == (B, B):
            return value[rows][:, rows]
        return value[rows] if value.dim() and len(value) == B else value

    return changed(x, own)


def seen_by(rank: int, reg: Compose, x: RegInputs, gather=None) -> RegInputs:
    """A rank's rows, with those of all ranks where the module reads them."""
    ranks = rows_of_ranks(reg)

    def simulated(values):
        stacked = tensors(rows_of(x, [*ranks[0], *ranks[1]]))
        return {name: stacked[name].detach() for name in values}

    local = rows_of(x, ranks[rank])
    if not reg.across:
        return local
    return across_ranks(local, reg.across, gather or simulated, rank, x.chosen is not None)


def on_rank(case: Case, rank: int, gather=None):
    """One rank's composition, gradients of its rows, number of tokens, and sums."""
    reg, x = Compose([trained(case)]), uneven(case)
    local = seen_by(rank, reg, x, gather)
    counts = () if x.mask is None else (x.mask.sum(), x.mask.any(-1).sum())
    loss, _, sync = reg.run_loss(local, *(n / WORLD for n in counts))
    (part,) = reg.parts.values()
    if part.hook not in ("token", "loss", "model"):
        sync = {f"{name}/{k}": v for name in reg.parts for k, v in part(local).sync.items()}
    grads = [tensors(local)[name] for name in case.differentiable]
    if grads:
        found = torch.autograd.grad(loss, grads, allow_unused=True)
        grads = [
            torch.zeros_like(v) if g is None else g.detach()
            for g, v in zip(found, grads, strict=True)
        ]
    tokens = torch.zeros(()) if local.mask is None else local.mask.sum()
    return reg, grads, tokens, sync


def one_step(case: Case, reduce: Callable[[list[Tensor]], Tensor], ranks: list[int], gather=None):
    """Gradients and the state after an update of some ranks, given how sums become global."""
    found = [on_rank(case, rank, gather) for rank in ranks]
    total = reduce([reg.flatten(sync) for reg, _, _, sync in found])
    for reg, *_ in found:
        reg.update(reg.unflatten(total))
    return [(grads, reg.state_dict(), tokens) for reg, grads, tokens, _ in found]


def process(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=WORLD
    )

    def reduce(flats):
        (total,) = flats
        torch.distributed.all_reduce(total)
        return total

    def gather(values):
        found = {}
        for name, value in values.items():
            parts = [torch.empty_like(value) for _ in range(WORLD)]
            torch.distributed.all_gather(parts, value)
            found[name] = torch.cat(parts)
        return found

    found = {case.name: one_step(case, reduce, [rank], gather)[0] for case in CASES}
    torch.save(found, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@every
def test_gradients_and_state_of_two_ranks_are_those_of_the_whole_batch(case):
    ranks = one_step(case, sum, [0, 1])
    for key, value in ranks[0][1].items():
        assert torch.equal(value, ranks[1][1][key])
    module, x = trained(case), uneven(case)
    if case.rows_mix and module.hook in ("reward", "advantage"):
        return  # trainers gather rows before these hooks
    if x.mask is not None:
        assert ranks[0][2] != ranks[1][2]
    loss, _, _ = Compose([module]).run_loss(x)
    if case.differentiable:
        leaves = [tensors(x)[name] for name in case.differentiable]
        expected = torch.autograd.grad(loss, leaves, allow_unused=True)
        for i, (g, leaf) in enumerate(zip(expected, leaves, strict=True)):
            g = torch.zeros_like(leaf) if g is None else g
            for rank, rows in enumerate(rows_of_ranks(Compose([module]))):
                torch.testing.assert_close(ranks[rank][0][i] / WORLD, g[rows])
    learn(module, x)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(ranks[0][1][f"parts.0_{type(module).__name__}.{key}"], value)


# whose rows on one rank happen to say what all rows say, in these inputs
ALIKE = {"peak-entropy-batch", "drpo-constrained", "low-probability"}


@some(lambda case: case.make().whole_batch and case.name not in ALIKE)
def test_ranks_that_do_not_share_their_rows_are_told_from_those_that_do(case):
    def alone():
        module = case.make()
        module.whole_batch = False
        return module

    check = (
        test_token_weights_of_two_ranks_are_those_of_the_whole_batch
        if alone().hook == "token"
        else test_gradients_and_state_of_two_ranks_are_those_of_the_whole_batch
    )
    with pytest.raises(AssertionError):
        check(replace(case, make=alone))


@some(lambda case: case.make().hook == "token")
def test_token_weights_of_two_ranks_are_those_of_the_whole_batch(case):
    reg, x = Compose([trained(case)]), case.inputs(generator(), B, T)
    expected = reg.run("token", x).token_weight
    assert len(expected.unique()) > 1
    for rank, rows in enumerate(rows_of_ranks(reg)):
        found = reg.run("token", seen_by(rank, reg, x)).token_weight
        torch.testing.assert_close(found, expected[rows])


def test_rows_of_ranks_keep_their_order_and_their_padding_counts_for_nothing():
    """Ranks of 3 and 2 tokens; pairs of the first and second half of a rank's rows."""
    masks = [torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 1], [1, 0]])]
    logp = [-torch.arange(1.0, 7).view(2, 3), -torch.arange(7.0, 11).view(2, 2)]
    padded = {
        "logp": torch.cat([logp[0], torch.nn.functional.pad(logp[1], (0, 1))]),
        "mask": torch.cat([masks[0], torch.nn.functional.pad(masks[1], (0, 1))]),
        "chosen": torch.tensor([True, False] * 2),
    }
    for rank in (0, 1):
        own = RegInputs(
            logp=logp[rank].requires_grad_(), mask=masks[rank], chosen=torch.tensor([True, False])
        )
        x = across_ranks(own, {"logp", "chosen"}, lambda values: dict(padded), rank, pairs=True)
        assert x.ranks.inputs.chosen.tolist() == [True, True, False, False]
        assert x.ranks.inputs.logp[:, 0].tolist() == [-1, -7, -4, -9]
        assert x.ranks.own.tolist() == [rank, rank + 2]
        loss, _, _ = Compose([NLLAnchor(1.0)]).run_loss(x)
        assert loss.item() == pytest.approx((1 + 2 + 3 + 7 + 8) / 5)
        (gradient,) = torch.autograd.grad(loss, logp[rank])
        # the mean of the ranks' gradients is that of the loss, so a rank's own counts twice
        assert gradient[0].tolist() == pytest.approx([-2 / 5] * logp[rank].size(1))
        assert (gradient[1] == 0).all()


def test_a_rank_with_less_than_its_share_of_the_count_is_weighed_by_it():
    """One token on two ranks: each divides by a half, and the mean is the token's value."""
    x = [torch.tensor([3.0]), torch.tensor([0.0])]
    mask = [torch.tensor([1]), torch.tensor([0])]
    terms = [masked_reduce(v, m, count=torch.tensor(0.5)) for v, m in zip(x, mask, strict=True)]
    assert sum(terms) / 2 == 3


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_unequal_micro_batches_with_counts_are_one_batch(reduction):
    g = generator()
    logp = torch.randn(6, 4, generator=g).requires_grad_()
    mask = (torch.rand(6, 4, generator=g) > 0.4).long()
    mask[1], mask[3] = 0, 1  # a sequence without tokens in the first micro-batch
    reg = Compose([NLLAnchor(1.0, reduction, rows="all")])
    counts = (mask.sum() / 2, mask.any(-1).sum() / 2)
    whole, _, _ = reg.run_loss(RegInputs(logp=logp, mask=mask))
    parts = [
        reg.run_loss(RegInputs(logp=logp[i : i + 3], mask=mask[i : i + 3]), *counts)[0]
        for i in (0, 3)
    ]
    torch.testing.assert_close(sum(parts) / 2, whole)
    expected, found = (torch.autograd.grad(v, logp)[0] for v in (whole, sum(parts) / 2))
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_two_processes_agree_with_two_ranks_in_one(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=WORLD)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for case in CASES:
        for rank, (grads, state, _) in enumerate(one_step(case, sum, [0, 1])):
            there, state_there, _ = found[rank][case.name]
            for ours, theirs in zip(grads, there, strict=True):
                torch.testing.assert_close(ours, theirs)
            for key, value in state.items():
                torch.testing.assert_close(state_there[key], value)
                assert torch.equal(state_there[key], found[0][case.name][1][key])


# -- nothing but torch --------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
SHIPPED = ("offrl", "configs", "pyproject.toml", "setup.cfg", "README.md", "LICENSE")
STRICT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        ours = name == "offrl" or name.startswith("offrl.regularizers")
        if not ours and name.partition(".")[0] not in ALLOWED | sys.stdlib_module_names:
            raise ModuleNotFoundError(f"refused: {name}", name=name)
sys.meta_path.insert(0, Refuse())
from offrl.regularizers import functional
import torch
found = functional.token_stats_from_logits(torch.zeros(1, 4), want=["entropy"])
print(round(found["entropy"].item(), 4))
"""


def torch_and_what_it_needs() -> set[str]:
    """Installed distributions that torch requires, itself included."""
    found, waiting = set(), ["torch"]
    while waiting:
        name = re.split(r"[^\w.-]", waiting.pop())[0].lower().replace("_", "-")
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            waiting += [need for need in needed if "extra ==" not in need]
    return found


def strict() -> str:
    """A program that finds only the standard library, torch and its requirements."""
    needed = torch_and_what_it_needs()
    modules = {
        top
        for top, owners in importlib.metadata.packages_distributions().items()
        if {owner.lower().replace("_", "-") for owner in owners} & needed
    }
    return f"ALLOWED = {modules}\n{STRICT}"


def test_imports_nothing_but_torch():
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    out = subprocess.run(
        [sys.executable, "-c", strict()], env=environment, text=True, capture_output=True
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "1.3863"


@pytest.mark.slow
def test_installs_and_works_in_an_environment_with_torch_alone(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    for old in (tmp_path / "venv" / "lib").glob("python*/site-packages/setuptools*"):
        shutil.rmtree(old)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for name in {*torch_and_what_it_needs(), "setuptools"}:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in SHIPPED:
        source = ROOT / name
        copied = shutil.copytree if source.is_dir() else shutil.copy
        copied(source, checkout / name)

    def run(*command):
        out = subprocess.run(
            [python, *command], cwd=tmp_path, env={"PATH": ""}, text=True, capture_output=True
        )
        assert out.returncode == 0, out.stdout + out.stderr
        return out.stdout.strip()

    run("-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", checkout)
    assert run("-c", strict()) == "1.3863"
    assert str(site) in run("-c", "import offrl; print(offrl.__file__)")
    assert "gymnasium" not in run("-m", "pip", "list")
