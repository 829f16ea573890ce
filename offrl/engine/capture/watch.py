"""What Python decides in an update and a capture fixes: plain values, and which objects are used.

A walk over everything that can be reached from an algorithm notes both. To look again takes
some 50 nanoseconds per value, so it is done before every replay.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from operator import getitem, is_
from typing import Any

from torch import Generator, Tensor, nn

from offrl.engine.state import PLAIN, constant

CONTENT = ("_parameters", "_buffers", "_modules")
INTERNAL = vars(nn.Module()).keys() - {"training"}  # torch's own attributes of a module


class Watch:
    """The values and objects that make up an algorithm, as they are now.

    Attributes:
        tensors: all that can be reached, parameters and optimizers' averages too.
        generators: likewise.
    """

    def __init__(self, algo: Any):
        self.tensors: list[Tensor] = []
        self.generators: list[Generator] = []
        self.views: list[Any] = []  # of dicts and lists, as they are at any time
        self.sizes: list[tuple[str, int]] = []
        self.holders: list[dict[Any, Any]] = []  # single entries, which may have new neighbors
        self.keys: list[Any] = []
        self.names: tuple[list[str], list[str]] = ([], [])  # of values in views, and of entries
        self.known: dict[int, Any] = {}
        self.walk(algo, type(algo).__name__)
        self.before = list(self.now())

    def now(self) -> Iterator[Any]:
        return chain(chain.from_iterable(self.views), map(getitem, self.holders, self.keys))

    def changes(self) -> str | None:
        """What has become of the first value that is another one now: "DQN.count changes"."""
        try:
            now = list(self.now())
        except LookupError as error:
            return f"{error} is removed"
        if len(now) == len(self.before) and all(map(is_, now, self.before)):
            return None
        for view, (name, size) in zip(self.views, self.sizes, strict=True):
            if len(view) != size:
                return f"the length of {name} changes"
        for name, old, new in zip(chain(*self.names), self.before, now, strict=True):
            if type(old) is type(new) and plain(old) and old == new:
                continue
            if old is not new:
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
        elif isinstance(value, (list, tuple)):
            self.view(value, value, name, [f"{name}[{i}]" for i in range(len(value))])
        elif isinstance(value, dict):
            if isinstance(value, defaultdict):  # grows by itself, as an optimizer's state does
                self.entries(value, [(key, f"{name}[{i}]") for i, key in enumerate(value)])
            else:
                self.view(value.values(), value.values(), name, [f"{name}.{key}" for key in value])
        elif hasattr(value, "__dict__") and not constant(value):
            inside = vars(value)
            skipped = INTERNAL if isinstance(value, nn.Module) else ()
            self.entries(inside, [(k, f"{name}.{k}") for k in inside if k not in skipped])
            for key in CONTENT:
                self.walk(inside.get(key) or None, name)

    def view(self, view: Any, values: Any, name: str, names: list[str]) -> None:
        """Note all that a dict or list holds."""
        self.views.append(view)
        self.sizes.append((name, len(names)))
        self.names[0].extend(names)
        for value, path in zip(values, names, strict=True):
            self.walk(value, path)

    def entries(self, holder: dict[Any, Any], named: list[tuple[Any, str]]) -> None:
        """Note single entries of a dict."""
        for key, name in named:
            self.holders.append(holder)
            self.keys.append(key)
            self.names[1].append(name)
            self.walk(holder[key], name)


def plain(value: Any) -> bool:
    return all(map(plain, value)) if isinstance(value, tuple) else isinstance(value, PLAIN)
