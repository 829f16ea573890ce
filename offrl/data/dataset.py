"""Immutable logged transitions with episode bounds, a digest and checks on entry."""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offrl.errors import DataError
from offrl.system import locked

logger = logging.getLogger(__name__)

FIELDS = ("obs", "act", "reward", "next_obs", "terminal", "timeout")


@dataclass(frozen=True)
class Dataset:
    """Transitions of whole episodes, one after the other.

    Attributes:
        fields: name -> tensor with one leading axis of N rows: obs (N, o), act (N, a) in [-1, 1]
            or int64 (N,), reward (N,), next_obs (N, o), terminal (N,) and timeout (N,) as 0 or 1.
            `terminal` is 1 only where the process really ended; `timeout` where a limit cut it.
        starts: int64 (E,), first row of every episode, ascending, starts[0] == 0.
        returns: (E,) undiscounted return of every episode, taken before any row was dropped.
        name: for people, such as "generated/halfcheetah-medium".
        info: provenance: source, versions, simulator, reference returns, notes.
    """

    fields: dict[str, Tensor]
    starts: Tensor
    returns: Tensor
    name: str
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.fields["obs"])

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]

    @property
    def episodes(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> Tensor:
        """Rows of every episode, int64 (E,)."""
        end = torch.tensor([len(self)], dtype=self.starts.dtype, device=self.starts.device)
        return torch.diff(self.starts, append=end)

    @property
    def obs_dim(self) -> int:
        return self.fields["obs"].shape[-1]

    @property
    def discrete(self) -> bool:
        return not self.fields["act"].is_floating_point()

    @property
    def act_dim(self) -> int:
        act = self.fields["act"]
        return int(act.max()) + 1 if self.discrete else act.shape[-1]

    def with_fields(self, **fields: Tensor) -> "Dataset":
        """The same rows with further fields, such as next_act; they count in the digest.

        Raises:
            ValueError: for a field of another length.
        """
        for name, value in fields.items():
            if len(value) != len(self):
                raise ValueError(f"{name} has {len(value)} rows, {self.name} has {len(self)}")
        return replace(self, fields=self.fields | fields)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, shapes, types and bytes of all fields and bounds, 64 hex digits."""
        total = hashlib.sha256()
        for name, value in sorted(self.fields.items() | {("starts", self.starts)}):
            array = value.detach().cpu().numpy()
            total.update(f"{name} {array.dtype} {array.shape}\n".encode())
            for first in range(0, len(array), 1 << 18):  # memory-mapped data stays on the disk
                total.update(np.ascontiguousarray(array[first : first + (1 << 18)]).data)
        return total.hexdigest()

    def statistics(self, eps: float = 1e-3) -> tuple[Tensor, Tensor]:
        """Mean and (population std + eps) of the observations, float32 (obs_dim,).

        Summed in float64 in blocks, so the result does not depend on where the data lies.
        """
        obs, total, square = self.fields["obs"], 0.0, 0.0
        rows = min(1 << 18, (1 << 28) // self.obs_dim + 1)  # images are wide
        for block in obs.split(rows):
            total = total + block.double().sum(0)
        mean = torch.as_tensor(total) / len(self)
        for block in obs.split(rows):
            square = square + (block.double() - mean).square().sum(0)
        std = (torch.as_tensor(square) / len(self)).sqrt()
        return mean.float(), (std + eps).float()

    def describe(self, discount: float = 0.99, limit: int | None = None) -> Any:
        """A look before training; print it. See `offrl.data.describe.describe`."""
        from offrl.data.describe import describe

        return describe(self, discount, limit)


def bounds(ends: Tensor) -> Tensor:
    """First rows of the episodes, from flags (N,) that are true on the last row of each.

    A trailing piece without an end flag counts as an episode.
    """
    last = torch.nonzero(ends)[:, 0]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), last + 1])
    return starts[starts < len(ends)]


def episode_sums(values: Tensor, starts: Tensor) -> Tensor:
    """Sum of a row-wise value over every episode, float64 (E,)."""
    index = torch.zeros(len(values), dtype=torch.int64)
    index[starts[1:]] = 1
    return torch.zeros(len(starts), dtype=torch.float64).index_add_(
        0, index.cumsum(0), values.double()
    )


# --- checks on entry -----------------------------------------------------------------------------


def check(data: Dataset, needs: Iterable[str]) -> None:
    """Stop before training on data that an algorithm cannot use.

    Args:
        needs: the fields that the algorithm reads.

    Raises:
        DataError: missing field, wrong shape or length, NaN or infinity, actions outside [-1, 1],
            a constant reward where rewards are used, flags other than 0 and 1, bad bounds.
    """
    needs, size = tuple(needs), len(data)
    if size == 0:
        raise DataError(f"{data.name} holds no transitions")
    for name in needs:
        if name not in data.fields:
            raise DataError(
                f"{data.name} has no field {name!r}, which the algorithm needs; "
                f"it holds {', '.join(data.fields)}"
            )
        value = data.fields[name]
        if len(value) != size:
            raise DataError(f"{data.name}: {name} has {len(value)} rows, obs has {size}")
        if value.is_floating_point():
            reject(data, name, ~value.isfinite(), "is NaN or infinite", "remove or repair the row")
    if "next_obs" in needs and data["next_obs"].shape != data["obs"].shape:
        raise DataError(
            f"{data.name}: next_obs {tuple(data['next_obs'].shape)} "
            f"and obs {tuple(data['obs'].shape)} differ in shape"
        )
    if "act" in needs and not data.discrete:
        reject(
            data,
            "act",
            data["act"].abs() > 1 + 1e-5,
            "lies outside [-1, 1]",
            "rescale the actions by the environment's action bounds",
        )
    if "reward" in needs and data["reward"].dim() == 1 and size > 1:
        reward = data["reward"]
        if bool(reward.min() == reward.max()):
            raise DataError(
                f"{data.name}: reward is {float(reward[0]):g} in every row, so there is nothing "
                "to learn from; check that the reward field was filled"
            )
    for name in {"terminal", "timeout"} & set(needs):
        value = data[name]
        reject(data, name, (value != 0) & (value != 1), "is neither 0 nor 1", "store flags")
    starts = data.starts
    if len(starts) == 0 or starts[0] != 0 or starts[-1] >= size or (starts.diff() <= 0).any():
        raise DataError(f"{data.name}: episode starts must ascend from 0 and stay below {size}")


def reject(data: Dataset, name: str, bad: Tensor, what: str, remedy: str) -> None:
    rows = bad.view(len(data), -1).any(-1)
    if rows.any():
        row = int(rows.nonzero()[0, 0])
        count = int(rows.sum())
        value = data[name][row].tolist()
        raise DataError(
            f"{data.name}: {name} {what} in {count} of {len(data)} rows, first in row {row} "
            f"({value}); {remedy}"
        )


def check_fits(data: Dataset, obs_dim: int, act_dim: int, env: str) -> None:
    """Raises DataError if the data's sizes are not those of the environment it is scored in."""
    if (data.obs_dim, data.act_dim) != (obs_dim, act_dim):
        raise DataError(
            f"{data.name} has observations of {data.obs_dim} and actions of {data.act_dim} "
            f"numbers, the environment {env} has {obs_dim} and {act_dim}: "
            "choose the environment that the data came from"
        )


# --- the cache: flat arrays, memory-mapped -------------------------------------------------------


def write(folder: Path, fill: Callable[[Path], dict[str, Any]]) -> None:
    """Make a cache entry at `folder` or nothing at all.

    Args:
        fill: writes `<field>.npy`, `starts.npy` and `returns.npy` into the folder it is given and
            returns the entry's `name` and `info`.

    Raises:
        OSError: if the place is not writable or the disk is full; nothing is left behind.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OSError(
            f"cannot write the data cache {folder.parent}: {error.strerror or error}; "
            "set OFFRL_HOME to a folder that is writable"
        ) from error
    try:
        new = temporary / "new"
        new.mkdir()
        meta = fill(new)
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
        if folder.exists():
            os.replace(folder, temporary / "old")  # whole until it is gone, for those who read it
        os.replace(new, folder)
    except OSError as error:
        raise OSError(
            f"cannot write the data cache {folder}: {error.strerror or error}; "
            "free some space or set OFFRL_HOME to another disk; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def once(folder: Path, ready: Callable[[], bool], make: Callable[[], None]) -> None:
    """Make a cache entry unless it is there; processes that ask together make it once.

    Raises:
        RuntimeError: in a process that is only starting and runs the caller's script a second time
            on its way; it would wait here for its own parent.
    """
    if not ready():
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise RuntimeError("call the library inside `if __name__ == '__main__':`")
        with one_at_a_time(folder):
            if not ready():
                make()


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold an entry's lock: runs that start together make a data set once, the others wait."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot write the data cache {folder.parent}: {error.strerror or error}; "
            "set OFFRL_HOME to a folder that is writable"
        ) from error

    def busy() -> None:
        logger.warning("another process is making %s; waiting for it", folder)

    remedy = "set OFFRL_HOME to a writable folder of a local disk"
    with locked(folder.parent / f".{folder.name}.lock", busy, remedy):
        yield


def allocate(path: Path, kind: type | np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """A new .npy file, mapped for writing, whose blocks on the disk are already its own.

    Without them a disk that fills up while the rows are written kills the process by SIGBUS. macOS
    cannot be asked for them; on Windows a file has its blocks as soon as it has its size.

    Raises:
        OSError: if the disk has no room for it.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def store(path: Path, array: np.ndarray) -> None:
    """np.save, which on a full disk may lose the last 4 kB of a file without an error."""
    file = allocate(path, array.dtype, array.shape)
    file[...] = array
    file.flush()


def read(folder: Path) -> Dataset:
    """Open a cache entry; its arrays stay on the disk, mapped into memory.

    Raises:
        DataError: if the entry is damaged.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {
            name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))
            for name in [*meta["fields"], "starts", "returns"]
        }
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"the cache entry {folder} is damaged ({error}); delete it") from error
    starts, returns = arrays.pop("starts"), arrays.pop("returns")
    return Dataset(arrays, starts, returns, meta["name"], meta["info"])


def home() -> Path:
    """The data cache: $OFFRL_HOME, else ~/.cache/offrl."""
    return Path(os.environ.get("OFFRL_HOME") or Path.home() / ".cache" / "offrl")
