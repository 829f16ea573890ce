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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import gymnasium
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from offrl.data.dataset import FIELDS, DataError, bounds, episode_sums, store
from offrl.engine.method import Now, Policy
from offrl.seeding import derive, generator
from offrl.system import cores

CHUNK = 10_000  # steps; ten full episodes of a MuJoCo robot, about a second of work
Made = TypeVar("Made")


class Uniform:
    """Uniformly random actions in [-1, 1]."""

    def __init__(self, act_dim: int):
        self.act_dim = act_dim

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        return torch.rand(len(now["obs"]), self.act_dim, generator=now["generator"]) * 2 - 1, memory


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
    """Play the shares one after the other and write their rows as a cache entry's arrays.

    Meant for `offrl.data.dataset.write`, which makes the entry appear whole or not at all.

    Args:
        shares: policies with their numbers of rows.
        make_env: picklable maker of an environment with actions in [-1, 1].
        place: folder that receives `<field>.npy`, `starts.npy`, `returns.npy`.
        workers: processes; 0 for one per core. The rows do not depend on it.
        label: of the progress bar.

    Returns:
        What was found: episodes; cut_episodes, which their chunk's end cut short; mean_return of
        the others, None if there are none.

    Raises:
        DataError: no rows are asked for, or a process died. An error of a policy or an
            environment is raised as it is.
        OSError: if the disk is full.
    """
    total, jobs = sum(share.rows for share in shares), []
    if total < 1:
        raise DataError(f"rows must be at least 1, got {total}")
    for share in shares:
        packed = pickle.dumps((make_env, share.policy, share.explore))
        for number, first in enumerate(range(0, share.rows, CHUNK)):
            chunk_seed = derive(seed, "rollout", share.name, number)
            jobs.append((packed, min(CHUNK, share.rows - first), chunk_seed))
    rewards, ends, cut = [], [], []
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        bar = stack.enter_context(
            tqdm(total=total, desc=label, unit="step", unit_scale=True, dynamic_ncols=True)
        )
        for chunk, was_cut in in_processes(play, jobs, workers):
            for name, array in chunk.items():
                if name not in files:
                    files[name] = stack.enter_context(open(place / f"{name}.npy", "wb"))
                    start_array(files[name], (total, *array.shape[1:]))
                files[name].write(array.data)
            rewards.append(chunk["reward"])
            ends.append((chunk["terminal"] + chunk["timeout"]) > 0)
            cut.append((was_cut, int(ends[-1].sum())))
            bar.update(len(chunk["reward"]))
    starts = bounds(torch.from_numpy(np.concatenate(ends)))
    returns = episode_sums(torch.from_numpy(np.concatenate(rewards)), starts)
    store(place / "starts.npy", starts.numpy())
    store(place / "returns.npy", returns.float().numpy())
    whole = torch.ones(len(starts), dtype=torch.bool)
    last = torch.tensor([count for _, count in cut]).cumsum(0) - 1
    whole[last] = ~torch.tensor([was_cut for was_cut, _ in cut])
    return {
        "episodes": len(starts),
        "cut_episodes": int((~whole).sum()),
        "mean_return": float(returns[whole].mean()) if whole.any() else None,
    }


def start_array(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """The head of a float32 .npy file; plain writes tell of a full disk, a mapped file crashes."""
    head = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, head)


@torch.inference_mode()
def play(packed: bytes, rows: int, seed: int) -> tuple[dict[str, np.ndarray], bool]:
    """One chunk: float32 arrays by field, and whether the last episode was cut by its end."""
    make_env, policy, explore = pickle.loads(packed)
    env = make_env()
    stream = generator(seed, "policy")
    raw, _ = env.reset(seed=derive(seed, "environment"))
    obs = torch.as_tensor(raw, dtype=torch.float32).view(1, -1)
    obs_dim, act_dim = obs.shape[-1], int(np.prod(env.action_space.shape))
    widths = {"obs": (obs_dim,), "act": (act_dim,), "next_obs": (obs_dim,)}
    out = {name: np.zeros((rows, *widths.get(name, ())), np.float32) for name in FIELDS}
    begin, later = torch.ones(1), torch.zeros(1)
    memory, start, reward = None, begin, 0.0
    for row in range(rows):
        now = {"obs": obs, "start": start, "reward": torch.full((1,), float(reward))}
        act, memory = policy.act(now | {"explore": explore, "generator": stream}, memory)
        action = act.view(-1).numpy()
        raw, reward, terminated, truncated, _ = env.step(action.reshape(env.action_space.shape))
        next_obs = torch.as_tensor(raw, dtype=torch.float32).view(1, -1)
        out["obs"][row], out["act"][row], out["next_obs"][row] = obs[0], action, next_obs[0]
        out["reward"][row], out["terminal"][row] = reward, terminated
        out["timeout"][row] = truncated and not terminated
        obs, start = next_obs, later
        if terminated or truncated:
            obs = torch.as_tensor(env.reset()[0], dtype=torch.float32).view(1, -1)
            start, reward = begin, 0.0
    env.close()
    cut = start is later
    if cut:
        out["timeout"][-1] = 1
    return out, cut


def in_processes(
    function: Callable[..., Made], jobs: Iterable[tuple[Any, ...]], workers: int = 0
) -> Iterator[Made]:
    """function(*job) for every job in order, in processes of one torch thread each.

    Raises:
        DataError: if a process died.
    """
    jobs = list(jobs)
    limit = min(workers or cores(), len(jobs))
    context = multiprocessing.get_context("spawn")
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def borders(weights: Sequence[float], rows: int) -> list[int]:
    """Whole numbers in proportion to the weights that sum to `rows`."""
    total = sum(weights)
    edges = [round(rows * part / total) for part in itertools.accumulate(weights, initial=0)]
    return [b - a for a, b in itertools.pairwise(edges)]
