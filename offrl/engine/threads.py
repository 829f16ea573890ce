"""How many threads a stage's updates take on a CPU, by measurement."""

import statistics
import time
from collections.abc import Sequence
from copy import deepcopy

import torch

from offrl.engine.stage import Algorithm, Sampler, Stage

ROUNDS = 7
GAIN = 0.95  # more threads must take less than this share: they keep cores from others


def candidates(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({1 << i for i in range(most.bit_length())} | {most})


def fastest(
    algo: Algorithm, stage: Stage, sample: Sampler, counts: Sequence[int]
) -> tuple[int, str]:
    """The number of threads with which an update as written takes least time.

    Algorithm and generator are as before afterwards; torch's threads are those that were found.

    Args:
        counts: numbers to choose among, from few to many; more win only if clearly faster.

    Returns:
        The number, and a sentence about what was measured.
    """
    before = deepcopy(algo.state())
    times: dict[int, list[float]] = {count: [] for count in counts}
    for count in [*counts] * (1 + ROUNDS):
        torch.set_num_threads(count)
        start = time.perf_counter()
        for step in range(stage.cycle):
            stage.update(sample(algo.generator), step)
        times[count].append((time.perf_counter() - start) / stage.cycle)
    algo.load(before)
    spent = {count: statistics.median(found[1:]) for count, found in times.items()}
    best = counts[0]
    for count in counts[1:]:
        if spent[count] < GAIN * spent[best]:
            best = count
    torch.set_num_threads(best)
    told = ", ".join(f"{1e3 * seconds:.2f} ms on {count}" for count, seconds in spent.items())
    return best, f"{best} thread(s): an update takes {told}"
