"""Immutable logged transitions with episode bounds, a digest and checks on entry."""

import hashlib
import json
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from offrl.errors import DataError, refusal
from offrl.system import locked

logger = logging.getLogger(__name__)

FIELDS = ("obs", "act", "reward", "next_obs", "terminal", "timeout")
WRITABLE = "set OFFRL_HOME to a folder that is writable"
Arrays = dict[str, np.ndarray]


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
        return torch.diff(self.starts, append=self.starts.new_tensor([len(self)]))

    @property
    def obs_dim(self) -> int:
        return self.fields["obs"].shape[-1]

    @property
    def discrete(self) -> bool:
        return not self.fields["act"].is_floating_point()

    @property
    def act_dim(self) -> int:
        act = self.fields["act"]
        if self.discrete:
            return self.info.get("action_count") or int(act.max()) + 1
        return act.shape[-1]

    def with_fields(self, **fields: Tensor) -> "Dataset":
        """The same rows with further fields, such as next_act, which count in the digest.

        Raises DataError for a field of another length.
        """
        for name, value in fields.items():
            if len(value) != len(self):
                raise DataError(f"{self.name}: {name} has {len(value)} rows, obs has {len(self)}")
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
        rows = min(1 << 18, (1 << 28) // self.obs_dim + 1)  # images are wide
        blocks, zero = self["obs"].split(rows), torch.zeros((), dtype=torch.float64)
        mean = sum((block.double().sum(0) for block in blocks), zero) / len(self)
        square = sum(((block.double() - mean).square().sum(0) for block in blocks), zero)
        return mean.float(), ((square / len(self)).sqrt() + eps).float()

    def describe(self, discount: float = 0.99, limit: int | None = None) -> Any:
        """A look before training; print it. See `offrl.data.describe.describe`."""
        from offrl.data.describe import describe

        return describe(self, discount, limit)


def bounds(ends: Tensor) -> Tensor:
    """First rows of the episodes, from flags (N,) that are true on the last row of each.

    A trailing piece without an end flag counts as an episode.
    """
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.nonzero(ends)[:, 0] + 1])
    return starts[starts < len(ends)]


def episode_of(starts: Tensor, size: int) -> Tensor:
    """Number of the episode of every row, int64 (N,)."""
    return torch.searchsorted(starts, torch.arange(size), right=True) - 1


def episode_sums(values: Tensor, starts: Tensor) -> Tensor:
    """Sum of a row-wise value over every episode, float64 (E,)."""
    sums = torch.zeros(len(starts), dtype=torch.float64)
    return sums.index_add_(0, episode_of(starts, len(values)), values.double())


# --- checks on entry -----------------------------------------------------------------------------


def check(data: Dataset, needs: Iterable[str]) -> None:
    """Stop before training on data that an algorithm which reads the fields `needs` cannot use.

    Raises DataError for a missing field, a wrong shape or length, NaN or infinity, actions outside
    [-1, 1], a constant reward where rewards are used and no episode ends, flags other than 0 and 1,
    bad bounds.
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
        value = data[name]
        if len(value) != size:
            raise DataError(f"{data.name}: {name} has {len(value)} rows, obs has {size}")
        if value.is_floating_point():
            reject(data, name, ~value.isfinite(), "is NaN or infinite", "remove or repair the row")
        if name in ("terminal", "timeout"):
            reject(data, name, (value != 0) & (value != 1), "is neither 0 nor 1", "store flags")
    if "next_obs" in needs and data["next_obs"].shape != data["obs"].shape:
        obs, following = (tuple(data[name].shape) for name in ("obs", "next_obs"))
        raise DataError(f"{data.name}: next_obs {following} and obs {obs} differ in shape")
    if "act" in needs and not data.discrete:
        remedy = "state what the actions' bounds are: action_low=, action_high="
        reject(data, "act", data["act"].abs() > 1 + 1e-5, "lies outside [-1, 1]", remedy)
    if "reward" in needs and size > 1:
        reward = data["reward"]
        ends = "terminal" in data.fields and bool(data["terminal"].any())
        if reward.dim() == 1 and reward.min() == reward.max() and not ends:
            raise DataError(
                f"{data.name}: reward is {float(reward[0]):g} in every row and no episode ends, so "
                "there is nothing to learn from; check that rewards and terminals were filled"
            )
    starts = data.starts
    if len(starts) == 0 or starts[0] != 0 or starts[-1] >= size or (starts.diff() <= 0).any():
        raise DataError(f"{data.name}: episode starts must ascend from 0 and stay below {size}")


def reject(data: Dataset, name: str, bad: Tensor, what: str, remedy: str) -> None:
    rows = bad.view(len(data), -1).any(-1).nonzero()[:, 0].tolist()
    if rows:
        dropped = torch.tensor(data.info.get("dropped", []), dtype=torch.int64)
        before = dropped - torch.arange(len(dropped))  # rows kept before each one dropped
        first = rows[0] + int(torch.searchsorted(before, rows[0], right=True))
        raise DataError(
            f"{data.name}: {name} {what} in {len(rows)} of {len(data)} rows, first in row "
            f"{first} ({data[name][rows[0]].tolist()}); {remedy}"
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


def cached(folder: Path, fill: Callable[[Path], dict[str, Any]], stamp: Any = None) -> Dataset:
    """The cache entry at `folder`, made by `fill` unless it is there; see `once` and `write`.

    An entry whose info has another `stamp` is made anew.
    """

    def ready() -> bool:
        return folder.exists() and (stamp is None or read(folder).info.get("stamp") == stamp)

    once(folder, ready, lambda: write(folder, fill))
    return read(folder)


def once(folder: Path, ready: Callable[[], bool], make: Callable[[], None]) -> None:
    """Make a cache entry unless it is there; processes that ask together make it once.

    Raises RuntimeError in a process that is only starting and runs the caller's script a second
    time on its way; it would wait here for its own parent.
    """
    if not ready():
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise RuntimeError("call the library inside `if __name__ == '__main__':`")
        with one_at_a_time(folder):
            if not ready():
                make()


def one_at_a_time(folder: Path) -> AbstractContextManager[None]:
    """Hold an entry's lock: runs that start together make a data set once, the others wait."""
    with told(folder.parent, WRITABLE):
        folder.parent.mkdir(parents=True, exist_ok=True)
    busy = partial(logger.warning, "another process is making %s; waiting for it", folder)
    remedy = "set OFFRL_HOME to a writable folder of a local disk"
    return locked(folder.parent / f".{folder.name}.lock", busy, remedy)


@contextmanager
def told(place: Path, remedy: str) -> Iterator[None]:
    """Errors of the system within say that the cache cannot be written, and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write the data cache {place}: {reason}; {remedy}") from error


def write(folder: Path, fill: Callable[[Path], dict[str, Any]]) -> None:
    """Make a cache entry at `folder`, or raise OSError and leave nothing behind.

    `fill` writes `<field>.npy`, `starts.npy` and `returns.npy` into the folder it is given and
    returns the entry's `name` and `info`.
    """
    with told(folder.parent, WRITABLE):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(
            prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True
        )
    remedy = "free some space or set OFFRL_HOME to another disk; nothing was left behind"
    with temporary, told(folder, remedy):
        new, old = Path(temporary.name, "new"), Path(temporary.name, "old")
        new.mkdir()
        meta = fill(new)
        meta["fields"] = sorted({path.stem for path in new.glob("*.npy")} - {"starts", "returns"})
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
        if folder.exists():
            os.replace(folder, old)  # whole until it is gone, for those who read it
        os.replace(new, folder)


def stream(place: Path, chunks: Iterable[Arrays], rows: int, label: str | None = None) -> list[str]:
    """Write chunks of rows one after the other into `<name>.npy` in `place`, and name these.

    Plain writes raise OSError on a full disk: a mapped file would end the process, and np.save may
    lose the last 4 kB without an error.

    Args:
        rows: of all chunks together.
        label: of a progress bar; None for no bar.
    """
    with ExitStack() as stack:
        bar = tqdm(total=rows, desc=label, unit="step", unit_scale=True, disable=label is None)
        stack.enter_context(bar)
        files: dict[str, Any] = {}
        for chunk in chunks:
            for name, array in chunk.items():
                if name not in files:
                    files[name] = stack.enter_context((place / f"{name}.npy").open("wb"))
                    head = {"descr": array.dtype.str, "fortran_order": False}
                    head["shape"] = (rows, *array.shape[1:])
                    np.lib.format.write_array_header_2_0(files[name], head)
                files[name].write(np.ascontiguousarray(array).data)
            bar.update(len(array))
    return list(files)


def store(path: Path, array: np.ndarray) -> None:
    """Write one .npy file as `stream` does."""
    stream(path.parent, [{path.stem: array}], len(array))


def store_episodes(place: Path, starts: Tensor, reward: Tensor) -> Tensor:
    """Write `starts.npy` (E,) and `returns.npy` of rewards (N,); the returns, float64 (E,)."""
    returns = episode_sums(reward, starts)
    store(place / "starts.npy", starts.numpy())
    store(place / "returns.npy", returns.numpy())
    return returns


def read(folder: Path) -> Dataset:
    """Open a cache entry, whose arrays stay on the disk; raises DataError if it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        load = lambda name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))  # noqa: E731
        fields = {name: load(name) for name in meta["fields"]}
        return Dataset(fields, load("starts"), load("returns"), meta["name"], meta["info"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(unusable(folder, error)) from error


def unusable(folder: Path, error: Exception) -> str:
    """What is said of a cache entry that could not be read."""
    remedy = "move it away and it is made anew"
    return f"the cache entry {folder} {refusal(error) or f'is damaged ({error}); {remedy}'}"


def home() -> Path:
    """The data cache: $OFFRL_HOME, else ~/.cache/offrl."""
    return Path(os.environ.get("OFFRL_HOME") or Path.home() / ".cache" / "offrl")
