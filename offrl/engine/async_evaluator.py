"""Evaluation in a process of its own, while training goes on."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

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
            resource_tracker.ensure_running()  # which unblocks signals: before they are blocked
            # blocked from its first moment on: what ends a whole group is the training's to handle
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            try:
                self.worker.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        try:
            self.ours.send(path)
        except OSError:
            self.died()

    def ready(self) -> bool:
        """Whether `result` would not wait."""
        return self.ours.poll()

    def result(self) -> dict[str, Tensor]:
        """Wait for the values of the checkpoint given last.

        Raises:
            OSError: if the process died, or playing failed there.
        """
        try:
            found = self.ours.recv()
        except (EOFError, OSError):
            self.died()
        if isinstance(found, str):
            raise OSError(f"evaluation failed: {found}")
        return {name: value.clone() for name, value in found.items()}

    def died(self) -> NoReturn:
        self.worker.join()
        raise OSError(
            f"the process that evaluates died (exit code {self.worker.exitcode}); resume the run, "
            "or start it with evaluation=inline if memory was short"
        ) from None

    def close(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker.join()


def serve(player: Callable[[], Play], orders: Any) -> None:
    """Body of the process, which ends when the training is gone."""
    play = None
    while True:
        try:
            path = orders.recv()
        except EOFError:
            return
        found: Any
        try:
            play = play or player()
            found = play(path)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        try:
            orders.send(found)
        except OSError:  # the training is gone
            return
