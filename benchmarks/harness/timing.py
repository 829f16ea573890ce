"""Seconds of repeated work, on a core of its own."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def held_to(cores: int | None) -> Iterator[None]:
    """Within it the process runs on so many cores, whatever a library's own threads want."""
    if cores is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-cores:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def repeat(update: Callable[[], object]) -> Callable[[int], None]:
    def run(count: int) -> None:
        for _ in range(count):
            update()

    return run


def seconds(run: Callable[[int], None], count: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(count)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product_rate(device: torch.device) -> float:
    """GFLOP/s of a 256-cubed float32 product, now."""
    x, y = torch.randn(2, 256, 256, device=device)
    return 300 * 2 * 256**3 / seconds(repeat(lambda: torch.mm(x, y)), 300, device) / 1e9
