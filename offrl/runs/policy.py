"""A trained policy for use: from a run or an exported file, on arrays, without an environment.

policy = offrl.load_policy("runs/td3bc/hopper-medium/2026-01-31_12-00-00")
action = policy.act(observation)
"""

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator

from offrl import config as configuration
from offrl.config import Resolved
from offrl.engine import checkpoint, optim
from offrl.engine.method import Algorithm
from offrl.engine.state import load_state, state_of
from offrl.errors import ConfigError
from offrl.runs import export
from offrl.runs.signature import FAR, Signature, observations
from offrl.seeding import generator

WIDEST = 1000  # columns whose range is told in an exported file
NOT_GIVEN: Any = object()


@dataclass(frozen=True)
class Memory:
    """What a policy remembers of the episodes that it acts in, one per row."""

    rows: int
    content: Any


class Policy:
    """Actions from observations, both in the environment's own units.

    Attributes:
        signature: shapes, bounds and names.
        info: the signature and where the policy comes from: method, its options, data, environment,
            versions.

    Deterministic unless it is told to explore: the mean of a Gaussian, the best of discrete
    actions.
    """

    def __init__(self, step: Any, info: dict[str, Any], seen: dict[str, np.ndarray]):
        self.step, self.info, self.seen = step, info, seen
        self.signature = Signature.of(info)
        self.generator: Generator | None = None
        self.limits: tuple[np.ndarray, np.ndarray] | None = None
        if "low" in seen:
            reach = FAR * (seen["std"] + 1e-3)  # as in standardization
            self.limits = seen["low"] - reach, seen["high"] + reach

    def act(
        self,
        obs: Any,
        *,
        memory: Memory | None = NOT_GIVEN,
        start: Any = None,
        reward: Any = None,
        goal: Any = None,
        target: Any = None,
        explore: bool = False,
        seed: int | None = None,
    ) -> Any:
        """The action at an observation, or the actions at several.

        Args:
            obs: (o,) for an action (a,), (B, o) for (B, a), or shaped as the environment's own. An
                action is an int64 number if discrete, otherwise of the environment's own type.
            memory: of a policy that remembers, what the last call returned; None where all episodes
                begin.
            start: whether an episode begins, one for all or (B,); where memory is None it does.
            reward: of the action before, in the environment's units, one or (B,); 0 if left out.
            goal: of a goal-conditioned policy, an observation (o,) or (B, o).
            target: of a return-conditioned one, the return to ask for where an episode begins, one
                or (B,); the first of `signature.targets` if left out.
            explore: act as in training, at random.
            seed: of these random draws; without, every call draws anew.

        Returns:
            The action; and, for a policy that remembers and wherever `memory` is given, a pair of
            the action and the memory for the next call.

        Raises:
            ValueError: for an observation of another size or one that is not finite, a goal that is
                missing or not asked for, a memory of another number of rows.

        Warns once, naming the column, of an observation that lies more than ten standard deviations
        outside the range of the training data.
        """
        rows, single = self.rows("obs", obs)
        self.check_range(rows)
        count, before = len(rows), None if memory is NOT_GIVEN else memory
        if before is not None and before.rows != count:
            raise ValueError(f"the memory is of {before.rows} rows, obs has {count}")
        told = {"obs": rows}
        for name, value, usual in (
            ("start", start, float(before is None)),
            ("reward", reward, 0.0),
            ("target", target, (self.signature.targets or (0.0,))[0]),
        ):
            told[name] = np.empty(count, np.float32)
            told[name][:] = usual if value is None else np.ravel(np.asarray(value, np.float32))
        if target is not None and not self.signature.targets:
            raise ValueError(f"{self.signature.method} is not asked for a return: leave out target")
        if (goal is None) == self.signature.goals:
            wrong = "needs a goal: act(obs, goal=...)" if goal is None else "takes no goal"
            raise ValueError(f"{self.signature.method} {wrong}")
        if goal is not None:
            told["goal"] = np.empty_like(rows)
            told["goal"][:] = self.rows("goal", goal)[0]
        act, after = self.step.run(told, before and before.content, self.draws(explore, seed))
        act = self.own_type(act[0] if single else act)
        kept = None if after is None else Memory(count, after)
        return act if kept is None and memory is NOT_GIVEN else (act, kept)

    def own_type(self, act: Any) -> Any:
        """Actions (..., *act_shape) in the type of the environment's, within its bounds there."""
        s = self.signature
        if s.discrete or s.dtype == "float32":
            return act
        low, high = np.reshape(s.low, s.act_shape), np.reshape(s.high, s.act_shape)
        return np.clip(act, low, high).astype(s.dtype)

    def predict(
        self,
        observation: Any,
        state: Memory | None = None,
        episode_start: Any = None,
        deterministic: bool = True,
        **told: Any,
    ) -> tuple[Any, Memory | None]:
        """`act` under the name and with the arguments of Stable-Baselines3: (action, state).

        `state` is the memory, `episode_start` is start, deterministic=False explores. A dictionary
        of Gymnasium's goal environments gives its `observation` and `desired_goal`. Unlike there
        the policy is deterministic unless told otherwise. d3rlpy's `predict(x)` is
        `predict(x)[0]` and its `sample_action(x)` is `act(x, explore=True)`.

        Args:
            told: goal, reward, target and seed, as for `act`.
        """
        if isinstance(observation, dict):
            if self.signature.goals:
                told.setdefault("goal", observation["desired_goal"])
            observation = observation["observation"]
        return self.act(
            observation, memory=state, start=episode_start, explore=not deterministic, **told
        )

    def export(self, path: str | Path) -> dict[str, Any]:
        """Write the policy to a .onnx or .pt2 file that needs nothing of this library.

        What it takes and gives: `offrl.runs.export`. The file's actions are compared with the
        library's; the metadata in it are also written to a .json beside it.

        Returns:
            These metadata.

        Raises:
            Failed: if it cannot be exported or the two differ; no file is left then.
            ValueError: for another suffix, or a policy that was read from such a file.
        """
        if not isinstance(self.step, export.Step):
            raise ValueError("this policy was read from an exported file; export that of the run")
        told = dict(self.info)
        if self.limits is not None and self.signature.obs_dim <= WIDEST:
            names = ("low", "high", "std")
            told["observations"] = {name: self.seen[name].tolist() for name in names}
        return export.write(Path(path), self.step, told, self.seen)

    def rows(self, name: str, value: Any) -> tuple[np.ndarray, bool]:
        """Observations as (B, o), and whether there was a single one."""
        shape, wide = self.signature.obs_shape, self.signature.obs_dim
        array = np.asarray(value, np.float32)
        single = array.shape in (shape, (wide,))
        if not single and array.shape[1:] not in (shape, (wide,)):
            one = " or ".join(str(s) for s in dict.fromkeys([(wide,), shape]))
            raise ValueError(
                f"{name} has shape {array.shape}; {self.signature.method} was trained on {one}, "
                "with one more axis in front for several"
            )
        rows = np.ascontiguousarray(array.reshape(-1, wide))
        if not np.isfinite(rows).all():
            row, column = np.argwhere(~np.isfinite(rows))[0]
            named = self.signature.column(column).replace("obs[", f"{name}[")
            raise ValueError(f"{named} is {rows[row, column]} in row {row}; it must be finite")
        return rows, single

    def check_range(self, rows: np.ndarray) -> None:
        if self.limits is None:
            return
        low, high = self.limits
        beyond = (rows < low) | (rows > high)
        if beyond.any():
            row, column = np.argwhere(beyond)[0]
            self.limits = None  # said once
            warnings.warn(
                f"{self.signature.column(column)} is {rows[row, column]:.4g} in row {row}, more "
                f"than {FAR} standard deviations outside the training data's range "
                f"[{self.seen['low'][column]:.4g}, {self.seen['high'][column]:.4g}]; the action "
                "there means little (this is said once)",
                stacklevel=3,
            )

    def draws(self, explore: bool, seed: int | None) -> Generator | None:
        if not explore:
            return None
        if seed is not None:
            return Generator().manual_seed(seed)
        if self.generator is None:
            self.generator = Generator()
            self.generator.seed()
        return self.generator


def load_policy(place: str | Path, seed: int | None = None, trusted: bool = False) -> Policy:
    """The policy of a run directory, a seed's folder, a checkpoint, a snapshot or an exported file.

    Args:
        seed: which of the run's seeds; None for its first.
        trusted: needed for a .pt2 file, whose reader can run code that stands in it. Nothing in the
            others is executed.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if a file is damaged or not trusted, or the run has no such seed.
        ConfigError: if the method is a user's own and its file is gone.
    """
    place = Path(place)
    if place.suffix in export.SUFFIXES:
        step, info = export.read(place, trusted)
        seen = {k: np.array(v, np.float32) for k, v in info.get("observations", {}).items()}
        return Policy(step, info, seen)
    folder, files = checkpoints(place)
    held = {number: file for file in files for number in group_of(file)}
    number = next(iter(held)) if seed is None else seed
    if number not in held:
        raise ValueError(f"{place} has no seed {seed}; it has {', '.join(map(str, held))}")
    file = held[number]
    resolved = configuration.of_run(folder)
    signature, saved = Signature.read(folder), checkpoint.load(file)
    check_label(resolved, saved, file)
    with optim.acting():
        algo = algorithm(resolved, signature)
    index, count = saved["seeds"].index(number), len(saved["seeds"])
    fresh = state_of(algo)
    state = of_seed(fresh, saved["algo"] | {"generator": fresh["generator"]}, index, count)
    load_state(algo, state)
    info = provenance(folder) | json.loads(signature.to_json())
    info |= {"options": dict(resolved.options), "seed": number}
    info |= {"step": saved.get("global_step", saved["step"]), "checkpoint": export.digest(file)}
    return Policy(export.Step(algo, signature), info, observations(file.parent, folder))


def algorithm(
    resolved: Resolved,
    signature: Signature,
    seeds: tuple[int, ...] = (),
    device: torch.device | str = "cpu",
) -> Any:
    """The method of a run, untrained."""
    stream = generator(0, "evaluation", device=device)
    return resolved.method.make(resolved.config(), signature.spec, stream, seeds)


def export_run(options: export.Options) -> None:
    """Write the policy of a run to a file, and print what is in it."""
    kept = load_policy(options.run, options.seed).export(options.out)
    inputs, outputs, same = (kept[name] for name in ("inputs", "outputs", "parity"))
    print(f"{options.out}: inputs {', '.join(inputs)}; outputs {', '.join(outputs)}")
    print(
        f"actions within {same['largest']:.1g} of half their range of the library's, on "
        f"{same['random']} random observations and {same['data']} of the training data"
    )


def of_seed(fresh: Any, stored: Any, index: int, count: int) -> Any:
    """The state of one of `count` stacked seeds, in the sizes of a single one.

    What acting needs nothing of stays as it is in `fresh`: optimizers.
    """
    if isinstance(stored, dict):
        if "param_groups" in stored:
            return fresh
        own = fresh if isinstance(fresh, dict) else {}
        return {key: of_seed(own.get(key), part, index, count) for key, part in stored.items()}
    if isinstance(fresh, (list, tuple)) and len(fresh) == len(stored):
        return [of_seed(*pair, index, count) for pair in zip(fresh, stored, strict=True)]
    stacked = isinstance(fresh, torch.Tensor) and stored.shape == (count, *fresh.shape)
    return stored[index] if stacked and count > 1 else stored


def provenance(folder: Path) -> dict[str, Any]:
    """Where a run's policy comes from, without places of this machine."""
    path = folder / "run.json"
    about = json.loads(path.read_text()) if path.exists() else {}
    data = about.get("dataset")
    if data is not None:
        name = Path(data["name"]).name if Path(data["name"]).is_absolute() else data["name"]
        data = {"name": name, "digest": data["digest"]}
    kept = {name: about[name] for name in ("env", "versions", "commit", "date") if name in about}
    return kept | {"data": data}


def check_label(resolved: Resolved, saved: dict[str, Any], file: Path) -> None:
    if saved["label"] != resolved.name:
        raise ConfigError(f"{file} belongs to {saved['label']}, the run is of {resolved.name}")


def group_of(file: Path) -> list[int]:
    """The seeds in a checkpoint, by the name of its group's folder where that has one."""
    for folder in file.parents:
        if found := re.fullmatch(r"seeds?-(\d+)(?:-(\d+))?", folder.name):
            return list(range(int(found[1]), int(found[2] or found[1]) + 1))
    return checkpoint.load(file)["seeds"]


def checkpoints(place: Path) -> tuple[Path, list[Path]]:
    """The run directory and the checkpoint files that a path means.

    Raises:
        FileNotFoundError: if there is none.
    """
    if place.is_file():
        inside = [p for p in place.parents if (p / "config.yaml").exists()]
        if not inside:
            raise FileNotFoundError(f"{place} lies in no run directory (no config.yaml above it)")
        return inside[0], [place]
    if (place / "checkpoint.pt").exists():
        return checkpoints(place / "checkpoint.pt")
    files = sorted(place.glob("seed*/checkpoint.pt"))
    if not files or not (place / "config.yaml").exists():
        raise FileNotFoundError(f"{place} is neither a run directory nor a checkpoint")
    return place, files


def load_algorithm(
    resolved: Resolved, file: Path, device: torch.device | str = "cpu"
) -> tuple[Algorithm, list[int]]:
    """An algorithm with the weights of a checkpoint, and the seeds it holds, stacked as they were.

    Raises:
        ConfigError: if the checkpoint is of another method.
        ValueError: if the file is damaged or does not fit.
    """
    saved = checkpoint.load(file)
    check_label(resolved, saved, file)
    group = saved["seeds"]
    axes = (len(group),) if len(group) > 1 else ()
    algo = algorithm(resolved, Signature.read(checkpoints(file)[0]), axes, device)
    state, own = saved["algo"], algo.generator.get_state()
    if state["generator"].shape != own.shape:  # trained on another device
        state = state | {"generator": own}
    load_state(algo, state)
    return algo, group
