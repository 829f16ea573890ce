"""What Python decides in an update and a capture fixes: plain values, and which objects are used.

A walk over everything that can be reached from an algorithm notes both. To look again takes
some 50 nanoseconds per value, so it is done before every replay.
"""

from collections import defaultdict
from collections.abc import Iterable
from operator import getitem, is_
from typing import Any

from torch import Generator, Tensor, nn

from offrl.engine.state import PLAIN, constant

CONTENT = ("_parameters", "_buffers", "_modules")
INTERNAL = vars(nn.Module()).keys() - {"training"}  # torch's own attributes of a module


class Watch:
    """The values and objects that make up an algorithm and its parts, as they are now."""

    def __init__(self, algo: Any):
        self.tensors: list[Tensor] = []  # all that can be reached, optimizers' averages too
        self.generators: list[Generator] = []
        self.holders: list[Any] = []  # of each value, as are the next two
        self.keys: list[Any] = []
        self.names: list[str] = []
        self.sized: list[tuple[str, Any, int]] = []  # what must not grow: its name, itself, length
        self.known: dict[int, Any] = {}
        self.walk(algo, type(algo).__name__)
        self.before = list(map(getitem, self.holders, self.keys))

    def changes(self) -> str | None:
        """What has become of the first value that is another one now: "DQN.count changes"."""
        for name, holder, size in self.sized:
            if len(holder) != size:
                return f"the length of {name} changes"
        try:
            now = list(map(getitem, self.holders, self.keys))
        except LookupError as error:
            return f"{error} is removed"
        if all(map(is_, now, self.before)):
            return None
        for name, old, new in zip(self.names, self.before, now, strict=True):
            if old is new or (type(old) is type(new) and plain(old) and old == new):
                continue
            return f"{name} changes" if plain(old) else f"{name} is replaced"
        self.before = now
        return None

    def walk(self, value: Any, name: str) -> None:
        if plain(value) or id(value) in self.known:
            return
        self.known[id(value)] = value
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif isinstance(value, Generator):
            self.generators.append(value)
        elif isinstance(value, (list, tuple, dict)):
            if not isinstance(value, defaultdict):  # grows by itself, as an optimizer's state does
                self.sized.append((name, value, len(value)))
            self.entries(value, value if isinstance(value, dict) else range(len(value)), name)
        elif hasattr(value, "__dict__") and not constant(value):
            inside = vars(value)  # grows as other turns set attributes of their own
            skipped = INTERNAL if isinstance(value, nn.Module) else ()
            self.entries(inside, [key for key in inside if key not in skipped], name)
            for key in CONTENT:
                self.walk(inside.get(key) or None, name)

    def entries(self, holder: Any, keys: Iterable[Any], name: str) -> None:
        """Note what a dict or list holds."""
        for i, key in enumerate(keys):
            path = f"{name}.{key}" if isinstance(key, str) else f"{name}[{i}]"
            self.holders.append(holder)
            self.keys.append(key)
            self.names.append(path)
            self.walk(holder[key], path)


def plain(value: Any) -> bool:
    return all(map(plain, value)) if isinstance(value, tuple) else isinstance(value, PLAIN)
