"""Choosing the behaviour policies that ship, among the snapshots of SAC runs.

    python -m tools.packing halfcheetah=runs/sac/halfcheetah/<time>/seed-0 hopper=... walker2d=...

Every snapshot, rounded to fp16, plays 20 episodes with sampled actions. The expert is the one with
the best mean. Medium is the first whose mean lies within MEDIUM of the expert's, and does again in
60 fresh episodes: the first of many noisy means to pass a threshold is often one that passed by
luck. Up to ten snapshots evenly spaced from the first to medium are kept. The chosen ones then
play fresh episodes, so the returns in the manifest are not those that they were chosen by.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from offrl.data.sources.generated import PACKAGES
from offrl.data.sources.policies import FOLDER, Behavior, layers, manifest
from offrl.data.sources.rollout import in_processes
from offrl.engine import checkpoint
from offrl.engine.evaluate import Evaluator
from offrl.envs.make import env_id, factory
from offrl.errors import DataError
from offrl.seeding import derive

# Of the expert's return. D4RL's text says "approximately 1/3"; the scores of its medium and expert
# data are 42 of 93 (halfcheetah), 44 of 111 (hopper), 62 of 108 (walker2d).
MEDIUM = (0.38, 0.55)
COMMAND = "python scripts/train.py algo=sac env={env} seed=0 snapshot_every=10_000"


def pack(
    runs: Mapping[str, Path],
    command: str = COMMAND,
    folder: Path = FOLDER,
    keep: int = 10,
    episodes: int = 20,
    workers: int = 0,
) -> dict[str, Any]:
    """Choose policies of SAC runs and write them as the library ships them.

    Args:
        runs: environment -> the folder of one seed, with `snapshots/<step>.pt` every so many
            steps. Other environments already in `folder` stay.
        command: that trained the runs; "{env}" stands for the environment. Run `pack` with the
            versions that trained: they are stored.
        workers: processes; 0 for one per core.

    Raises:
        DataError: no snapshots, or none of medium quality.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = manifest(folder)
    for env, run in runs.items():
        found = snapshots(run)
        states = [state for _, state, _ in found]
        means = [row.mean() for row in measure(env, states, "choice", episodes, workers)]
        expert = int(np.argmax(means))
        near = within(MEDIUM, means, means[expert])
        checks = measure(env, [states[i] for i in near], "check", 3 * episodes, workers)
        passed = within(MEDIUM, [row.mean() for row in checks], means[expert])
        if not passed:
            raise no_medium(run, [step for step, _, _ in found], means)
        chosen = kept(near[passed[0]], expert, keep)
        states = [found[i][1] for i, _ in chosen]
        fresh = measure(env, states, "manifest", episodes, workers)
        plain = measure(env, states, "manifest", episodes, workers, explore=False)
        about = []
        for (i, role), sampled, mean in zip(chosen, fresh, plain, strict=True):
            about.append(
                {
                    "role": role,
                    "step": found[i][0],
                    "return": float(sampled.mean()),
                    "return_std": float(sampled.std()),
                    "deterministic_return": float(mean.mean()),
                    "episodes": episodes,
                }
            )
            print(env, about[-1])
        tensors = {
            f"{told_of['role']}/{told_of['step']}/{name}": value.half().contiguous()
            for told_of, state in zip(about, states, strict=True)
            for name, value in state.items()
        }
        save_file(tensors, folder / f"{env}.safetensors")
        (folder / f"{env}.safetensors").chmod(0o644)  # safetensors makes it readable by its owner
        told["robots"][env] = {
            "env": env_id(env),
            "seed": found[0][2],
            "command": command.format(env=env),
            "random_steps": warmup(run),
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "policies": about,
            "last_snapshot": found[-1][0],
        }
        (folder / "manifest.json").write_text(json.dumps(told, indent=1) + "\n")
    return told


def snapshots(run: Path) -> list[tuple[int, dict[str, Tensor], int]]:
    """Step, actor state and seed of every snapshot of a run, by step."""
    out = []
    for path in sorted((run / "snapshots").glob("*.pt")):
        saved = checkpoint.load(path)
        if saved["label"] != "sac" or len(saved["seeds"]) != 1:
            raise DataError(f"{path} is not of a single-seed SAC run")
        out.append((int(saved["step"]), saved["algo"]["actor"], int(saved["seeds"][0])))
    if not out:
        raise DataError(f"{run} holds no snapshots/*.pt; train with snapshot_every=10_000")
    return sorted(out, key=lambda item: item[0])


def warmup(run: Path) -> int:
    """Uniformly random steps before the first update: environment steps less updates so far."""
    saved = checkpoint.load(next(iter(sorted((run / "snapshots").glob("*.pt")))))
    updates = next(iter(saved["algo"]["actor_opt"]["state"].values()))["step"]
    return int(saved["step"]) - int(updates)


def within(band: tuple[float, float], means: Sequence[float], best: float) -> list[int]:
    """Indices of the means that lie within a band of shares of the best."""
    return [i for i, mean in enumerate(means) if band[0] * best <= mean <= band[1] * best]


def no_medium(run: Path, steps: Sequence[int], means: Sequence[float]) -> DataError:
    pairs = ", ".join(f"{step}: {mean:.0f}" for step, mean in zip(steps, means, strict=True))
    return DataError(
        f"{run} has no snapshot between {MEDIUM[0]:.0%} and {MEDIUM[1]:.0%} of its best return; "
        f"take snapshots more often ({pairs})"
    )


def kept(medium: int, expert: int, keep: int) -> list[tuple[int, str]]:
    """Snapshots to ship, as (index, role): up to `keep` up to medium, then the expert."""
    evenly = np.linspace(0, medium, min(keep, medium + 1)).round().astype(int).tolist()
    return [(i, "early") for i in evenly[:-1]] + [(medium, "medium"), (expert, "expert")]


def measure(
    env: str,
    states: list[dict[str, Tensor]],
    purpose: str,
    episodes: int,
    workers: int,
    explore: bool = True,
) -> list[np.ndarray]:
    """Returns (episodes,) of every actor."""
    if not states:
        return []
    jobs = []
    for i, state in enumerate(states):
        arrays = [(weight.numpy(), bias.numpy()) for weight, bias in layers(state)]
        jobs.append((env, arrays, derive(0, "pack", purpose, i), episodes, explore))
    played = in_processes(evaluate, jobs, workers)
    return list(tqdm(played, total=len(jobs), desc=f"{env} {purpose}", unit="policy"))


def evaluate(
    env: str, arrays: list[tuple[np.ndarray, np.ndarray]], seed: int, episodes: int, explore: bool
) -> np.ndarray:
    """Body of a process of `measure`; arrays, since tensors would travel as open files."""
    weights = [(torch.from_numpy(w), torch.from_numpy(b)) for w, b in arrays]
    player = Evaluator(factory(env), width=min(10, episodes), seed=seed)
    return player(Behavior(weights, {}), episodes, explore)["return"].double().numpy()


if __name__ == "__main__":
    pack({env: Path(run) for env, run in (word.split("=", 1) for word in sys.argv[1:])})
