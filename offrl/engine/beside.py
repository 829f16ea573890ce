"""Evaluation in a process of its own, while training goes on."""

import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from offrl.engine import process

Play = Callable[[Path], dict[str, Tensor]]  # a checkpoint -> name -> (*S, episodes)


class Beside:
    """Plays one checkpoint at a time; the process starts when the first is given.

    Args:
        player: makes, in that process, the function that plays a checkpoint. Can be pickled.
    """

    def __init__(self, player: Callable[[], Play]):
        self.player = player
        self.worker: Any = None

    def begin(self, path: Path) -> None:
        """Start to play a checkpoint, which must stay as it is until `result` returns."""
        if self.worker is None:
            context = multiprocessing.get_context("spawn")
            self.ours, theirs = context.Pipe()
            self.worker = context.Process(target=serve, args=(self.player, theirs), daemon=True)
            self.worker.start()
            theirs.close()
        self.ours.send(path)

    def result(self) -> dict[str, Tensor]:
        """Wait for the values of the checkpoint given last.

        Raises:
            OSError: if the process died.
            Exception: what playing raised there.
        """
        try:
            found = self.ours.recv()
        except EOFError:
            self.worker.join()
            raise OSError(
                f"the process that evaluates died (exit code {self.worker.exitcode}); "
                "resume the run, with evaluation=inline if it was short of memory"
            ) from None
        if isinstance(found, Exception):
            raise found
        return {name: value.clone() for name, value in found.items()}

    def close(self) -> None:
        if self.worker is not None:
            self.worker.terminate()
            self.worker.join()


def serve(player: Callable[[], Play], orders: Any) -> None:
    """Body of the process. An interrupt is the training's to handle; without it this one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.end_with_parent()
    play = None
    while True:
        try:
            path = orders.recv()
        except EOFError:
            return
        try:
            play = play or player()
            orders.send(play(path))
        except (ValueError, OSError, RuntimeError) as error:
            orders.send(type(error)(str(error)))
