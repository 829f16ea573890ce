"""What a policy takes and gives, stored when its run begins: loading it needs no environment."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offrl.config import Resolved
from offrl.data.dataset import Dataset
from offrl.engine.method import Batch, Spec

FILE, SEEN = "policy.json", "observations.npz"  # of a run directory
SAMPLE = 1000  # rows of observations that are kept
MOST = 16 << 20  # bytes of them
FAR = 10  # standard deviations beyond the range of the training data: worth a warning


@dataclass(frozen=True)
class Signature:
    """Shapes, units and names of what a policy takes and gives.

    Attributes:
        method: its name.
        obs_shape, act_shape: of one observation and one action, as the environment has them.
        actions: numbers of an action, or how many actions there are if discrete.
        discrete: actions are whole numbers from `start` on.
        start: of discrete actions, the first one.
        low, high: of other ones, the environment's bounds, `actions` numbers each.
        dtype: of other ones, the environment's, by NumPy's name.
        players: see `Spec`.
        goals: it is told a goal, an observation.
        targets: returns that it can be asked for, the first unless another is named; () for a
            policy that is not asked for any.
        obs_names, act_names: of the columns where the data have names, else ().
    """

    method: str
    obs_shape: tuple[int, ...]
    act_shape: tuple[int, ...]
    actions: int
    discrete: bool = False
    start: int = 0
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dtype: str = "float32"
    players: tuple[int, ...] = ()
    goals: bool = False
    targets: tuple[float, ...] = ()
    obs_names: tuple[str, ...] = ()
    act_names: tuple[str, ...] = ()

    @property
    def obs_dim(self) -> int:
        return math.prod(self.obs_shape)

    @property
    def whole(self) -> bool:
        """Whether the numbers of an action are whole ones in a range."""
        return not (self.discrete or np.issubdtype(self.dtype, np.floating))

    @property
    def spec(self) -> Spec:
        """As the method was made with, but for the statistics of the data."""
        return Spec(self.obs_dim, self.actions, discrete=self.discrete, players=self.players)

    def column(self, index: int) -> str:
        """The name of a number of the observation."""
        return self.obs_names[index] if self.obs_names else f"obs[{index}]"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Signature":
        """From JSON's lists, other keys left aside."""
        names = [field.name for field in fields(cls) if field.name in content]
        found: dict[str, Any] = {name: content[name] for name in names}
        found |= {name: tuple(v) for name, v in found.items() if isinstance(v, list)}
        return cls(**found)

    @classmethod
    def read(cls, folder: Path) -> "Signature":
        """Of a run directory.

        Raises:
            FileNotFoundError: if an earlier version, which did not write it, started the run.
        """
        path = folder / FILE
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} has no {FILE}, which says what its policy takes and gives: it was "
                "started by an earlier version of offrl, which can load it"
            )
        return cls.of(json.loads(path.read_text()))


def signature(
    resolved: Resolved, spec: Spec, data: Dataset | None, obs_space: Any = None, space: Any = None
) -> Signature:
    """What the policy of a run takes and gives.

    Args:
        spec: of the run.
        data: of an offline method. `info` may name columns (obs_names, act_names) and, for a run
            without an environment, the units of actions before they were brought to [-1, 1] or
            to count from 0: rescaled_from, a dict of low and high, and action_start.
        obs_space, space: of the environment's observations, and of its actions before they were
            scaled; None for a run without one.
    """
    config = resolved.config()
    info: dict[str, Any] = data.info if data is not None else {}
    obs_shape = getattr(obs_space, "shape", None) or ()
    if math.prod(obs_shape) != spec.obs_dim:
        obs_shape = (spec.obs_dim,)
    units: dict[str, Any] = {"act_shape": (), "start": info.get("action_start", 0)}
    if spec.discrete and space is not None:
        units["start"] = getattr(space, "start", 0)
    elif not spec.discrete:
        stated = info.get("rescaled_from") or {"low": -1.0, "high": 1.0}
        ends = (stated["low"], stated["high"]) if space is None else (space.low, space.high)
        wide = [np.broadcast_to(np.ravel(end), spec.act_dim).astype(float) for end in ends]
        units = dict(zip(("low", "high"), (tuple(end.tolist()) for end in wide), strict=True))
        units["dtype"] = str(getattr(space, "dtype", "float32"))
        units["act_shape"] = getattr(space, "shape", None) or (spec.act_dim,)
    return Signature(
        method=resolved.name,
        obs_shape=tuple(int(n) for n in obs_shape),
        actions=spec.act_dim,
        discrete=spec.discrete,
        players=spec.players,
        goals=resolved.method.goals,
        targets=tuple(getattr(config, "targets", ())),
        obs_names=tuple(info.get("obs_names", ())),
        act_names=tuple(info.get("act_names", ())),
        **units | {"start": int(units.get("start", 0))},
    )


def store(
    folder: Path,
    resolved: Resolved,
    spec: Spec,
    data: Dataset | None,
    obs_space: Any = None,
    space: Any = None,
) -> None:
    """Write into a run directory what a policy needs; arguments as those of `signature`."""
    about = signature(resolved, spec, data, obs_space, space)
    (folder / FILE).write_text(about.to_json())
    if data is not None:
        keep_observations(folder, data["obs"])


def keep_observations(folder: Path, obs: torch.Tensor) -> None:
    """Keep the range of observations (N, o) that a policy learns from, and some of them."""
    blocks = obs.split(max(1, (1 << 26) // obs.shape[1]))
    low = torch.stack([block.amin(0) for block in blocks]).amin(0).float()
    high = torch.stack([block.amax(0) for block in blocks]).amax(0).float()
    mean = torch.stack([block.double().sum(0) for block in blocks]).sum(0) / len(obs)
    squares = [(block.double() - mean).square().sum(0) for block in blocks]
    std = (torch.stack(squares).sum(0) / len(obs)).sqrt().float()
    count = min(len(obs), SAMPLE, max(1, MOST // (4 * obs.shape[1])))
    rows = np.sort(np.random.default_rng(0).choice(len(obs), count, replace=False))
    sample = obs[torch.from_numpy(rows)].float()
    kept = {"low": low, "high": high, "std": std, "sample": sample}
    arrays: dict[str, Any] = {name: x.cpu().numpy() for name, x in kept.items()}
    np.savez(folder / SEEN, **arrays)


def keep_collected(folder: Path, parts: dict[str, Any]) -> None:
    """`keep_observations` of what an online method has collected, from its newest rows."""
    for part in parts.values():
        if hasattr(part, "replay"):
            generator = torch.Generator(part.device).manual_seed(0)
            rows: Batch = part.replay.sampler(10 * SAMPLE)(generator)
            keep_observations(folder, rows["obs"].flatten(0, -2))


def observations(*folders: Path) -> dict[str, np.ndarray]:
    """What was kept in the first folder that has it: low, high, std (o,), sample (n, o); or {}."""
    for folder in folders:
        if (folder / SEEN).exists():
            with np.load(folder / SEEN) as file:
                return dict(file)
    return {}
