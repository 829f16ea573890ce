"""TD3+BC of d3rlpy, in a process of its own: its pins do not go with this library's.

This file is run by that process's Python, which needs d3rlpy and nothing of this library. An update
is the sampling of a batch and the algorithm's `update`, without the loop of its `fit` around it.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np


def td3bc(
    fields: dict[str, np.ndarray], batch: int, device: str, python: str
) -> Callable[[int], None]:
    """`run` over standardized transitions: obs, act, reward, next_obs, terminal, (N, ...) each.

    Args:
        python: the interpreter that has d3rlpy.

    Raises:
        OSError: if it does not start, or d3rlpy fails there; the message has its last line.
    """
    told = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the worker
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fields.npz"
        np.savez(path, **fields)  # type: ignore[arg-type]
        try:
            worker = subprocess.Popen(
                [python, __file__, str(path), str(batch), device],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=told,
            )
        except OSError as error:
            raise OSError(f"peer_python={python} does not start: {error.strerror}") from error
        assert worker.stdin is not None
        assert worker.stdout is not None
        orders, answers = worker.stdin, worker.stdout

        def wait() -> None:
            if not answers.readline():
                told.seek(0)
                last = (told.read().strip().splitlines() or ["no message"])[-1]
                raise OSError(f"d3rlpy failed in {python}: {last}")

        wait()

    def run(updates: int) -> None:
        orders.write(f"{updates}\n")
        orders.flush()
        wait()

    return run


def main(path: str, batch: int, device: str) -> None:
    """Make as many updates as every line of standard input says, and answer each with a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what d3rlpy prints is no answer
    import d3rlpy
    import torch

    torch.set_num_threads(1)
    fields = dict(np.load(path))
    size = len(fields["obs"])
    # of two fields of one state d3rlpy keeps one: rows follow each other, episodes end at terminals
    ends = fields["terminal"] > 0
    timeouts = np.zeros(size, np.float32)
    timeouts[999::1000] = 1
    timeouts[-1], timeouts[ends] = float(not ends[-1]), 0
    dataset = d3rlpy.dataset.MDPDataset(
        fields["obs"], fields["act"], fields["reward"], fields["terminal"], timeouts=timeouts
    )
    algo = d3rlpy.algos.TD3PlusBCConfig(batch_size=batch).create(device=device)
    algo.build_with_dataset(dataset)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            algo.update(dataset.sample_transition_batch(batch))
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
