"""One command's training: groups of seeds, processes, progress, and the files of a run directory.

runs/<algo>/<env>-<dataset>/<time>/
    config.yaml     every value with its origin
    run.json        package versions, device, the data set's name, digest and provenance
    seed-<i>/       one group: checkpoint.pt, metrics.csv, TensorBoard events
    episodes.csv    raw return and length of every evaluation episode
    curve.png       the learning curve
    result.json     the score and what it rests on; its presence marks a finished run
"""

import contextlib
import datetime
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from offrl import config as configuration
from offrl.config import Resolved
from offrl.data.collector import Collector
from offrl.data.dataset import Dataset, home
from offrl import system
from offrl.engine.async_evaluator import Beside
from offrl.engine.evaluate import evaluator_of
from offrl.engine.loop import Curve, Progress, Schedule, fit
from offrl.engine.method import Algorithm, Run, Spec
from offrl.engine.stop import Interrupted
from offrl.engine.threads import candidates
from offrl.envs.make import engines, env_id
from offrl.envs.workers import environments
from offrl.runs.evaluate import player
from offrl.system import cores, cpu_name
from offrl.nets.kernels import matmul
from offrl.runs.record import finish, provenance, resuming, write_json
from offrl.runs.workers import Display, Failed, Group, at_once, prepare, spread
from offrl.seeding import derive, generator
from offrl.runs.task import check_robot, check_task, load_data, make_env, pick_device, version


def train(
    resolved: Resolved,
    folder: Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[Path, dict[str, Any]]:
    """Train all seeds of one configuration; returns the run directory and `result.json`'s content.

    Args:
        folder: the run directory; None makes a new one under `runs`.
        resume: continue the groups in `folder` from their checkpoints.
        say: told which data are used and where the run lies.

    Raises:
        Failed, Interrupted, Diverged, ConfigError, DataError, OSError: with a message for people.
    """
    device = pick_device(resolved.settings.device)
    check_robot(resolved)
    env = make_env(resolved)()
    check_task(resolved, env)  # a wrong name stops the run before anything is loaded
    played = env_id(resolved.settings.env, version(resolved)), engines(env)
    env.close()
    data = load_data(resolved)
    if data is not None:
        say(f"data: {data.name}, {len(data)} transitions in {data.episodes} episodes; "
            "choose others with dataset=, source=d4rl|minari|files")
    folder = folder or new_folder(resolved)
    say(f"run directory: {folder} ({device})")
    with system.only_one(folder):
        if resume:
            check_unchanged(folder, data, device)
        else:
            if device.type == "cpu":
                system.prepare(resolved.settings.threads, resolved.settings.keep_memory)
                say(matmul.select_backend(home(), cpu_name()))
            write_json(folder / "run.json", provenance(resolved, data, *played, device))
            (folder / "config.yaml").write_text(resolved.to_yaml())  # last: makes it resumable
        groups = layout(resolved, device)
        began = time.monotonic()
        try:
            if len(groups) == 1:
                with Display(resolved, groups) as display:
                    curves = [train_group(folder, groups[0], resume, display.tell, data)]
            else:
                curves = spread(resolved, folder, groups, resume)
        except (Interrupted, KeyboardInterrupt) as stop:
            told = str(stop) or "stopped"
            raise Interrupted(f"{told}\ncontinue with: {resuming(folder)}") from None
        finally:
            seconds = spent(folder, time.monotonic() - began)
        return folder, finish(resolved, folder, groups, curves, device, seconds)


def spent(folder: Path, seconds: float) -> float:
    """Add a session's wall time to that of the run's earlier ones; returns the sum."""
    about = json.loads((folder / "run.json").read_text())
    about["seconds"] = about.get("seconds", 0.0) + seconds
    with contextlib.suppress(OSError):  # a full disk has been told by then
        write_json(folder / "run.json", about)
    return about["seconds"]


def check_unchanged(folder: Path, data: Dataset | None, device: torch.device) -> None:
    """Raises Failed if a resumed run would continue on other data or another kind of device."""
    about = json.loads((folder / "run.json").read_text())
    if about["device_type"] != device.type:
        raise Failed(
            f"{folder} was started on {about['device_type']} and its generators and layout are of "
            f"that kind; this machine offers {device.type}. Resume it on such a machine"
        )
    if data is None:
        return
    stored = about["dataset"]["digest"]
    if stored != data.digest:
        raise Failed(
            f"the data set has changed since {folder} was started (digest {data.digest[:12]}, "
            f"then {stored[:12]}); restore it or start a new run"
        )


def layout(resolved: Resolved, device: torch.device) -> list[Group]:
    """Stacked on CUDA; one process per seed on a CPU, where stacking gains nothing.

    A method whose network carries no seed axis says `STACKS = False`: one process per seed, as for
    encoders of images.
    """
    seeds = resolved.seeds()
    stacks = getattr(configuration.module(resolved.algo), "STACKS", True)
    stacks = stacks and not resolved.options.get("images", False)
    return [seeds] if stacks and device.type == "cuda" else [[seed] for seed in seeds]


def new_folder(resolved: Resolved) -> Path:
    """A fresh run directory.

    Raises:
        OSError: if the place is not writable.
    """
    base = Path(resolved.settings.runs) / resolved.algo / resolved.task
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for extra in range(1000):
        folder = base / (stamp if extra == 0 else f"{stamp}-{extra}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise OSError(
                f"cannot make the run directory {folder}: {error.strerror or error}; "
                "choose another place with runs=DIR"
            ) from error
    raise OSError(f"{base} already holds a thousand runs of this second")


# --- one group of seeds --------------------------------------------------------------------------


@dataclass
class Experiment:
    """An algorithm with its stages and its evaluation, ready to run."""

    algo: Algorithm
    stages: list[Any]
    evaluate: Callable[[Algorithm, int], dict[str, torch.Tensor]]


def build(resolved: Resolved, group: Group, data: Dataset | None, progress: bool) -> Experiment:
    """Make the algorithm of one group of seeds from its configuration."""
    s, method = resolved.settings, configuration.module(resolved.algo)
    device = pick_device(s.device)
    axes = (len(group),) if len(group) > 1 else ()
    options = resolved.config()
    make = make_env(resolved)
    stream = generator(group[0], "run", *group[1:], device=device)
    run = Run(options.steps, axes, device, str(home()), progress)
    if data is None:
        starts = [derive(seed, "training", i) for seed in group for i in range(s.envs)]
        most = share(resolved, device)
        envs = environments([make] * len(starts), starts, s.env_workers, most)
        spec = Spec(envs.obs_dim, envs.act_dim, discrete=envs.discrete)
        algo = method.make(options, spec, stream, axes)
        stages = method.stages(algo, Collector(envs, axes, device), run)
    else:
        mean, std = data.statistics()
        spec = Spec(data.obs_dim, data.act_dim, mean, std, data.discrete)
        algo = method.make(options, spec, stream, axes)
        stages = method.stages(algo, data, run)
    evaluator = evaluator_of(algo, make, axes, (s.eval_episodes, s.final_episodes), 0, device)

    def evaluate(algo: Algorithm, episodes: int) -> dict[str, torch.Tensor]:
        with system.on_threads(1 if s.threads == "auto" else s.threads):
            total = episodes * len(group) * evaluator.parts
            name = "evaluation" if episodes <= s.eval_episodes else "final evaluation"
            with tqdm(
                total=total, desc=name, unit="episode", leave=False, delay=2, disable=not progress
            ) as bar:
                return evaluator(algo, episodes, tick=bar.update).named()

    return Experiment(algo, stages, evaluate)


def train_group(
    folder: Path,
    group: Group,
    resume: bool,
    report: Callable[[Group, Progress], None],
    data: Dataset | None = None,
    progress: bool = True,
) -> Curve:
    """Train the seeds of one group in this process, in its own subfolder.

    Args:
        data: of an offline method, where this process has loaded it.
    """
    resolved = configuration.from_yaml((folder / "config.yaml").read_text())
    s = resolved.settings
    device = pick_device(s.device)
    prepare(resolved, folder, device)
    place = group_folder(folder, group)
    place.mkdir(exist_ok=True)
    schedule = Schedule(
        s.log_every, s.eval_every, s.eval_episodes, s.final_episodes, s.snapshot_every
    )
    with system.only_one(place):  # a worker may outlive its parent for a moment
        data = data or load_data(resolved)
        experiment = build(resolved, group, data, progress)
        beside = Beside(partial(player, folder, device)) if has_room(resolved, device) else None
        return fit(
            experiment.algo,
            experiment.stages,
            place,
            experiment.evaluate,
            schedule,
            group,
            resolved.algo,
            resume,
            lambda told: report(group, told),
            s.speed,
            beside,
            candidates(share(resolved, device))
            if s.threads == "auto" and device.type == "cpu"
            else (),
        )


def share(resolved: Resolved, device: torch.device) -> int:
    """Cores that each training process has."""
    return cores() // at_once(resolved, len(layout(resolved, device))) or 1


def has_room(resolved: Resolved, device: torch.device) -> bool:
    """Whether points of the curve are played in a process of their own."""
    s = resolved.settings
    if s.evaluation != "auto":
        return s.evaluation == "beside"
    if device.type == "cuda":
        return True
    return s.threads != "auto" and share(resolved, device) > s.threads


def group_folder(folder: Path, group: Group) -> Path:
    """seed-3, or seeds-0-7 for stacked ones."""
    return folder / (f"seed-{group[0]}" if len(group) == 1 else f"seeds-{group[0]}-{group[-1]}")
