"""The state of an algorithm, found on the object: no method lists what it consists of.

State are attributes with `state_dict` and `load_state_dict` (optimizers; networks, with the numbers
and tensors that their modules hold unregistered), tensors, generators and plain values, in dicts,
lists and tuples too, and objects of a method's own that hold such. Functions and frozen
dataclasses (config, spec, tables of a data set) are constants, and what is a `Part` of a stage is
saved with its stage.
"""

from collections.abc import Iterator
from dataclasses import is_dataclass
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_map_only

UNREGISTERED = "(unregistered)"  # beside the names of a network's state_dict
PLAIN = (bool, int, float, str, type(None))
CONSTANT = (FunctionType, MethodType, BuiltinFunctionType, type, torch.device, torch.dtype)


def state_of(owner: Any) -> dict[str, Any]:
    """Everything of `owner` that a run needs to continue: tensors and plain values, by attribute.

    Raises:
        ValueError: naming the attribute that is of a kind which cannot be saved.
    """
    return {k: packed(value, f"{type(owner).__name__}.{k}") for k, value in kept(owner).items()}


def kept(owner: Any) -> dict[str, Any]:
    """The attributes of an object that are state."""
    part = lambda value: hasattr(value, "save") and hasattr(value, "load")  # noqa: E731
    return {k: v for k, v in vars(owner).items() if not (constant(v) or part(v))}


def constant(value: Any) -> bool:
    frozen = is_dataclass(value) and value.__dataclass_params__.frozen  # type: ignore[union-attr]
    return isinstance(value, CONSTANT) or frozen


def packed(value: Any, path: str) -> Any:
    if hasattr(value, "state_dict"):
        held = {name: getattr(part, key) for name, part, key in unregistered(value)}
        return value.state_dict() | ({UNREGISTERED: held} if held else {})
    if isinstance(value, Generator):
        return value.get_state()
    if isinstance(value, Tensor) or type(value) in PLAIN:  # no subclass: NumPy's are not loaded
        return value
    if isinstance(value, dict):
        return {key: packed(part, f"{path}[{key!r}]") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [packed(part, f"{path}[{i}]") for i, part in enumerate(value)]
    if hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] != "numpy":
        return {key: packed(part, f"{path}.{key}") for key, part in kept(value).items()}
    raise ValueError(
        f"{path} is a {type(value).__name__}, which cannot be saved; hold it as a tensor, a number "
        "or a frozen dataclass"
    )


def unregistered(net: Any) -> list[tuple[str, nn.Module, str]]:
    """Numbers and tensors in attributes of a network's modules: (name, module, attribute)."""
    return [
        (f"{name}.{key}", part, key)
        for name, part in (net.named_modules() if isinstance(net, nn.Module) else ())
        for key, value in vars(part).items()
        if isinstance(value, Tensor) or (type(value) in (bool, int, float) and key != "training")
        if not key.startswith("_")
    ]


def load_state(algo: Any, state: dict[str, Any]) -> None:
    """Inverse of `state_of`. Tensors, dicts and lists are filled in place: others may hold them.

    What is new in them, and what takes the place of None, comes to the device of `algo.generator`.

    Raises:
        ValueError: naming the attribute, if the state is of another method or of other sizes.
    """
    fill(algo, tree_map_only(Tensor, lambda x: x.to(algo.generator.device), state))


def fill(owner: Any, state: dict[str, Any]) -> None:
    present = kept(owner)
    if state.keys() != present.keys():
        raise ValueError(
            f"the checkpoint holds {', '.join(sorted(state))}; "
            f"{type(owner).__name__} needs {', '.join(sorted(present))}"
        )
    for key, value in state.items():
        setattr(owner, key, unpacked(present[key], value, key))


def unpacked(current: Any, state: Any, path: str) -> Any:
    """What an attribute becomes: `current` itself where it can be filled, else the state."""
    try:
        if hasattr(current, "load_state_dict"):
            current.load_state_dict({k: v for k, v in state.items() if k != UNREGISTERED})
            for name, part, key in unregistered(current):
                value = unpacked(getattr(part, key), state[UNREGISTERED][name], f"{path}.{name}")
                setattr(part, key, value)
        elif isinstance(current, Generator):
            current.set_state(state.cpu())
        elif isinstance(current, Tensor):
            if current.shape != state.shape:
                raise ValueError(f"shape {tuple(state.shape)}, not {tuple(current.shape)}")
            with torch.no_grad():
                current.copy_(state)
        elif isinstance(current, PLAIN):
            return state
        elif isinstance(current, dict):
            new = {k: unpacked(current[k], v, k) if k in current else v for k, v in state.items()}
            current.clear()
            current.update(new)
        elif isinstance(current, (list, tuple)):
            parts = list(state)  # of another length: one that grows
            if len(current) == len(state):
                pairs = enumerate(zip(current, state, strict=True))
                parts = [unpacked(*pair, f"{path}[{i}]") for i, pair in pairs]
            if isinstance(current, tuple):
                return tuple(parts)
            current[:] = parts
        else:
            fill(current, state)
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"the checkpoint's {path} does not fit: {error}") from error
    return current


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(part, f"{path}.{key}".removeprefix("."))
