"""The processes of a run: groups of seeds in parallel under one command, with one progress line."""

import json
import multiprocessing
import queue
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from offrl import system
from offrl.config import Resolved
from offrl.engine import checkpoint
from offrl.engine.curve import Curve
from offrl.engine.loop import Progress
from offrl.engine.stop import stop_requests
from offrl.errors import Failed, Interrupted
from offrl.nets.kernels import matmul
from offrl.runs.record import resuming, scored
from offrl.system import cores

Group = list[int]


def spread(
    resolved: Resolved, folder: Path, groups: list[Group], resume: bool, work: Callable[..., None]
) -> list[Curve]:
    """Train the groups in processes of their own, as many at a time as there are cores.

    Args:
        work: body of a process: (folder, group, resume, inbox). It puts ("progress", group,
            Progress), ("done", group, folder of the group) or ("error", group, exception) there.

    Raises:
        Interrupted: if stopped; every worker has written its checkpoint.
        Failed, Diverged, ValueError, OSError: if a worker failed; the others are stopped with
            their checkpoints written.
    """
    context = multiprocessing.get_context("spawn")
    inbox: Any = context.Queue()
    waiting, curves = list(groups), {}
    running: dict[int, Any] = {}
    problems: list[Exception] = []  # the first is told
    ending = False
    with closing(Display(resolved, groups)) as display, stop_requests() as stopping:
        while running or (waiting and not ending):
            while waiting and len(running) < at_once(resolved, len(groups)) and not ending:
                group = waiting.pop(0)
                worker = context.Process(target=work, args=(folder, group, resume, inbox))
                worker.start()
                running[group[0]] = worker
            if (stopping or problems) and not ending:
                ending = True
                for worker in running.values():
                    worker.terminate()  # SIGTERM: the worker writes its checkpoint and ends
            try:
                kind, group, content = inbox.get(timeout=0.2)
            except queue.Empty:
                dead = [seed for seed, worker in running.items() if not worker.is_alive()]
                for seed in dead if inbox.empty() else ():
                    code = running.pop(seed).exitcode
                    died = f"the process of seed {seed} died (exit code {code})"
                    problems.append(Failed(f"{died}; continue with: {resuming(folder)}"))
                continue
            if kind == "progress":
                display.tell(group, content)
                continue
            running.pop(group[0]).join()
            if kind == "done":
                saved = checkpoint.load(content / "checkpoint.pt")
                curves[group[0]] = Curve(**saved["curve"])
            elif not isinstance(content, Interrupted):
                problems.append(content)
            elif not stopping:
                problems.append(Failed(f"seed {group[0]} was stopped: {content}"))
    if stopping:
        raise Interrupted("stopped; every seed that had begun to train has written its checkpoint")
    if problems:
        raise problems[0]
    return [curves[group[0]] for group in groups]


def at_once(resolved: Resolved, groups: int) -> int:
    """How many processes train at the same time."""
    return min(groups, max(1, cores() // resolved.settings.threads))


def prepare(resolved: Resolved, folder: Path, device: torch.device) -> None:
    """Threads, allocator and matmul backend of this process, as the run in `folder` has them."""
    system.prepare(resolved.settings.threads, resolved.settings.keep_memory)
    if device.type == "cuda":
        return
    kept = json.loads((folder / "run.json").read_text())
    if kept["matmul"] and not matmul.onednn_works():
        raise Failed(
            f"{folder} was started with matrix products by oneDNN, which this torch "
            f"({torch.__version__}) does not offer; continue it with the version it was started "
            f"with ({kept['versions']['torch']}), or start a new run"
        )
    matmul.use(kept["matmul"])


class Display:
    """One progress line for all groups: steps, steps per second, time left, last score."""

    def __init__(self, resolved: Resolved, groups: list[Group]):
        self.resolved, self.groups = resolved, groups
        self.steps: dict[int, int] = {}
        self.scores: dict[int, float] = {}
        total = resolved.options["steps"] * len(groups)
        name = f"{resolved.name} {resolved.task}"
        self.bar = tqdm(total=total, desc=name, unit="step", dynamic_ncols=True, smoothing=0.05)
        self.close = self.bar.close

    def tell(self, group: Group, told: Progress) -> None:
        key = group[0]
        for note in told.notes if key == self.groups[0][0] else ():  # the others do the same
            self.bar.write(note)
        if told.score is not None:
            self.scores[key] = told.score
            mean = float(np.mean(list(self.scores.values())))
            unit, value = scored(self.resolved, mean, told.headline)
            self.bar.set_postfix_str(f"{unit} {value:.1f}", refresh=False)
        if not self.steps:  # what was made before the first update is no part of its time
            self.bar.unpause()
        if key not in self.steps:  # what a resumed run had done counts, but not for the speed
            self.bar.initial += told.first
            self.bar.n += told.first
            self.bar.last_print_n += told.first
        self.bar.total = max(self.bar.total, told.total * len(self.groups))
        self.bar.update(told.step - self.steps.get(key, told.first))
        self.steps[key] = told.step
