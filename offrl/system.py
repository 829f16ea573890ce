"""The machine and this process: cores, threads, the allocator, the parent, locks on folders."""

import ctypes
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory(device: torch.device) -> float:
    """Bytes of a device's memory; inf where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "cpu" and hasattr(os, "sysconf"):  # not on Windows
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return math.inf


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "CPU")


def prepare(threads: int, keep_memory: bool) -> None:
    """Set torch's threads, and stop glibc from returning freed memory.

    Without the second, activations above 128 KiB are unmapped and faulted in again page by page.
    Elsewhere than on glibc it does nothing.
    """
    torch.set_num_threads(threads)
    if keep_memory and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for key, value in ((-3, 32 << 20), (-1, 1 << 30), (-2, 64 << 20)):
                libc.mallopt(key, value)  # mmap threshold, trim threshold, top pad


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies, so that no worker trains on unseen."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def locked(path: Path, busy: Callable[[], None], remedy: str) -> Iterator[None]:
    """Hold the lock file `path`; if another process does, call `busy`, then wait for it.

    The system's locks end with the process that holds them, however it ends. filelock's other kind,
    where the file itself is the lock, would stay behind a killed one, and is not used.

    Raises OSError with a `remedy` if the place is not writable or its file system has no locks.
    """
    lock = FileLock(path, fallback_to_soft=False)
    for wait in (False, True):
        try:
            lock.acquire(blocking=wait)
            break
        except Timeout:
            busy()
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"cannot lock files in {path.parent}: {reason}; {remedy}") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a run directory alone; OSError if another process trains in it or it has no locks."""

    def busy() -> None:
        raise OSError(f"another process is training in {folder}; wait for it or stop it")

    with locked(folder / ".lock", busy, "start the run from a writable folder of a local disk"):
        yield
