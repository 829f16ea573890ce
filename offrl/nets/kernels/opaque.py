"""Calls that a recording of operators takes as a whole; torch only."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Function = Callable[..., Sequence[Tensor]]


class Watcher(Protocol):
    def whole(
        self, function: Function, inputs: tuple[Tensor, ...], outputs: Sequence[Tensor]
    ) -> None: ...


watchers: list[Watcher] = []  # the recordings that are being made


def opaque(function: Function, *inputs: Tensor) -> Sequence[Tensor]:
    """function(*inputs), for work that torch's dispatcher does not see or that depends on values.

    Compiled loops on raw memory are the first kind, a search that looks closer where it must the
    second. The function returns new tensors whose shapes do not depend on values; no gradient
    passes. Outside of a recording this is the plain call. In one, the call is noted and made again
    in every replay.
    """
    if not watchers:
        return function(*inputs)
    told, watchers[:] = list(watchers), []  # an opaque call within this one is part of it
    try:
        with _disable_current_modes():
            outputs = function(*inputs)
    finally:
        watchers[:] = told
    for watcher in watchers:
        watcher.whole(function, inputs, outputs)
    return outputs
