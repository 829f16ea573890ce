"""Torch work on a CPU, run once and then replayed as its bare kernels.

What a CUDA graph is to a GPU. Every operator that reaches torch's dispatcher, of the forward pass,
the backward pass and the optimizer alike, is noted with the tensors it was given. A replay calls
the same kernels in the same order on tensors that stay where they are: without the Python of the
work, without autograd, without allocating. It draws from the same generator, so its results are
bit-equal to the work's own.

Left out of a replay: views, whose memory does not move, and operators whose inputs never change.
Intermediate results take over the memory of those that are no longer needed, the latest first,
because that is what the processor's cache still holds. Where an operator cannot write into given
memory, its result's tensors are put on the new memory.

The limits are a CUDA graph's: shapes are fixed, no value is read on the host, state is changed in
place, and numbers of Python keep the value they had. A call of `offrl.nets.kernels.opaque` is
replayed whole.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from offrl.nets.kernels import opaque

# operators that read values on the host, or size their results by values
SYNCS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
# operators that ask a tensor for its shape only
SHAPED = ("ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full")
# of an allocation; an operator that writes into given memory takes them from it
PLACEMENT = {"dtype", "layout", "device", "pin_memory", "memory_format"}
WAITS = "makes the host wait for a value"


def syncs_host(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the host has to wait for a value: to read it, to size a result, to move a tensor."""
    name = str(operator).removeprefix("aten.")
    if "index" in name and isinstance(args[1], (list, tuple)):  # masks are sized, integers are not
        return any(p is not None and p.dtype in (torch.bool, torch.uint8) for p in args[1])
    home = [args[0].device, args[1].device] if name.startswith("copy_.") else []
    home = [kwargs.get("device"), args[0].device] if name.startswith("_to_copy.") else home
    moved = len({torch.device(device).type for device in home if device is not None}) > 1
    return moved or not SYNCS.isdisjoint(operator.tags)


class NotRecordable(Exception):
    """The work does what a replay could not repeat.

    Attributes:
        result: of the work, if it has been done.
    """

    def __init__(self, reason: str, result: Any):
        super().__init__(reason)
        self.result = result


@dataclass
class Call:
    """One operator as it was called."""

    run: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    writes: list[Tensor]  # tensors among the arguments that it changes
    outs: list[Tensor]  # tensors that it returned
    fixed: bool  # the same inputs give the same outputs

    def __post_init__(self) -> None:
        self.inputs = tensors((self.args, self.kwargs))  # all among the arguments
        self.operator = isinstance(self.run, torch._ops.OpOverload)  # no opaque function

    def named(self, names: tuple[str, ...]) -> bool:
        return str(self.run).removeprefix("aten.").partition(".")[0] in names

    def is_view(self) -> bool:
        """Whether it computes nothing: a new tensor on the memory of an argument."""
        if self.writes or not self.operator:
            return False
        return bool(self.outs) and memories(self.outs) <= memories(self.inputs)

    def is_repeatable(self) -> bool:
        """Whether a replay of the operator would do what the call did.

        Batch normalization changes its statistics without telling; some operators change a tensor's
        shape in place, or both write and return; conjugates are lazy.
        """
        for x in (*self.inputs, *self.outs):
            if x.layout != torch.strided or x.is_conj() or x.is_neg():
                return False
        if torch.Tag.inplace_view in self.run.tags or "batch_norm" in str(self.run):
            return False
        return not self.writes or memories(self.outs) <= memories(self.inputs)

    @cached_property
    def variant(self) -> tuple[Any, list[str]] | None:
        """The operator's form that writes into given tensors, and the names of those arguments.

        These are as many as tensors were returned: gradients that nobody asks for are None.
        """
        mine = {a.name: str(a.type) for a in self.run._schema.arguments}
        returns = [str(r.type) for r in self.run._schema.returns]
        for name in self.run.overloadpacket.overloads():
            other = getattr(self.run.overloadpacket, name)
            outs = [a.name for a in other._schema.arguments if a.is_out]
            rest = {a.name: str(a.type) for a in other._schema.arguments if not a.is_out}
            same = rest.items() <= mine.items() and mine.keys() - rest.keys() <= PLACEMENT
            if same and returns == ["Tensor"] * len(outs) and len(outs) == len(self.outs):
                return other, outs
        return None

    def takes_no_memory(self) -> bool:
        """Whether its results come in memory of their own, as torch's operators return them."""
        computes = self.operator and not self.writes and not self.named(ALLOCATIONS)
        return computes and self.variant is None


class Recorder(TorchDispatchMode):
    """Within it, calls are made and noted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.refused: list[str] = []  # why the work cannot be repeated
        self.reads = HostReads(self.refused)

    def __enter__(self) -> "Recorder":
        opaque.watchers.append(self)
        self.reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.reads.__exit__(*error)
        opaque.watchers.remove(self)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if syncs_host(func, args, kwargs):
            self.refused.append(f"{func} {WAITS}")
        out = func(*args, **kwargs)
        arguments = func._schema.arguments
        given = dict(zip([a.name for a in arguments], args, strict=False)) | kwargs
        writes = tensors([given.get(a.name) for a in arguments if a.is_write])
        fixed = torch.Tag.nondeterministic_seeded not in func.tags
        self.calls.append(Call(func, args, kwargs, writes, tensors(out), fixed))
        if not self.calls[-1].is_repeatable():
            self.refused.append(f"{func} cannot be repeated on fixed memory")
        return out

    def whole(self, function: opaque.Function, inputs: Any, outputs: Any) -> None:
        self.calls.append(Call(function, inputs, {}, [], list(outputs), False))


class HostReads(TorchFunctionMode):
    """Notes reads of values that call no operator."""

    READS = (torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__)

    def __init__(self, refused: list[str]):
        super().__init__()
        self.refused = refused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READS and opaque.watchers:  # not within an opaque call
            self.refused.append(f"Tensor.{func.__name__} {WAITS}")
        return func(*args, **(kwargs or {}))


def recorded(work: Callable[[], Any]) -> tuple[Any, list[Call]]:
    """Do work; returns its result, and the calls that compute something.

    Raises:
        NotRecordable: after the work, if it cannot be repeated.
    """
    with Recorder() as recorder:
        result = work()
    if recorder.refused:
        raise NotRecordable(recorder.refused[0], result)
    return result, [c for c in recorder.calls if not c.is_view() and (c.outs or c.writes)]


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def memory(x: Tensor) -> int:
    """The same number for all views of one storage."""
    return x.untyped_storage()._cdata


def memories(xs: Iterable[Tensor]) -> set[int]:
    return set(map(memory, xs))


class Recording:
    """`work` run once under a recorder; a call replays it.

    Attributes:
        first: what the work returned.
        result: the same structure; its tensors are overwritten by every replay.
        written: what existed before and is changed by a replay, as whole storages.
        memory: bytes of intermediate results.

    Raises:
        NotRecordable: after the work has been done.
    """

    def __init__(self, work: Callable[[], Any]):
        self.first, calls = recorded(work)
        if reads_unwritten(calls):
            reason = "memory is filled by code that is no operator of torch"
            raise NotRecordable(f"{reason} (see nets.kernels.opaque)", self.first)
        try:
            plan = Plan(calls, tensors(self.first))
            self.steps = [step(c, plan) for c in calls if plan.replayed(c)]
        except (RuntimeError, NotImplementedError) as error:
            raise NotRecordable(str(error).splitlines()[0], self.first) from error
        self.result = tree_map(plan.moved, self.first)
        self.written = written(calls)
        self.memory = sum({x.data_ptr(): x.nbytes() for x in plan.place.values()}.values())

    def __call__(self) -> Any:
        with torch.inference_mode():
            for run, args, kwargs in self.steps:
                run(*args, **kwargs)
        return self.result


def reads_unwritten(calls: list[Call]) -> bool:
    """Whether fresh memory is read that nothing in the recording has written to."""
    blank: set[int] = set()
    for call in calls:
        if call.named(ALLOCATIONS):
            blank |= memories(call.outs)
            continue
        blank -= memories(call.writes)
        if blank & memories(call.inputs):
            return True
    return False


def existing(calls: list[Call]) -> set[int]:
    """Memory that was there before the calls."""
    made: set[int] = set()
    found: set[int] = set()
    for call in calls:
        found |= memories(call.inputs) - made
        made |= memories(call.outs) - found
    return found


def written(calls: list[Call]) -> list[Tensor]:
    """The tensors that existed before the calls and are changed by them, as whole storages."""
    before = existing(calls)
    found = {memory(x): x for call in calls for x in call.writes}
    return [everything(x) for key, x in found.items() if key in before]


def everything(x: Tensor) -> Tensor:
    """All of the storage of `x`, (n,)."""
    storage = x.untyped_storage()
    every = torch.empty(0, dtype=x.dtype, device=x.device)
    return every.set_(storage, 0, (storage.nbytes() // x.element_size(),), (1,))


class Plan:
    """Where the intermediate results of a recording live.

    Args:
        calls: all that compute something, in order.
        kept: tensors that must outlive the last call.
    """

    def __init__(self, calls: list[Call], kept: Iterable[Tensor]):
        before, changed = existing(calls), memories(x for call in calls for x in call.writes)
        last = {memory(x): i for i, c in enumerate(calls) for x in (*c.inputs, *c.outs)}
        last |= dict.fromkeys(map(memory, kept), len(calls))
        self.constant: set[int] = set()  # results that come out the same in every replay
        self.place: dict[int, torch.UntypedStorage] = {}
        self.tensors: dict[int, Tensor] = {}
        self.families: dict[int, list[Tensor]] = defaultdict(list)  # all on one memory
        free: dict[int, list[torch.UntypedStorage]] = defaultdict(list)  # by size
        for i, call in enumerate(calls):
            made = {memory(x): x.untyped_storage().nbytes() for x in call.outs}
            inputs = set() if call.named(SHAPED) else memories(call.inputs)
            steady = call.fixed and not call.writes and inputs <= self.constant
            if steady and not made.keys() & changed:
                self.constant |= made.keys() - before
            alone = call.takes_no_memory()
            for key, size in made.items():
                if key not in before | self.constant | self.place.keys():
                    spare = not alone and free[size]
                    self.place[key] = spare.pop() if spare else torch.UntypedStorage(size)
                if alone:  # memory that comes anew in every replay, which nothing else may take
                    last.pop(key, None)
            for key in dict.fromkeys(map(memory, (*call.inputs, *call.outs))):
                if last.get(key) == i and key in self.place:
                    free[self.place[key].nbytes()].append(self.place[key])

    def replayed(self, call: Call) -> bool:
        steady = bool(call.outs) and not call.writes and memories(call.outs) <= self.constant
        return not steady and not call.named(ALLOCATIONS)

    def moved(self, x: Any) -> Any:
        """The tensor where the plan puts it."""
        if not isinstance(x, Tensor) or memory(x) not in self.place:
            return x
        if id(x) not in self.tensors:
            new = torch.empty(0, dtype=x.dtype)
            new.set_(self.place[memory(x)], x.storage_offset(), x.shape, x.stride())
            self.tensors[id(x)] = new
            self.families[memory(x)].append(new)
        return self.tensors[id(x)]


def step(call: Call, plan: Plan) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What a replay does for a call: the same kernel, writing where the results live."""
    run, args, kwargs = call.run, tree_map(plan.moved, call.args), tree_map(plan.moved, call.kwargs)
    outs = [plan.moved(x) for x in call.outs]
    if call.writes:
        return run, args, kwargs
    if not call.operator:

        def copying(*args: Any) -> None:
            with torch.inference_mode(False), torch.no_grad():  # what it keeps is ordinary
                for out, value in zip(outs, run(*args), strict=True):
                    out.copy_(value)

        return copying, args, kwargs
    if call.variant is not None:
        operator, names = call.variant
        known = {a.name for a in operator._schema.arguments}
        taken = {name: value for name, value in kwargs.items() if name in known}
        return operator, args, taken | dict(zip(names, outs, strict=True))
    families = [plan.families[memory(x)] for x in call.outs]

    def adopting(*args: Any, **kwargs: Any) -> None:
        for family, value in zip(families, tensors(run(*args, **kwargs)), strict=True):
            storage = value.untyped_storage()
            for x in family:
                x.set_(storage, x.storage_offset(), x.shape, x.stride())

    return adopting, args, kwargs
