"""Stopping on request: signals are counted, and the loop ends where nothing is lost."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

STOPPING = b"stopping: a checkpoint is written after the update or evaluation that is running"
AGAIN = b"; Ctrl-C again stops at once, at the checkpoint before"


class StopRequests:
    """SIGINT and SIGTERM, counted so that the loop ends at a border of updates.

    A second SIGINT interrupts at once, as does the first while nothing needs saving.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.urgent = False

    def __bool__(self) -> bool:
        return bool(self.received)

    def handle(self, number: int, frame: Any) -> None:
        if self.urgent or (signal.SIGINT in self.received and number == signal.SIGINT):
            raise KeyboardInterrupt
        self.received.append(number)
        if len(self.received) == 1 and multiprocessing.parent_process() is None:
            again = AGAIN if number == signal.SIGINT else b""
            with contextlib.suppress(OSError):  # whoever read it may be gone
                os.write(2, b"\n" + STOPPING + again + b"\n")  # print is not for signal handlers

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it the first signal interrupts."""
        if self.received:
            raise KeyboardInterrupt
        self.urgent = True
        try:
            yield
        finally:
            self.urgent = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Receive SIGINT and SIGTERM; outside of the main thread nothing is received."""
    stopping = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, stopping.handle) for number in numbers}
    try:
        yield stopping
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
