"""The behaviour policies that ship with the library: snapshots of its own SAC, and an expert.

`behavior/<env>.safetensors` holds the actors in fp16, `behavior/manifest.json` what they are:
environment, training step, returns, the command that trained them, versions. `pack` makes both
from training runs with `snapshot_every`; the choice it makes is written there.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from tqdm import tqdm

from offrl.data.dataset import DataError
from offrl.data.rollout import in_processes
from offrl.engine import checkpoint
from offrl.envs.make import env_id, factory
from offrl.seeding import derive

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "behavior"
PACKAGES = ("offrl", "torch", "numpy", "gymnasium", "mujoco")
MEDIUM = (0.35, 0.55)  # of the expert's return; D4RL names "approximately 1/3"
Weights = list[tuple[Tensor, Tensor]]  # (in, out) and (1, out) of every layer


@dataclass(frozen=True)
class Behavior:
    """A tanh-squashed Gaussian policy for inference, equal to `GaussianActor` with its weights.

    Attributes:
        layers: weight (in, out) and bias (1, out) of every layer, float32.
        about: role ("early", "medium", "expert"), step, return and more; see `pack`.
    """

    layers: Weights
    about: dict[str, Any]

    def act(
        self,
        now: dict[str, Tensor],
        memory: Any = None,
        explore: bool = False,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Any]:
        """Actions (B, a) in [-1, 1] for now["obs"] (B, o): sampled, or the tanh of the mean."""
        x = now["obs"]
        for weight, bias in self.layers[:-1]:
            x = torch.addmm(bias, x, weight).relu_()
        weight, bias = self.layers[-1]
        mean, log_std = torch.addmm(bias, x, weight).chunk(2, -1)
        if not explore:
            return mean.tanh(), memory
        noise = torch.empty_like(mean).normal_(generator=generator)
        return (mean + log_std.clamp(-20, 2).exp() * noise).tanh(), memory

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, 64 hex digits."""
        total = hashlib.sha256()
        for tensor in (tensor for layer in self.layers for tensor in layer):
            total.update(tensor.numpy().tobytes())
        return total.hexdigest()


def available(folder: Path = FOLDER) -> list[str]:
    """The environments that have policies."""
    return sorted(manifest(folder)["robots"])


def manifest(folder: Path = FOLDER) -> dict[str, Any]:
    """What is shipped. A folder without policies has an empty manifest."""
    path = folder / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {"format": 1, "robots": {}}


def load(env: str, folder: Path = FOLDER) -> list[Behavior]:
    """The policies of an environment: the early ones by step, then medium, then the expert.

    Raises:
        DataError: if there are none, or the files are damaged.
    """
    robots = manifest(folder)["robots"]
    if env not in robots:
        raise DataError(
            f"no behaviour policies ship for {env!r} (there are: {', '.join(robots) or 'none'}); "
            "roll out your own with scripts/collect.py run=DIR, or choose dataset=random"
        )
    try:
        tensors = load_file(folder / f"{env}.safetensors")
        return [
            Behavior(layers(tensors, f"{about['role']}/{about['step']}/"), about)
            for about in robots[env]["policies"]
        ]
    except Exception as error:  # safetensors raises a type of its own
        raise DataError(
            f"the behaviour policies in {folder} are damaged ({error}); install offrl again"
        ) from error


def layers(tensors: Mapping[str, Tensor], prefix: str = "") -> Weights:
    """Layers of an actor's state, rounded to fp16 as they ship and widened to float32."""
    count = sum(name.startswith(prefix) and name.endswith("weight") for name in tensors)
    return [
        (half(tensors[f"{prefix}net.layers.{i}.weight"]),
         half(tensors[f"{prefix}net.layers.{i}.bias"])) for i in range(count)
    ]  # fmt: skip


def half(value: Tensor) -> Tensor:
    return value.half().float()


# --- packing -------------------------------------------------------------------------------------


def pack(
    runs: Mapping[str, Path],
    command: str,
    folder: Path = FOLDER,
    keep: int = 10,
    episodes: int = 20,
    workers: int = 0,
) -> dict[str, Any]:
    """Choose policies among the snapshots of SAC runs and write them as the library ships them.

    Every snapshot, rounded to fp16, plays `episodes` with sampled actions. The expert is the one
    with the best mean; medium is the first whose mean lies within MEDIUM of the expert's; up to
    `keep` snapshots evenly spaced from the first to medium are kept. The chosen ones then play
    fresh episodes, so the returns in the manifest are not those that they were chosen by.

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
        returns = measure(env, [state for _, state, _ in found], "choice", episodes, workers)
        chosen = choose(run, [step for step, _, _ in found], [row.mean() for row in returns], keep)
        states = [found[i][1] for i, _ in chosen]
        fresh = measure(env, states, "manifest", episodes, workers)
        plain = measure(env, states, "manifest", episodes, workers, explore=False)
        about = []
        for (i, role), sampled, mean in zip(chosen, fresh, plain, strict=True):
            about.append({
                "role": role, "step": found[i][0], "return": float(sampled.mean()),
                "return_std": float(sampled.std()), "deterministic_return": float(mean.mean()),
                "episodes": episodes,
            })  # fmt: skip
            logger.info("%s %s", env, about[-1])
        tensors = {
            f"{told_of['role']}/{told_of['step']}/{name}": value.half().contiguous()
            for told_of, state in zip(about, states, strict=True)
            for name, value in state.items()
        }
        save_file(tensors, folder / f"{env}.safetensors")
        told["robots"][env] = {
            "env": env_id(env),
            "seed": found[0][2],
            "command": command.format(env=env),
            "random_steps": warmup(run),
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "policies": about,
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


def choose(run: Path, steps: list[int], means: list[float], keep: int) -> list[tuple[int, str]]:
    """Snapshots to ship, as (index, role): early ones, medium, expert."""
    expert = int(np.argmax(means))
    shares = [mean / means[expert] for mean in means]
    medium = next((i for i, share in enumerate(shares) if MEDIUM[0] <= share <= MEDIUM[1]), None)
    if medium is None or means[expert] <= 0:
        pairs = ", ".join(f"{step}: {mean:.0f}" for step, mean in zip(steps, means, strict=True))
        raise DataError(
            f"{run} has no snapshot between {MEDIUM[0]:.0%} and {MEDIUM[1]:.0%} of its best "
            f"return; take snapshots more often ({pairs})"
        )
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
    from offrl.engine.evaluate import Evaluator
    from offrl.evaluation import Exploring

    weights = [(torch.from_numpy(w), torch.from_numpy(b)) for w, b in arrays]
    policy: Any = Behavior(weights, {})
    player = Evaluator(factory(env), width=min(10, episodes), seed=seed)
    return player(Exploring(policy) if explore else policy, episodes).returns.double().numpy()
