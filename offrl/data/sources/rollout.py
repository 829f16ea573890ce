"""Transitions from policies in parallel processes, the same for any number of them.

The rows are split into chunks of a fixed size. A chunk has its own seed, a fresh environment and
its policy, and is played by one process on one thread; nothing passes from one chunk to the next.
Its last episode is cut, with timeout = 1.
"""

import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gymnasium
import numpy as np
import torch
from torch import Tensor

from offrl.data.dataset import FIELDS, Arrays, bounds, store_episodes, stream
from offrl.engine.method import Now, Policy
from offrl.envs.vector import sizes
from offrl.errors import DataError
from offrl.seeding import derive, generator
from offrl.system import cores

CHUNK = 10_000  # steps; ten full episodes of a MuJoCo robot, about a second of work
Made = TypeVar("Made")


@dataclass(frozen=True)
class Uniform:
    """Uniformly random actions, in [-1, 1] or of `act_dim` discrete ones."""

    act_dim: int
    discrete: bool = False

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        count, stream = len(now["obs"]), now["generator"]
        if self.discrete:
            return torch.randint(self.act_dim, (count,), generator=stream), memory
        return torch.rand(count, self.act_dim, generator=stream) * 2 - 1, memory


@dataclass(frozen=True)
class Share:
    """`rows` steps of one policy; its name and the roll-out's seed decide every random draw."""

    name: str
    policy: Policy
    rows: int
    explore: bool = True  # sample actions as in training


def roll_out(
    shares: Sequence[Share],
    make_env: Callable[[], gymnasium.Env],
    place: Path,
    seed: int = 0,
    workers: int = 0,
    label: str = "rolling out",
) -> dict[str, Any]:
    """Play the shares one after the other; for `offrl.data.dataset.write`, which gives a `place`.

    Args:
        make_env: picklable maker of an environment with actions in [-1, 1].
        workers: processes; 0 for one per core. The rows do not depend on it.
        label: of the progress bar.

    Returns what was found: episodes; cut_episodes, which their chunk's end cut short; mean_return
    of the others, None if there are none. Raises DataError if no rows are asked for, or a process
    died, and what a policy or an environment raises as it is.
    """
    total, jobs = sum(share.rows for share in shares), []
    if total < 1:
        raise DataError(f"rows must be at least 1, got {total}")
    for share in shares:
        packed = pickle.dumps((make_env, share.policy, share.explore))
        for number, first in enumerate(range(0, share.rows, CHUNK)):
            chunk_seed = derive(seed, "rollout", share.name, number)
            jobs.append((packed, min(CHUNK, share.rows - first), chunk_seed))
    cut = []

    def chunks() -> Iterator[Arrays]:
        for chunk, was_cut in in_processes(play, jobs, workers):
            cut.append(was_cut)
            yield chunk

    stream(place, chunks(), total, label)
    written = lambda name: torch.from_numpy(np.load(place / f"{name}.npy"))  # noqa: E731
    ends = (written("terminal") + written("timeout")) > 0
    starts = bounds(ends)
    returns = store_episodes(place, starts, written("reward"))
    last = torch.tensor([rows for _, rows, _ in jobs]).cumsum(0) - 1  # rows that end a chunk
    whole = torch.ones(len(starts), dtype=torch.bool)
    whole[ends.cumsum(0)[last] - 1] = ~torch.tensor(cut)
    return {
        "episodes": len(starts),
        "cut_episodes": int((~whole).sum()),
        "mean_return": float(returns[whole].mean()) if whole.any() else None,
    }


@torch.inference_mode()
def play(packed: bytes, rows: int, seed: int) -> tuple[Arrays, bool]:
    """One chunk: arrays by field, and whether the last episode was cut by its end.

    They are float32, but for the int64 numbers of discrete actions.
    """
    make_env, policy, explore = pickle.loads(packed)
    env = make_env()
    how = {"scenario": torch.zeros(1).long(), "explore": explore}
    how["generator"] = generator(seed, "policy")
    read = lambda raw: torch.as_tensor(raw, dtype=torch.float32).view(1, -1)  # noqa: E731
    obs = read(env.reset(seed=derive(seed, "environment"))[0])
    widths: dict[str, tuple[int, ...]] = dict.fromkeys(("obs", "next_obs"), (obs.shape[-1],))
    _, act_dim, discrete = sizes(env)
    widths["act"] = () if discrete else (act_dim,)
    kinds = {"act": np.int64} if discrete else {}
    out = {
        name: np.zeros((rows, *widths.get(name, ())), kinds.get(name, np.float32))
        for name in FIELDS
    }
    begin, later = torch.ones(1), torch.zeros(1)
    memory, start, gained = None, begin, later
    for row in range(rows):
        act, memory = policy.act({"obs": obs, "start": start, "reward": gained} | how, memory)
        action = act[0].numpy()
        raw, reward, terminated, truncated, _ = env.step(action.reshape(env.action_space.shape))
        next_obs = read(raw)
        found = (obs[0], action, reward, next_obs[0], terminated, truncated and not terminated)
        for name, value in zip(FIELDS, found, strict=True):
            out[name][row] = value
        obs, start, gained = next_obs, later, torch.tensor([float(reward)])
        if terminated or truncated:
            obs, start, gained = read(env.reset()[0]), begin, later
    env.close()
    cut = start is later
    if cut:
        out["timeout"][-1] = 1
    return out, cut


def in_processes(
    function: Callable[..., Made], jobs: Iterable[tuple[Any, ...]], workers: int = 0
) -> Iterator[Made]:
    """function(*job) for every job in order, in processes of one torch thread each.

    Raises DataError if a process died.
    """
    jobs = list(jobs)
    limit, context = min(workers or cores(), len(jobs)), multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(limit, mp_context=context, initializer=set_up)
    try:
        yield from pool.map(function, *zip(*jobs, strict=True))
    except BrokenProcessPool as error:
        raise DataError(
            "a process that plays the policies died: out of memory, killed, or started from a "
            "script that calls the library outside `if __name__ == '__main__':`; "
            "nothing was stored"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def set_up() -> None:
    """One thread; the parent decides when to stop, and its death is a reason too."""

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def borders(weights: Sequence[float], rows: int) -> list[int]:
    """Whole numbers in proportion to the weights that sum to `rows`."""
    total = sum(weights)
    edges = [round(rows * part / total) for part in itertools.accumulate(weights, initial=0)]
    return [b - a for a, b in itertools.pairwise(edges)]
