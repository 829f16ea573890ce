"""Exact nearest neighbor of (data state, any action) among all rows of a data set, for PRDC.

    j(i, pi) = argmin_j beta^2 |s_i - s_j|^2 + |pi - a_j|^2, ties to the lowest row

The query's state is data row i, so the state part of every distance is fixed before training. For
each row the K nearest rows in state space are stored with their squared distances, and with
`reach`: no row outside the list is closer than that. The best cost c of the list is the optimum of
all rows if c < beta^2 reach, whatever the action and beta. Other rows are searched in full:

- The full search (`scan`) takes matrix products in float32, keeps the 8 groups of 32 rows with the
  smallest values, and computes their costs again in float64. Its answer is proven if it beats the
  largest value that float32 rounding could have hidden outside those groups.
- What remains, such as hundreds of exact copies of a row, is compared in float64 row by row.

Lists come from a KD-tree or from `scan`, whichever is faster on a sample of the data: the tree
prunes well on narrow data and not at all on wide ones. Either gives the same neighbors in the end.
"""

import hashlib
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor
from tqdm import tqdm

from offrl.data.dataset import DataError, write

VERSION = 1  # of the stored lists
GROUP = 32  # rows whose smallest float32 value decides whether they are compared in float64
KEPT = 8  # groups compared in float64 per query
MARGIN = 1 - 1e-9  # float64 rounding of squared distances, with room
SCORES = {"cpu": 1 << 19, "cuda": 1 << 24}  # float32 scores held at a time: caches of each kind
SAMPLED = 20_000  # rows from which on both ways of making lists are timed first


@dataclass(frozen=True)
class StateNeighbors:
    """Lists of state neighbors and the rows themselves.

    Memory at N rows: 12 N K bytes of lists (192 MB for a million rows and K = 16; memory-mapped on
    a CPU) and 4 N (o + 2 a + 2) of rows.

    Attributes:
        act: (N, a) float32.
        keys: (N up to a multiple of 32, o + a + 2) float32 rows [s, a, |s|^2, |a|^2].
        rows: (N, K) int32, the list of every row, nearest first; a row is in its own list unless
            more than K rows share its state.
        square: (N, K) float64, squared state distances of the lists, ascending.
        reach: (N,) float64, a lower bound of the squared state distance of all rows outside.
        budget: rows per seed and batch that are searched in full; None for as many as needed,
            which reads the device's answer and cannot be captured in a graph.
    """

    act: Tensor
    keys: Tensor
    rows: Tensor
    square: Tensor
    reach: Tensor
    budget: int | None = None

    @classmethod
    def build(
        cls,
        obs_std: Tensor,
        act: Tensor,
        digest: str,
        k: int = 16,
        cache: Path | None = None,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> "StateNeighbors":
        """Make the lists or read them from the cache.

        Args:
            obs_std: (N, o) float32 standardized states.
            act: (N, a) float32.
            digest: of the data set; with the states themselves and k it names the cache entry.
            k: length of the lists; changes the speed, never the answer.
            cache: lists are kept in `cache/neighbors/`; None keeps them in memory only.
            progress: shows a bar over the blocks of rows.

        Raises:
            DataError: for states or actions that are not finite float32, or a damaged cache entry.
            OSError: if the cache cannot be written.
        """
        device = torch.device(device)
        obs, act = obs_std.to(device).contiguous(), act.to(device).contiguous()
        if obs.dtype != torch.float32 or act.dtype != torch.float32 or len(obs) != len(act):
            raise DataError(
                f"the neighbor search takes float32 states and actions of equal length, got "
                f"{obs.dtype} {tuple(obs.shape)} and {act.dtype} {tuple(act.shape)}"
            )
        if not (obs.isfinite().all() and act.isfinite().all()):
            raise DataError("the neighbor search found NaN or infinity in states or actions")
        k = min(k, len(obs))
        if cache is None:
            lists = state_lists(obs, k, progress)
        else:
            lists = cached_lists(obs, k, digest, Path(cache), progress)
        rows, square, reach = (value.to(device) for value in lists)
        budget = 64 if device.type == "cuda" else None
        return cls(act, make_keys(obs, act), rows, square, reach, budget)

    @property
    def obs(self) -> Tensor:
        """(N, o) float32 standardized states."""
        return self.keys[: len(self.act), : self.keys.shape[-1] - self.act.shape[-1] - 2]

    @torch.no_grad()
    def nearest(self, index: Tensor, pi: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Nearest row of every query.

        Args:
            index: (*S, B) int64, the data rows whose states are the queries'.
            pi: (*S, B, a) actions; NaN counts as 0.
            beta: weight of the state distance, at least 0.

        Returns:
            row: (*S, B) int64.
            info: shares per seed, (*S,): `uncertified`, rows that the lists could not decide, and
                `self_match`, rows that are their own neighbor. With a `budget` also `overflow`,
                rows beyond it: theirs is the best row of the list, which may not be the nearest.
        """
        query, pi = index.reshape(-1, index.shape[-1]), pi.nan_to_num()  # (S, B)
        pi = pi.reshape(*query.shape, -1)
        listed = self.rows[query].long()  # (S, B, K)
        cost = (pi.unsqueeze(-2).double() - self.act[listed]).square().sum(-1)
        row, least = lowest(cost + beta**2 * self.square[query], listed)  # (S, B)
        gap = beta**2 * self.reach[query] - least  # positive: certified
        info = {"uncertified": share(gap <= 0)}
        if self.budget is None:
            hard = (gap <= 0).nonzero(as_tuple=True)
            if len(hard[0]):
                row[hard] = self.search(query[hard], pi[hard], beta)
        else:
            worst, at = gap.topk(min(self.budget, gap.shape[-1]), largest=False)  # (S, budget)
            chosen, chosen_pi = query.gather(-1, at), pi.take_along_dim(at.unsqueeze(-1), -2)
            found, proven = self.scan(chosen.flatten(), chosen_pi.flatten(0, 1), beta)
            settled = proven.view_as(at) & (worst <= 0)
            old = row.gather(-1, at)
            row.scatter_(-1, at, torch.where(settled, found.view_as(at), old))
            overflow = (gap <= 0).sum(-1) - settled.sum(-1)
            info["overflow"] = overflow.float() / gap.shape[-1]
        info["self_match"] = share(row == query)
        lead = index.shape[:-1]
        return row.view(index.shape), {name: value.view(lead) for name, value in info.items()}

    def search(self, index: Tensor, pi: Tensor, beta: float) -> Tensor:
        """Nearest rows by the full search: index (n,), pi (n, a) -> (n,) int64."""
        row, proven = self.scan(index, pi, beta)
        rest = (~proven).nonzero()[:, 0]
        if len(rest):
            row[rest] = brute_force(self.obs, self.act, index[rest], pi[rest], beta)
        return row

    def scan(self, index: Tensor, pi: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Nearest rows without host synchronization: index (n,), pi (n, a).

        Returns:
            row: (n,) int64.
            proven: (n,) bool; False where float32 rounding leaves the answer open.
        """
        obs = self.obs[index]
        near, floor = candidates(self.keys, len(self.act), obs, pi, beta, KEPT)  # (n, C), (n,)
        point = self.keys[near]  # (n, C, o + a + 2)
        o, a = obs.shape[-1], pi.shape[-1]
        cost = (pi.unsqueeze(-2).double() - point[..., o : o + a]).square().sum(-1)
        cost += beta**2 * (obs.unsqueeze(-2).double() - point[..., :o]).square().sum(-1)
        row, least = lowest(cost, near)
        return row, least < floor


def lowest(cost: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Row of the smallest cost and that cost, (..., C) -> (...); equal costs: the lowest row."""
    least = cost.amin(-1, keepdim=True)
    row = torch.where(cost == least, rows, torch.iinfo(torch.int64).max).amin(-1)
    return row, least.squeeze(-1)


def share(flags: Tensor) -> Tensor:
    return flags.float().mean(-1)


def brute_force(obs: Tensor, act: Tensor, index: Tensor, pi: Tensor, beta: float) -> Tensor:
    """The definition: float64 costs against every row, lowest row on ties.

    Args:
        obs, act: (N, o) and (N, a) data.
        index, pi: (n,) int64 and (n, a) queries.

    Returns:
        (n,) int64.
    """
    least = torch.full((len(index),), torch.inf, dtype=torch.float64, device=obs.device)
    best = torch.zeros_like(index)
    tile = max(64, SCORES[obs.device.type] // 4 // max(1, len(index)))
    columns = [(obs[index, c], obs[:, c], beta**2) for c in range(obs.shape[-1])]
    columns += [(pi[:, c], act[:, c], 1.0) for c in range(act.shape[-1])]
    for start in range(0, len(obs), tile):
        cost = torch.zeros(1, dtype=torch.float64, device=obs.device)
        for query, data, weight in columns:
            part = data[start : start + tile].double() - query.double().unsqueeze(-1)  # (n, tile)
            cost = torch.addcmul(cost, part, part, value=weight)
        row, value = lowest(cost, torch.arange(start, start + cost.shape[-1], device=obs.device))
        best = torch.where(value < least, row, best)  # strict: an earlier tile wins a tie
        least = torch.minimum(value, least)
    return best


# --- the full search -----------------------------------------------------------------------------


def make_keys(obs: Tensor, act: Tensor) -> Tensor:
    """Rows [s, a, |s|^2, |a|^2] such that a cost less the query's own norm is one product.

    Padded with rows of infinite cost to a multiple of GROUP.
    """
    norms = [value.double().square().sum(-1, keepdim=True).float() for value in (obs, act)]
    keys = torch.cat([obs, act, *norms], -1)
    padding = torch.zeros(-len(obs) % GROUP, keys.shape[-1], device=obs.device)
    padding[:, -1] = torch.inf
    return torch.cat([keys, padding])


def candidates(
    keys: Tensor, size: int, obs: Tensor, pi: Tensor, beta: float, kept: int
) -> tuple[Tensor, Tensor]:
    """Rows that may be nearest, by float32 products over all rows.

    Args:
        keys: (padded N, o + a + 2) from `make_keys`; size: N.
        obs, pi: (n, o) and (n, a) queries.
        kept: groups of GROUP rows to return per query.

    Returns:
        rows: (n, kept * GROUP) int64; padding repeats the last row.
        floor: (n,) float64, lower bound of the exact cost of every row not returned.
    """
    n, width = len(obs), keys.shape[-1]
    ones = torch.ones(n, 1, device=obs.device)
    query = torch.cat([-2 * beta**2 * obs, -2 * pi, beta**2 * ones, ones], -1)
    values = torch.empty(n, len(keys) // GROUP, device=obs.device)
    tile = max(1, SCORES[obs.device.type] // GROUP // max(1, n)) * GROUP
    buffer = torch.empty(n * min(tile, len(keys)), device=obs.device)
    with full_precision():
        for start in range(0, len(keys), tile):
            block = keys[start : start + tile]
            scores = buffer[: n * len(block)].view(n, len(block))
            torch.mm(query, block.T, out=scores)
            part = values[:, start // GROUP : (start + len(block)) // GROUP]
            torch.amin(scores.view(n, -1, GROUP), -1, out=part)
    kept = min(kept, values.shape[-1])
    value, group = values.topk(kept, largest=False)
    rows = (group.unsqueeze(-1) * GROUP + torch.arange(GROUP, device=obs.device)).flatten(-2)
    rows = rows.clamp(max=size - 1)
    if kept == values.shape[-1]:
        return rows, torch.full((n,), torch.inf, dtype=torch.float64, device=obs.device)
    # A row of exact cost c has |key| <= |query| + sqrt(c), so its float32 value is off by at most
    # (width + 4) 2^-24 (2 |query| + sqrt(c))^2 (Higham, Accuracy and Stability, section 3.1; the
    # factor 2 below is room). All rows not returned have values of at least the last one kept.
    norm = beta**2 * obs.double().square().sum(-1) + pi.double().square().sum(-1)
    bound = (value[:, -1].double() + norm).clamp(min=0)
    error = 2 * (width + 4) * 2.0**-24 * (2 * norm.sqrt() + bound.sqrt()).square()
    return rows, bound - error


@contextmanager
def full_precision():
    """Float32 products in float32, whatever the run allows elsewhere (TF32, bfloat16)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- the lists -----------------------------------------------------------------------------------

Lists = tuple[Tensor, Tensor, Tensor]  # rows, square, reach


def cached_lists(obs: Tensor, k: int, digest: str, cache: Path, progress: bool) -> Lists:
    """Lists from the cache, made on first use; nothing is left there if that is interrupted.

    Raises:
        DataError: if the entry is damaged.
    """
    states = hashlib.sha256(obs.cpu().numpy().data).hexdigest()
    folder = cache / "neighbors" / f"{digest[:16]}-{states[:16]}-k{k}-v{VERSION}"

    def fill(place: Path) -> dict[str, Any]:
        lists = state_lists(obs, k, progress)
        for name, value in zip(("rows", "square", "reach"), lists, strict=True):
            np.save(place / f"{name}.npy", value.cpu().numpy())
        return {"digest": digest, "states": states, "rows": len(obs), "k": k}

    if not folder.exists():
        write(folder, fill)
    shapes = {"rows": (len(obs), k), "square": (len(obs), k), "reach": (len(obs),)}
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in shapes}
        if any(arrays[name].shape != shape for name, shape in shapes.items()):
            raise ValueError("wrong shape")
        if arrays["rows"].min() < 0 or arrays["rows"].max() >= len(obs):
            raise ValueError("rows outside the data")
    except (OSError, ValueError) as error:
        raise DataError(f"the cache entry {folder} is damaged ({error}); delete it") from error
    rows, square, reach = (torch.from_numpy(arrays[name]) for name in shapes)
    return rows, square, reach


def state_lists(obs: Tensor, k: int, progress: bool) -> Lists:
    """The k nearest states of every state, by the faster of two ways on these data.

    Args:
        obs: (N, o) float32.

    Returns:
        rows (N, k) int32, square (N, k) float64 and reach (N,) float64 of `StateNeighbors`.
    """
    size = len(obs)
    order, ways = torch.arange(size, device=obs.device), {"products": by_products(obs, k)}
    if obs.device.type == "cpu":
        points = obs.numpy().astype(np.float64)
        # rows in the order of a tree's leaves lie together, which halves the time of a query
        order = torch.from_numpy(cKDTree(points, balanced_tree=False).indices.copy())
        ways["tree"] = by_tree(points[order.numpy()], order, k)
    rows = torch.empty(size, k, dtype=torch.int32, device=obs.device)
    square = torch.empty(size, k, dtype=torch.float64, device=obs.device)
    reach = torch.empty(size, dtype=torch.float64, device=obs.device)
    name = fastest(ways, order) if len(ways) > 1 and size >= SAMPLED else next(iter(ways))
    block = 1024
    with tqdm(total=size, desc=f"state neighbors by {name}", unit="row", disable=not progress,
              unit_scale=True) as bar:  # fmt: skip
        for start in range(0, size, block):
            own = order[start : start + block]
            near, floor = ways[name](own, start)
            rows[own], square[own], reach[own] = nearest_of(obs, own, near, floor, k)
            bar.update(len(own))
    return rows, square, reach


def by_tree(points, order: Tensor, k: int):
    """Candidates from a KD-tree over `points`, which are the rows in `order`."""
    tree = cKDTree(points, balanced_tree=False)

    def find(own: Tensor, start: int) -> tuple[Tensor, Tensor]:
        distance, at = tree.query(points[start : start + len(own)], k=range(1, k + 1), workers=-1)
        return order[torch.from_numpy(at)], torch.from_numpy(distance[:, -1]).square()

    return find


def by_products(obs: Tensor, k: int):
    """Candidates from float32 products with all rows."""
    nothing = obs[:, :0]
    keys = make_keys(obs, nothing)

    def find(own: Tensor, start: int) -> tuple[Tensor, Tensor]:
        return candidates(keys, len(obs), obs[own], nothing[own], 1.0, k)

    return find


def nearest_of(obs: Tensor, own: Tensor, near: Tensor, floor: Tensor, k: int) -> Lists:
    """The k nearest of the candidates `near` (n, C) of rows `own` (n,), in float64.

    Returns:
        rows (n, k) and square (n, k), ordered by distance, then row; reach (n,).
    """
    near = near.sort(-1).values
    square = (obs[own].unsqueeze(1).double() - obs[near]).square().sum(-1)
    repeated = torch.zeros_like(near, dtype=torch.bool)
    repeated[:, 1:] = near[:, 1:] == near[:, :-1]
    square, at = square.masked_fill(repeated, torch.inf).sort(dim=-1, stable=True)
    rows, square = near.gather(-1, at)[:, :k], square[:, :k]
    return rows.int(), square, torch.minimum(square[:, -1], floor).clamp(min=0) * MARGIN


def fastest(ways: dict, order: Tensor) -> str:
    """The way that answers a sample of rows sooner; both give exact answers later."""
    seconds = {}
    for name, find in ways.items():
        before = time.perf_counter()
        for start in (len(order) // 8, len(order) // 3, len(order) // 2, len(order) * 4 // 5):
            find(order[start : start + 128], start)
        seconds[name] = time.perf_counter() - before
    return min(seconds, key=lambda name: seconds[name])
