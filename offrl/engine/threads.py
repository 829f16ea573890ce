"""How many threads a stage's updates take on a CPU, by measurement."""

import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy

import torch

from offrl.engine.capture.updates import WARM_UP, Speed, Updates
from offrl.engine.method import Algorithm, Sampler, Stage

ROUNDS = 7
LEAST = 0.1  # seconds of a round, or one cycle if that takes longer
GAIN = 0.95  # more threads must take less than this share: they keep cores from others


def candidates(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({1 << i for i in range(most.bit_length())} | {most})


def fastest(
    algo: Algorithm, stage: Stage, sample: Sampler, counts: Sequence[int], speed: Speed = "eager"
) -> tuple[int, str]:
    """The number of threads with which an update takes least time.

    All updates are of one batch. Algorithm and generator are as before afterwards; torch's threads
    are those that were found.

    Args:
        counts: numbers to choose among, from few to many; more win only if clearly faster.
        speed: of the updates that the run will make. They are captured for it if it may be, since
            what helps Python between two kernels does not help the kernels alone.

    Returns:
        The number, and a sentence about what was measured.
    """
    before = deepcopy(algo.state())
    captured = speed in ("auto", "graph")
    batch = sample(algo.generator)
    update = Updates(stage, lambda _: batch, algo.generator, "graph" if captured else "eager")
    cycle = turns(update, stage.cycle)
    torch.set_num_threads(counts[0])
    for _ in range(WARM_UP + 2):  # it is captured in the last but one of them
        cycle()
    cycles = max(1, round(LEAST / max(cycle(), 1e-6)))
    times: dict[int, list[float]] = {count: [] for count in counts}
    for count in [*counts] * ROUNDS:
        torch.set_num_threads(count)
        cycle()  # other threads awake
        times[count].append(sum(cycle() for _ in range(cycles)) / cycles / stage.cycle)
    algo.load(before)
    spent = {count: statistics.median(found) for count, found in times.items()}
    best = counts[0]
    for count in counts[1:]:
        if spent[count] < GAIN * spent[best]:
            best = count
    torch.set_num_threads(best)
    told = ", ".join(f"{1e3 * seconds:.2f} ms on {count}" for count, seconds in spent.items())
    return best, f"{best} thread(s): an update takes {told}"


def turns(update: Updates, cycle: int) -> Callable[[], float]:
    """Makes a cycle of updates and returns its seconds."""

    def turn() -> float:
        start = time.perf_counter()
        for step in range(cycle):
            update(step)
        return time.perf_counter() - start

    return turn
