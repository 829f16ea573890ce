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

from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
    """One operator as it was called.

    Attributes:
        inputs: tensors among the arguments.
        writes: those of them that it changes.
        outs: tensors that it returned.
        fixed: the same inputs give the same outputs.
    """

    run: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    outs: list[Tensor]
    writes: list[Tensor]
    fixed: bool


class Recorder(TorchDispatchMode):
    """Within it, calls are made and noted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.syncs: list[str] = []
        self.refused: list[str] = []
        self.reads = HostReads(self)

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
            self.syncs.append(str(func))
        out = func(*args, **kwargs)
        named = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
        writes = [
            t
            for a in func._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write and a.name in named
            for t in tensors(named[a.name])
        ]
        if unrepeatable(func, inputs := tensors((args, kwargs)), tensors(out), writes):
            self.refused.append(str(func))
        fixed = torch.Tag.nondeterministic_seeded not in func.tags
        self.calls.append(Call(func, args, kwargs, inputs, tensors(out), writes, fixed))
        return out

    def check(self, result: Any) -> None:
        """Raises NotRecordable if the work cannot be repeated."""
        if self.syncs:
            raise NotRecordable(f"{self.syncs[0]} makes the host wait for a value", result)
        if self.refused:
            raise NotRecordable(f"{self.refused[0]} cannot be repeated on fixed memory", result)

    def whole(self, function: opaque.Function, inputs: Any, outputs: Any) -> None:
        self.calls.append(Call(function, inputs, {}, list(inputs), list(outputs), [], False))


class HostReads(TorchFunctionMode):
    """Notes reads of values that call no operator."""

    READS = (torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__)

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READS and self.recorder in opaque.watchers:  # not within an opaque call
            self.recorder.syncs.append(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


def unrepeatable(
    operator: Any, inputs: list[Tensor], outs: list[Tensor], writes: list[Tensor]
) -> bool:
    """Whether a replay of an operator would not do what the call did.

    Batch normalization changes its statistics without telling; some operators change a tensor's
    shape in place, or both write and return; conjugates are lazy.
    """
    given = {memory(x) for x in inputs if x.layout == torch.strided}
    return (
        "batch_norm" in str(operator)
        or torch.Tag.inplace_view in operator.tags
        or any(x.layout != torch.strided or x.is_conj() or x.is_neg() for x in [*inputs, *outs])
        or (bool(writes) and any(memory(x) not in given for x in outs))
    )


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def memory(x: Tensor) -> int:
    """The same number for all views of one storage."""
    return x.untyped_storage()._cdata


class Recording:
    """`work` run once under a recorder; a call replays it.

    Attributes:
        first: what the work returned.
        result: the same structure; its tensors are overwritten by every replay.
        written: what existed before and is changed by a replay, as whole storages.

    Raises:
        NotRecordable: after the work has been done.
    """

    def __init__(self, work: Callable[[], Any]):
        with Recorder() as recorder:
            self.first = work()
        recorder.check(self.first)
        calls = [c for c in recorder.calls if not is_view(c) and (c.outs or c.writes)]
        if reads_unwritten(calls):
            reason = (
                "memory is filled by code that is no operator of torch (see nets.kernels.opaque)"
            )
            raise NotRecordable(reason, self.first)
        try:
            plan = Plan(calls, tensors(self.first))
            self.steps = [step(c, plan) for c in calls if plan.replayed(c)]
        except (RuntimeError, NotImplementedError) as error:
            raise NotRecordable(str(error).splitlines()[0], self.first) from error
        self.result = tree_map(plan.moved, self.first)
        self.written = written(calls)
        places = {storage.data_ptr(): storage.nbytes() for storage in plan.place.values()}
        self.memory = sum(places.values())  # bytes of intermediate results

    def __call__(self) -> Any:
        with torch.inference_mode():
            for run, args, kwargs in self.steps:
                run(*args, **kwargs)
        return self.result


def is_view(call: Call) -> bool:
    """Whether it computes nothing: a new tensor on the memory of an argument."""
    if call.writes or not isinstance(call.run, torch._ops.OpOverload):
        return False
    given = {memory(x) for x in call.inputs}
    return bool(call.outs) and all(memory(x) in given for x in call.outs)


def named(call: Call, names: tuple[str, ...]) -> bool:
    return str(call.run).removeprefix("aten.").partition(".")[0] in names


def allocates(call: Call) -> bool:
    return named(call, ALLOCATIONS)


def reads_unwritten(calls: list[Call]) -> bool:
    """Whether fresh memory is read that nothing in the recording has written to."""
    blank: set[int] = set()
    for call in calls:
        if allocates(call):
            blank |= {memory(x) for x in call.outs}
            continue
        blank -= {memory(x) for x in call.writes}
        if any(memory(x) in blank for x in call.inputs):
            return True
    return False


class Plan:
    """Where the intermediate results of a recording live.

    Args:
        calls: all that compute something, in order.
        kept: tensors that must outlive the last call.
    """

    def __init__(self, calls: list[Call], kept: Iterable[Tensor]):
        birth: dict[int, int] = {}
        last: dict[int, int] = {}
        size: dict[int, int] = {}
        outside: set[int] = set()
        for i, call in enumerate(calls):
            outside |= {memory(x) for x in call.inputs} - birth.keys()
            for x in [*call.inputs, *call.outs]:
                if (key := memory(x)) not in outside:
                    birth.setdefault(key, i)
                    size.setdefault(key, x.untyped_storage().nbytes())
                    last[key] = i
        changed = {memory(x) for call in calls for x in call.writes}
        self.constant = self.constants(calls, birth, changed)
        for x in kept:
            if memory(x) in last:
                last[memory(x)] = len(calls)
        self.place: dict[int, torch.UntypedStorage] = {}
        free: dict[int, list[torch.UntypedStorage]] = {}
        own: set[int] = set()
        begin, end = by_time(birth), by_time(last)
        for i, call in enumerate(calls):
            for key in begin.get(i, ()):
                if key in self.constant:
                    continue
                spare = free.get(size[key])
                if new_memory(call):
                    own.add(key)
                    spare = None
                self.place[key] = spare.pop() if spare else torch.UntypedStorage(size[key])
            for key in end.get(i, ()):
                if key in self.place and key not in own:
                    free.setdefault(size[key], []).append(self.place[key])
        self.tensors: dict[int, Tensor] = {}
        self.families: dict[int, list[Tensor]] = {key: [] for key in birth}  # all on one memory

    @staticmethod
    def constants(calls: list[Call], birth: dict[int, int], changed: set[int]) -> set[int]:
        """Results that come out the same in every replay."""
        found: set[int] = set()
        for call in calls:
            shaped = named(call, SHAPED)
            inputs = set() if shaped else {memory(x) for x in call.inputs}
            made = {memory(x) for x in call.outs}
            if call.fixed and not call.writes and inputs <= found and not made & changed:
                found |= made & birth.keys()
        return found

    def replayed(self, call: Call) -> bool:
        return not allocates(call) and not (
            call.outs and not call.writes and all(memory(x) in self.constant for x in call.outs)
        )

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


def by_time(times: dict[int, int]) -> dict[int, list[int]]:
    """The keys of each value."""
    found: dict[int, list[int]] = {}
    for key, time in times.items():
        found.setdefault(time, []).append(key)
    return found


def written(calls: list[Call]) -> list[Tensor]:
    """The tensors that existed before the calls and are changed by them, as whole storages."""
    outside: set[int] = set()
    born: set[int] = set()
    found: dict[int, Tensor] = {}
    for call in calls:
        outside |= {memory(x) for x in call.inputs} - born
        born |= {memory(x) for x in call.outs} - outside
        found |= {memory(x): x for x in call.writes if memory(x) in outside}
    return [everything(x) for x in found.values()]


def everything(x: Tensor) -> Tensor:
    """All of the storage of `x`, (n,)."""
    storage = x.untyped_storage()
    every = torch.empty(0, dtype=x.dtype, device=x.device)
    return every.set_(storage, 0, (storage.nbytes() // x.element_size(),), (1,))


def step(call: Call, plan: Plan) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What a replay does for a call: the same kernel, writing where the results live."""
    run, args, kwargs = call.run, tree_map(plan.moved, call.args), tree_map(plan.moved, call.kwargs)
    outs = [plan.moved(x) for x in call.outs]
    if call.writes:
        return run, args, kwargs
    if not isinstance(run, torch._ops.OpOverload):

        def copying(*args: Any) -> None:
            with torch.inference_mode(False), torch.no_grad():  # what it keeps is ordinary
                for out, value in zip(outs, run(*args), strict=True):
                    out.copy_(value)

        return copying, args, kwargs
    found = out_variant(run, len(outs))
    if found is not None:
        operator, names = found
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


def new_memory(call: Call) -> bool:
    """Whether the call's results come in memory of their own, as torch's operators return them."""
    return (
        isinstance(call.run, torch._ops.OpOverload)
        and not call.writes
        and not allocates(call)
        and out_variant(call.run, len(call.outs)) is None
    )


def out_variant(operator: Any, count: int) -> tuple[Any, list[str]] | None:
    """The operator's form that writes into given tensors, and the names of those arguments.

    Args:
        count: of tensors that the call returned; gradients that nobody asks for are None.
    """
    mine = {a.name: str(a.type) for a in operator._schema.arguments}
    returns = [str(r.type) for r in operator._schema.returns]
    for name in operator.overloadpacket.overloads():
        other = getattr(operator.overloadpacket, name)
        outs = [a.name for a in other._schema.arguments if a.is_out]
        rest = {a.name: str(a.type) for a in other._schema.arguments if not a.is_out}
        same = rest.items() <= mine.items() and mine.keys() - rest.keys() <= PLACEMENT
        if same and returns == ["Tensor"] * len(outs) and len(outs) == count:
            return other, outs
    return None
