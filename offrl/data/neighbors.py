"""Exact nearest neighbor of (data state, any action) among all rows of a data set, for PRDC.

    j(i, pi) = argmin_j beta^2 |s_i - s_j|^2 + |pi - a_j|^2, ties to the lowest row

The query's state is data row i, so the state part of every distance is fixed before training. For
each row the K nearest rows in state space are stored with their squared distances, and with
`reach`: no row outside the list is closer than that. The best cost c of the list is the optimum of
all rows if c < beta^2 reach, whatever the action and beta. Other queries are searched in full:

- By float32 products with all rows: the 8 groups of 32 rows with the smallest values are compared
  in float64. No B x N matrix is held.
- On a CPU also by a KD-tree over [beta s, a], where that takes less time when such a number of
  queries is first met; products serve many far queries best.

Either returns some rows and a lower bound of the costs of all others, with room for rounding, and
is proven as the lists are. What stays open, such as rows with many exact copies, is compared with
all rows in float64. The lists are made by the same two searches, in state space.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from offrl.data.dataset import once, store, unusable, write
from offrl.data.table import take
from offrl.errors import DataError
from offrl.nets.kernels.opaque import opaque

VERSION = 1  # of the stored lists
GROUP = 32  # rows whose smallest float32 value decides whether they are compared in float64
GROUPS = 8  # of these per query of the full search by products
NEAREST = 4  # rows per query of the full search by the tree
SCORES = {"cpu": 1 << 19, "cuda": 1 << 24}  # float32 scores held at a time: caches of each kind
RADIUS = 1.0  # state distance where the tree ends a list; costs below beta^2 RADIUS^2 need no more

Found = tuple[Tensor, Tensor]  # rows (n, C) int64; floor (n,): all other rows cost at least that
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StateNeighbors:
    """Lists of state neighbors and the rows themselves.

    N (12 K + 8) bytes of lists (200 MB for a million rows and K = 16; mapped from the cache on a
    CPU) and 4 N (o + 2 a + 2) of rows; a tree takes 16 N (o + a) more.

    Attributes:
        act: (N, a) float32.
        keys: (N up to a multiple of 32, o + a + 2) float32 rows [s, a, |s|^2, |a|^2].
        rows: (N, K) int32, the list of every row, nearest first; a row is in its own list unless
            more than K rows share its state.
        square: (N, K) float64, squared state distances of the lists, ascending.
        reach: (N,) float64, a lower bound of the squared state distance of all rows outside.
        budget: queries per seed and batch that are searched in full, by products, so that an
            update can be captured in a graph; open queries beyond it are not exact. None, as
            `build` leaves it, for as many as needed, but the host waits for their number.
        trees: over [beta s, a], of the values of beta met so far; on a CPU only.
        finders: the full search of each beta and each power of two of queries met so far.
    """

    act: Tensor
    keys: Tensor
    rows: Tensor
    square: Tensor
    reach: Tensor
    budget: int | None = None
    trees: "dict[float, Tree]" = field(default_factory=dict, repr=False)
    finders: dict[tuple[float, int], Callable[..., Found]] = field(default_factory=dict, repr=False)

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

        Raises DataError for states or actions that are not finite float32, or a damaged cache
        entry, OSError if the cache cannot be written.
        """
        device = torch.device(device)
        obs, act = obs_std.to(device).contiguous(), act.to(device).contiguous()
        if obs.dtype != torch.float32 or act.dtype != torch.float32 or len(obs) != len(act):
            raise DataError(
                "the neighbor search takes float32 states and actions of equal length, got "
                f"{obs.dtype} {tuple(obs.shape)} and {act.dtype} {tuple(act.shape)}"
            )
        if not (obs.isfinite().all() and act.isfinite().all()):
            raise DataError("the neighbor search met NaN or infinity in the states or actions")
        what = (obs, min(k, len(obs)), progress)
        made = state_lists(*what) if cache is None else cached_lists(*what, digest, cache)
        rows, square, reach = (value.to(device) for value in made)
        return cls(act, make_keys(obs, act), rows, square, reach)

    @property
    def obs(self) -> Tensor:
        """(N, o) float32 standardized states."""
        return self.keys[: len(self.act), : self.keys.shape[-1] - self.act.shape[-1] - 2]

    @torch.no_grad()
    def nearest(self, index: Tensor, pi: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Nearest row of every query, int64 (*S, B), and shares of the queries of each seed, (*S,).

        The shares are `uncertified`, which the lists could not decide, `self_match`, whose row is
        their own, and with a `budget` `overflow`, undecided ones beyond it: they get the best row
        of their list.

        Args:
            index: (*S, B) int64, the data rows whose states are the queries'.
            pi: (*S, B, a) actions; NaN counts as 0.
            beta: weight of the state distance, at least 0.
        """
        names = ("uncertified", "self_match", "overflow")[: 2 if self.budget is None else 3]

        def find(index: Tensor, pi: Tensor) -> tuple[Tensor, ...]:
            row, *shares = self.find(index.reshape(-1, index.shape[-1]), pi, beta)
            return row.view(index.shape), *(share.view(index.shape[:-1]) for share in shares)

        looks = self.budget is None  # at values: how many queries stay open
        row, *shares = opaque(find, index, pi) if looks else find(index, pi)
        return row, dict(zip(names, shares, strict=True))

    def find(self, query: Tensor, pi: Tensor, beta: float) -> tuple[Tensor, ...]:
        """`nearest` for query (S, B): row, and the shares in the order of their names."""
        pi = pi.nan_to_num().reshape(*query.shape, -1)
        listed = take(self.rows, query).long()  # (S, B, K)
        cost = (pi.unsqueeze(-2).double() - take(self.act, listed)).square().sum(-1)
        row, least = lowest(cost + beta**2 * take(self.square, query), listed)  # (S, B)
        gap = beta**2 * take(self.reach, query) - least  # positive: certified
        overflow = []
        if self.budget is None:
            hard = (gap <= 0).nonzero(as_tuple=True)
            if len(hard[0]):
                row[hard] = self.search(query[hard], pi[hard], beta, least[hard])
        else:
            worst, at = gap.topk(min(self.budget, gap.shape[-1]), largest=False)  # (S, budget)
            i, p = query.gather(-1, at), pi.take_along_dim(at.unsqueeze(-1), -2)
            near = self.products(i.flatten(), p.flatten(0, 1), beta)
            found, proven = self.best(i, p, beta, *near)
            settled = proven & (worst <= 0)
            row.scatter_(-1, at, torch.where(settled, found, row.gather(-1, at)))
            overflow = [((gap <= 0).sum(-1) - settled.sum(-1)) / gap.shape[-1]]
        return row, (gap <= 0).float().mean(-1), (row == query).float().mean(-1), *overflow

    def search(self, index: Tensor, pi: Tensor, beta: float, least: Tensor) -> Tensor:
        """Full search: index (n,), pi (n, a), a cost within reach (n,) -> (n,) int64."""
        kind = beta, len(index).bit_length()
        if kind not in self.finders:
            self.finders[kind] = self.finder(index, pi, beta, least)
        row, proven = self.best(index, pi, beta, *self.finders[kind](index, pi, least))
        rest = (~proven).nonzero()[:, 0]
        if len(rest):
            row[rest] = brute_force(self.obs, self.act, index[rest], pi[rest], beta)
        return row

    def finder(self, index: Tensor, pi: Tensor, beta: float, least: Tensor) -> Callable[..., Found]:
        """Products; on a CPU a tree if that takes less time for these queries."""

        def by_products(index: Tensor, pi: Tensor, least: Tensor) -> Found:
            return self.products(index, pi, beta)

        def by_tree(index: Tensor, pi: Tensor, least: Tensor) -> Found:
            points = torch.cat([beta * self.obs[index].double(), pi], -1)
            return self.trees[beta].find(points, NEAREST, float(least.max()))

        if self.act.is_cuda:
            return by_products
        if beta not in self.trees:
            self.trees[beta] = Tree(torch.cat([beta * self.obs.double(), self.act], -1))
        ways = {"products": by_products, "tree": by_tree}
        name = fastest(ways, index, pi, least)
        log.info("about %d neighbors that the lists leave open are found by %s", len(index), name)
        return ways[name]

    def products(self, index: Tensor, pi: Tensor, beta: float) -> Found:
        """Rows (n, 256) that may be nearest to index (n,), pi (n, a), and the floor of the rest."""
        return candidates(self.keys, self.obs[index], pi, beta, GROUPS)

    def best(self, index: Tensor, pi: Tensor, beta: float, near: Tensor, floor: Tensor) -> Found:
        """The best of the rows `near` (n, C) in float64 and whether it is proven, (*index)."""
        obs, pi = self.obs[index.flatten()].double(), pi.flatten(0, -2).double()
        point = take(self.keys, near)  # (n, C, o + a + 2)
        split = obs.shape[-1]
        cost = (pi.unsqueeze(-2) - point[..., split:-2]).square().sum(-1)
        cost += beta**2 * (obs.unsqueeze(-2) - point[..., :split]).square().sum(-1)
        row, least = lowest(cost, near)
        return row.view_as(index), (least < floor).view_as(index)


def lowest(cost: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Row of the smallest cost and that cost, (..., C) -> (...); equal costs: the lowest row."""
    least = cost.amin(-1, keepdim=True)
    row = rows.masked_fill(cost != least, torch.iinfo(torch.int64).max).amin(-1)
    return row, least.squeeze(-1)


def brute_force(obs: Tensor, act: Tensor, index: Tensor, pi: Tensor, beta: float) -> Tensor:
    """The definition: float64 costs of every row. index (n,), pi (n, a) -> (n,) int64."""
    least = torch.full((len(index),), torch.inf, dtype=torch.float64, device=obs.device)
    best = torch.zeros_like(index)
    columns = [(obs[index, c], obs[:, c], beta**2) for c in range(obs.shape[-1])]
    columns += [(pi[:, c], act[:, c], 1.0) for c in range(act.shape[-1])]
    tile = max(64, SCORES[obs.device.type] // 4 // max(1, len(index)))
    for start in range(0, len(obs), tile):
        cost = torch.zeros_like(least).unsqueeze(-1)
        for query, data, weight in columns:
            apart = data[start : start + tile].double() - query.double().unsqueeze(-1)  # (n, tile)
            cost = torch.addcmul(cost, apart, apart, value=weight)
        row, value = lowest(cost, torch.arange(start, start + cost.shape[-1], device=obs.device))
        best = torch.where(value < least, row, best)  # strict: an earlier tile wins a tie
        least = torch.minimum(value, least)
    return best


# --- the full searches ---------------------------------------------------------------------------


class Tree:
    """KD-tree for queries near its points (N, d), float64.

    The points are turned to their principal axes, where few coordinates separate most of them, and
    stored leaf by leaf, which is kind to caches: two to four times faster than the plain tree.
    """

    def __init__(self, points: Tensor):
        from scipy.spatial import cKDTree  # half a second that a policy does without

        x = points.numpy()
        centered = x - x.mean(0)
        self.axes = np.linalg.eigh(centered.T @ centered)[1][:, ::-1]
        # of a turned point; the turning errs by less than d^1.5 2^-53 |x|
        self.error = 1e-12 * float(np.linalg.norm(x, axis=1).max())
        turned = x @ self.axes
        order = cKDTree(turned, leafsize=64, balanced_tree=False).indices
        self.order = torch.from_numpy(order.astype(np.int64))
        self.tree = cKDTree(turned[order], leafsize=64, balanced_tree=False)

    def find(self, points: Tensor, k: int, square: float = np.inf) -> Found:
        """The k nearest rows of points (n, d) within a squared distance, and the floor of the rest.

        Where there are fewer, some other row takes their places.
        """
        bound = square**0.5 * (1 + 1e-9) + 2 * self.error
        how = {"distance_upper_bound": bound, "workers": torch.get_num_threads()}
        distance, at = self.tree.query(points.numpy() @ self.axes, range(1, k + 1), **how)
        near = self.order[torch.from_numpy(at).clamp_(max=len(self.order) - 1)]
        outside = torch.from_numpy(distance[:, -1]).clamp(max=bound) - self.error
        return near, outside.clamp(min=0).square() * (1 - 1e-9)


def make_keys(obs: Tensor, act: Tensor) -> Tensor:
    """Rows [s, a, |s|^2, |a|^2]: a cost less the query's own norm is a product with such a row.

    Padded to a multiple of GROUP with far rows of infinite norm, which are nearest to nothing.
    """
    norms = [value.double().square().sum(-1, keepdim=True).float() for value in (obs, act)]
    keys = torch.cat([obs, act, *norms], -1)
    padding = torch.full((-len(obs) % GROUP, keys.shape[-1]), 1e15, device=obs.device)
    padding[:, -1] = torch.inf
    return torch.cat([keys, padding])


def candidates(keys: Tensor, obs: Tensor, pi: Tensor, beta: float, groups: int) -> Found:
    """Rows that may be nearest to obs (n, o) and pi (n, a), and the floor of the rest.

    Found by float32 products with all rows; so many groups of GROUP rows of the `keys`.
    """
    n, device = len(obs), obs.device
    ones = torch.ones(n, 1, device=device)
    query = torch.cat([-2 * beta**2 * obs, -2 * pi, beta**2 * ones, ones], -1)
    values = torch.empty(n, len(keys) // GROUP, device=device)
    tile = max(1, SCORES[device.type] // GROUP // max(1, n)) * GROUP
    buffer = torch.empty(n * min(tile, len(keys)), device=device)
    with ExitStack() as stack:  # products in float32, whatever the run allows elsewhere
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        for start in range(0, len(keys), tile):
            block = keys[start : start + tile]
            scores = torch.mm(query, block.T, out=buffer[: n * len(block)].view(n, len(block)))
            part = values[:, start // GROUP : (start + len(block)) // GROUP]
            torch.amin(scores.view(n, -1, GROUP), -1, out=part)
    groups = min(groups, values.shape[-1])
    value, group = values.topk(groups, largest=False)
    rows = (group.unsqueeze(-1) * GROUP + torch.arange(GROUP, device=device)).flatten(-2)
    if groups == values.shape[-1]:
        return rows, torch.full((n,), torch.inf, dtype=torch.float64, device=device)
    # A row of exact cost c has |key| <= |query| + sqrt(c), so its float32 value errs by at most
    # (columns + 4) 2^-24 (2 |query| + sqrt(c))^2 (Higham, Accuracy and Stability of Numerical
    # Algorithms, section 3.1; the 2 below is room). All other rows have at least the last value.
    norm = beta**2 * obs.double().square().sum(-1) + pi.double().square().sum(-1)
    bound = (value[:, -1].double() + norm).clamp(min=0)
    error = 2 * (keys.shape[-1] + 4) * 2.0**-24 * (2 * norm.sqrt() + bound.sqrt()).square()
    return rows, bound - error


def fastest(ways: dict[str, Callable[..., Found]], *sample: Tensor) -> str:
    """Name of the way that takes the least time for a sample; the answers are the same."""
    seconds: dict[str, float] = {}
    for name, way in [*ways.items()] * 3:  # the first round loads caches and threads
        before = time.perf_counter()
        way(*sample)
        seconds[name] = min(time.perf_counter() - before, seconds.get(name, math.inf))
    return min(seconds, key=lambda name: seconds[name])


# --- the lists -----------------------------------------------------------------------------------

Lists = tuple[Tensor, Tensor, Tensor]  # rows, square and reach of StateNeighbors


def cached_lists(obs: Tensor, k: int, progress: bool, digest: str, cache: Path) -> Lists:
    """Lists from the cache, made on first use; nothing is left there if that is interrupted."""
    states = hashlib.sha256(obs.cpu().numpy().data).hexdigest()
    folder = cache / "neighbors" / f"{digest[:16]}-{states[:16]}-{obs.device.type}-k{k}-v{VERSION}"
    shapes = {"rows": (len(obs), k), "square": (len(obs), k), "reach": (len(obs),)}

    def fill(place: Path) -> dict[str, Any]:
        for name, value in zip(shapes, state_lists(obs, k, progress), strict=True):
            store(place / f"{name}.npy", value.cpu().numpy())
        return {"digest": digest, "states": states, "rows": len(obs), "k": k}

    once(folder, folder.exists, lambda: write(folder, fill))
    try:
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="c") for name in shapes]
        if [array.shape for array in arrays] != list(shapes.values()):
            raise ValueError("wrong shape")
        if arrays[0].min() < 0 or arrays[0].max() >= len(obs):
            raise ValueError("rows outside the data")
    except (OSError, ValueError) as error:
        raise DataError(unusable(folder, error)) from error
    rows, square, reach = map(torch.from_numpy, arrays)
    return rows, square, reach


def state_lists(obs: Tensor, k: int, progress: bool) -> Lists:
    """The k nearest states of every state (N, o): the lists of `StateNeighbors`."""
    size, device, none = len(obs), obs.device, obs[:, :0]
    keys = make_keys(obs, none)
    order = torch.arange(size, device=device)
    find = lambda own: candidates(keys, obs[own], none[own], 1.0, k)  # noqa: E731
    if device.type == "cpu":
        tree = Tree(obs.double())
        find = lambda own: tree.find(obs[own].double(), k, RADIUS**2)  # noqa: E731
        order = tree.order  # rows side by side find their leaves in the cache
    rows = torch.empty(size, k, dtype=torch.int32, device=device)
    square = torch.empty(size, k, dtype=torch.float64, device=device)
    reach = torch.empty(size, dtype=torch.float64, device=device)
    with tqdm(total=size, desc="state neighbors", unit="row", disable=not progress) as bar:
        for own in order.split(256 if device.type == "cpu" else 4096):
            near, floor = find(own)
            apart = obs[own].unsqueeze(1).double() - take(keys, near)[..., :-2]
            square[own], at = apart.square().sum(-1).topk(k, largest=False)
            rows[own] = near.gather(-1, at).int()
            reach[own] = torch.minimum(square[own, -1] * (1 - 1e-9), floor).clamp(min=0)
            bar.update(len(own))
    return rows, square, reach
