"""One command's training: groups of seeds, processes, progress, and the files of a run directory.

runs/<algo>/<env>-<dataset>/<time>/
    config.yaml     every value with its origin
    policy.json     what its policy takes and gives: shapes, bounds, names
    observations.npz  range and a sample of the observations that it learned from
    run.json        package versions, device, the data set's name, digest and provenance
    seed-<i>/       one group: checkpoint.pt, metrics.csv, TensorBoard events
    episodes.csv    raw return and length of every evaluation episode
    curve.png       the learning curve
    result.json     the score and what it rests on; its presence marks a finished run
"""

import datetime
import itertools
import json
import os
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from offrl import config as configuration
from offrl import system
from offrl.config import Resolved
from offrl.data.dataset import Dataset, home
from offrl.engine import checkpoint
from offrl.engine.curve import AsyncEvaluator, Curve
from offrl.engine.loop import Progress, Schedule, fit
from offrl.engine.method import Run
from offrl.envs.make import engines, env_id, own_actions
from offrl.errors import ConfigError, Diverged, Failed, Interrupted
from offrl.nets.kernels import matmul
from offrl.runs.evaluate import player
from offrl.runs.record import finish, provenance, resuming, write_json
from offrl.runs.signature import keep_collected, store
from offrl.runs.task import (
    axes_of,
    check_free,
    check_task,
    learned,
    load_data,
    make_env,
    make_task,
    notes_on,
    pick_device,
    spec_of,
    version,
)
from offrl.runs.workers import Display, Group, at_once, prepare, spread
from offrl.seeding import generator
from offrl.system import cores, cpu_name

OTHERS = "choose others with dataset=, source=d4rl|minari|files"


def train(resolved: Resolved, resumed: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Train all seeds of one configuration; returns the run directory and `result.json`'s content.

    Args:
        resumed: the run directory whose groups go on from their checkpoints; None makes a new one.

    Raises Failed, Interrupted, Diverged, ConfigError, DataError, OSError with a message for people.
    """
    device = pick_device(resolved.settings.device)
    # a wrong name stops the run before anything is loaded
    played: tuple[str | None, dict[str, str]] = None, {}
    spaces: tuple[Any, Any] = None, None
    if resolved.free:
        check_free(resolved)
    else:
        with closing(make_env(resolved)()) as env:
            check_task(resolved, env)
            played = env_id(resolved.settings.env, version(resolved)), engines(env)
            spaces = env.observation_space, own_actions(env)
            for note in notes_on(resolved, env):
                print(note)
    data = load_data(resolved)
    learns = learned(resolved, data)
    if data is not None and learns is not None:
        apart = data.episodes - learns.episodes
        print(
            f"data: {data.name}, {len(data)} transitions in {data.episodes} episodes; "
            + (f"{apart} of them are held out" if resolved.free else OTHERS)
        )
    folder = resumed or new_folder(resolved)
    print(f"run directory: {folder} ({device}); every setting in its config.yaml, changed here:")
    print(*resolved.changes(), sep="\n", flush=True)
    with system.only_one(folder):
        if resumed:
            check_unchanged(folder, data, device)
        else:
            if device.type == "cpu":
                system.prepare(resolved.settings.threads, resolved.settings.keep_memory)
                print(matmul.select_backend(home(), cpu_name()), flush=True)
            write_json(folder / "run.json", provenance(resolved, data, *played, device))
            store(folder, resolved, spec_of(resolved, learns), learns, *spaces)
            (folder / "config.yaml").write_text(resolved.to_yaml())  # last: makes it resumable
        groups = layout(resolved, device)
        began = time.monotonic()
        try:
            if len(groups) == 1:
                with closing(Display(resolved, groups)) as display:
                    curves = [train_group(folder, groups[0], bool(resumed), display.tell, data)]
            else:
                curves = spread(resolved, folder, groups, bool(resumed), work)
        except (Interrupted, KeyboardInterrupt) as stop:
            told = str(stop) or "stopped"
            raise Interrupted(f"{told}\ncontinue with: {resuming(folder)}") from None
        finally:
            about = json.loads((folder / "run.json").read_text())
            about["seconds"] = about.get("seconds", 0.0) + time.monotonic() - began
            with suppress(OSError):  # a full disk has been told by then
                write_json(folder / "run.json", about)
        return folder, finish(resolved, folder, groups, curves)


def extended(folder: Path, steps: int) -> Resolved:
    """Make more steps of a run, finished or not, its own; `train` then goes on with it.

    It ends as a run of so many steps would have, unless the method has a schedule over all steps
    (`Method.scheduled`); that is said. An earlier result stays as result-<steps>.json.

    Raises:
        ConfigError: if there are not more steps than before.
        Failed: for a run that an earlier version finished.
    """
    resolved = configuration.of_run(folder)
    before, steps = resolved.options["steps"], configuration.convert("steps", steps, int)
    if steps <= before:
        raise ConfigError(f"{folder} is a run of {before} steps; steps={steps} must be more")
    result = folder / "result.json"
    for file in folder.glob("seed*/checkpoint.pt") if result.exists() else ():
        if "ended" not in checkpoint.load(file):
            raise Failed(
                f"{folder} was finished by an earlier version of offrl, which did not keep where "
                "its last stage ended; start a new run"
            )
    if resolved.method.scheduled:
        print(
            f"{resolved.name} has a schedule over all steps, from here on over {steps}: this run "
            "will differ from one that had so many from its beginning"
        )
    origins = resolved.origins | {"algo.steps": f"extended from {before}"}
    longer = replace(resolved, options=resolved.options | {"steps": steps}, origins=origins)
    if result.exists():
        os.replace(result, folder / f"result-{before}.json")
    new = folder / "config.tmp"
    new.write_text(longer.to_yaml())
    os.replace(new, folder / "config.yaml")
    return longer


def check_unchanged(folder: Path, data: Dataset | None, device: torch.device) -> None:
    """Raises Failed if a resumed run would continue on other data or another kind of device."""
    about = json.loads((folder / "run.json").read_text())
    if about["device_type"] != device.type:
        raise Failed(
            f"{folder} was started on {about['device_type']} and its generators and layout are of "
            f"that kind; this machine offers {device.type}. Resume it on such a machine"
        )
    if data is not None and (stored := about["dataset"]["digest"]) != data.digest:
        raise Failed(
            f"the data set has changed since {folder} was started (digest {data.digest[:12]}, "
            f"then {stored[:12]}); restore it or start a new run"
        )


def layout(resolved: Resolved, device: torch.device) -> list[Group]:
    """Stacked on CUDA where the method can; one process per seed on a CPU, where it gains none."""
    seeds, stacks = resolved.seeds(), resolved.method.stacks(resolved.config())
    return [seeds] if stacks and device.type == "cuda" else [[seed] for seed in seeds]


def new_folder(resolved: Resolved) -> Path:
    """A fresh run directory; OSError if the place is not writable."""
    base = Path(resolved.settings.runs) / resolved.name / resolved.task
    folder = first = base / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for extra in itertools.count(1):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            folder = first.with_name(f"{first.name}-{extra}")
        except OSError as error:
            raise OSError(
                f"cannot make the run directory {folder}: {error.strerror or error}; "
                "choose another place with runs=DIR"
            ) from error
    return folder


def train_group(
    folder: Path,
    group: Group,
    resume: bool,
    report: Callable[[Group, Progress], None],
    data: Dataset | None = None,
    progress: bool = True,
) -> Curve:
    """Train the seeds of one group here, in its own subfolder; on `data` if they are loaded."""
    resolved = configuration.of_run(folder)
    s, method, config = resolved.settings, resolved.method, resolved.config()
    device, axes = pick_device(s.device), axes_of(group)
    prepare(resolved, folder, device)
    place = group_folder(folder, group)
    place.mkdir(exist_ok=True)
    schedule = Schedule(**{field.name: getattr(s, field.name) for field in fields(Schedule)})
    with system.only_one(place):  # a worker may outlive its parent for a moment
        data = data or load_data(resolved)
        task = make_task(resolved, data, group, device, share(resolved, device), progress)
        stream = generator(group[0], "run", *group[1:], device=device)
        algo = method.make(config, task.spec, stream, axes)
        run = Run(config.steps, axes, device, method.fields, str(home()), progress)
        apart = evaluates_async(resolved, device)
        worker = AsyncEvaluator(partial(player, folder, device)) if apart else None
        stages = method.stages(algo, task, run)
        curve = fit(
            algo,
            stages,
            place,
            task.evaluate,
            schedule,
            group,
            resolved.name,
            resume,
            partial(report, group),
            s.speed,
            worker,
            task.headline,
        )
        for stage in stages if method.online else ():
            keep_collected(place, stage.parts)
        return curve


def work(folder: Path, group: Group, resume: bool, inbox: Any) -> None:
    """Body of a worker process; see `offrl.runs.workers.spread`."""
    system.end_with_parent()

    def report(group: Group, told: Progress) -> None:
        inbox.put(("progress", group, told))

    try:
        train_group(folder, group, resume, report, progress=False)
        inbox.put(("done", group, group_folder(folder, group)))
    except KeyboardInterrupt:
        inbox.put(("error", group, Interrupted("stopped between two checkpoints")))
    except (Interrupted, Diverged, ValueError, OSError, Failed) as error:
        inbox.put(("error", group, type(error)(str(error))))


def share(resolved: Resolved, device: torch.device) -> int:
    """Cores that each training process has."""
    return cores() // at_once(resolved, len(layout(resolved, device))) or 1


def evaluates_async(resolved: Resolved, device: torch.device) -> bool:
    """Whether points of the curve are played in a process of their own."""
    s = resolved.settings
    if resolved.free:
        return False
    if s.evaluation != "auto":
        return s.evaluation == "async"
    return device.type == "cuda" or share(resolved, device) > s.threads


def group_folder(folder: Path, group: Group) -> Path:
    """seed-3, or seeds-0-7 for stacked ones."""
    return folder / (f"seed-{group[0]}" if len(group) == 1 else f"seeds-{group[0]}-{group[-1]}")
