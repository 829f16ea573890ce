"""The tiled sweep behind `token_stats`, as an autograd function."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offrl.regularizers.tokens.token_sets import LogMass, SetEntropy, Statistic, TokenSet, members

RELATIVE = ("kl", "reverse_kl", "log1p_chi2", "tv")  # statistics that need a reference
TOP = 64  # largest logits kept of every tile; a row whose set reaches below them is made again
LEAST = -1e30  # stands for -inf, so that 0 * LEAST is 0


@dataclass(frozen=True)
class Head:
    """What makes logits: hidden @ weight.T + bias, or without `weight` the logits themselves.

    Attributes:
        hidden: (*L, H), or logits (*L, V).
        weight, bias: (V, H) and (V,), or None.
    """

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def vocab(self) -> int:
        return self.hidden.shape[-1] if self.weight is None else len(self.weight)


@dataclass(frozen=True)
class Plan:
    want: dict[str, Statistic]
    temperature: float
    logit_scale: float
    softcap: float | None
    chunk_tokens: int
    chunk_vocab: int
    dtype: torch.dtype

    def wants(self, *names: str) -> bool:
        return any(statistic in names for statistic in self.want.values())

    @property
    def sets(self) -> list[TokenSet]:
        found = [s.set for s in self.want.values() if not isinstance(s, str)]
        return list(dict.fromkeys(found))

    def tiles(self, vocab: int) -> Iterator[slice]:
        return chunks(vocab, self.chunk_vocab)

    def tile(self, head: Head, rows: slice | Tensor, cols: slice) -> Tensor:
        """A new tile of logits z (n, v) in the dtype of the sums."""
        if head.weight is None:
            z = head.hidden[rows, cols].to(self.dtype, copy=True)
        else:
            hidden = head.hidden[rows]
            z = product(hidden, head.weight[cols].to(hidden.dtype).T, self.dtype)
            if head.bias is not None:
                z += head.bias[cols]
        if self.logit_scale != 1:
            z *= self.logit_scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1:
            z /= self.temperature
        return z.clamp_(min=LEAST)

    def slope(self, z: Tensor) -> Tensor | float:
        """Derivative of a logit by the product it was made from."""
        factor = self.logit_scale / self.temperature
        if self.softcap is None:
            return factor
        return (1 - (z * (self.temperature / self.softcap)).square()) * factor


class TokenStatistics(torch.autograd.Function):
    """The forward sweep and the backward recomputation; see the table of the module."""

    @staticmethod
    def forward(ctx, plan, targets, hidden, weight, bias, ref_hidden, ref_weight, ref_bias):
        head = Head(hidden, weight, bias)
        reference = None if ref_hidden is None else Head(ref_hidden, ref_weight, ref_bias)
        blocks = list(chunks(len(hidden), plan.chunk_tokens)) or [slice(0, 0)]
        with torch.autocast(hidden.device.type, enabled=False):
            parts = [sweep(plan, head, reference, targets, rows) for rows in blocks]
        found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        ctx.plan, ctx.keys = plan, tuple(found)
        ctx.save_for_backward(
            targets, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *found.values()
        )
        ctx.set_materialize_grads(False)
        return tuple(found[key(statistic)].clone() for statistic in plan.want.values())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        plan = ctx.plan
        targets, hidden, weight, bias, *rest = ctx.saved_tensors
        head = Head(hidden, weight, bias)
        reference = None if rest[0] is None else Head(*rest[:3])
        rows = dict(zip(ctx.keys, rest[3:], strict=True))
        terms = [(s, g) for s, g in zip(plan.want.values(), grads, strict=True) if g is not None]
        with torch.autocast(hidden.device.type, enabled=False):
            found = pull(plan, head, reference, targets, rows, terms, ctx.needs_input_grad[2:5])
        return (None, None, *found, None, None, None)


def chunks(size: int, length: int) -> Iterator[slice]:
    return (slice(start, min(start + length, size)) for start in range(0, size, length))


def key(statistic: Any) -> str:
    return statistic if isinstance(statistic, str) else repr(statistic)


class Sum:
    """Running sum of e^z over tiles, shifted by the running max of z."""

    def __init__(self, like: Tensor):
        self.max = torch.full_like(like, LEAST)
        self.sum = torch.zeros_like(like)

    def add(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take in a tile; turns z into x = z - max and returns e^x, the shift, and its exponential.

        The shift is old max - new max.
        """
        largest = torch.maximum(self.max, z.amax(-1))
        shift = self.max - largest
        decay = shift.exp()
        e = z.sub_(largest.unsqueeze(-1)).exp()
        self.max, self.sum = largest, self.sum * decay + e.sum(-1)
        return e, shift, decay


def sweep(
    plan: Plan, head: Head, reference: Head | None, targets: Tensor | None, rows: slice
) -> dict[str, Tensor]:
    """All wanted statistics of some rows and what the backward pass needs of them, each (n,)."""
    zero = head.hidden.new_zeros(rows.stop - rows.start, dtype=plan.dtype)
    p, r, w = Sum(zero), Sum(zero), Sum(zero)  # of e^z, e^(z^r), e^(2 x - x^r)
    u, square, gap, reverse_gap = zero, zero, zero, zero
    lacks = exceeds = zero.bool()  # a token excluded by the reference, by the policy alone
    chosen = torch.full_like(zero, torch.nan)  # logit of the target
    tops = []
    for cols in plan.tiles(head.vocab):
        z = plan.tile(head, rows, cols)
        if targets is not None:
            index, inside = locate(targets[rows], cols)
            chosen = torch.where(inside, z.gather(1, index).squeeze(1), chosen)
        if plan.sets:
            tops.append(z.topk(min(TOP, z.shape[1])).values)
        z_ref = None if reference is None else plan.tile(reference, rows, cols)
        if z_ref is not None:
            none, ref_none = z <= LEAST, z_ref <= LEAST
            lacks = lacks | (ref_none > none).any(-1)
            exceeds = exceeds | (none > ref_none).any(-1)
        before = p.sum
        e, shift, decay = p.add(z)
        if plan.wants("log_sum_sq"):
            square = square * decay.square() + e.square().sum(-1)
        if z_ref is not None:
            ref_before = r.sum
            e_ref, ref_shift, ref_decay = r.add(z_ref)
            if plan.wants("log1p_chi2"):
                w.max = w.max + 2 * shift - ref_shift
                w.add(2 * z - z_ref)
            difference = torch.sub(z, z_ref, out=z_ref)
            slip = shift - ref_shift
            reverse_gap = ref_decay * (reverse_gap - ref_before * slip)
            reverse_gap = reverse_gap - e_ref.mul_(difference).sum(-1)
            gap = decay * (gap + before * slip) + difference.mul_(e).sum(-1)
        u = decay * (u + before * shift) + e.mul_(z).sum(-1)
    log_s = p.sum.log()
    found = {"max": p.max, "sum": p.sum, "entropy": log_s - u / p.sum, "lse": p.max + log_s}
    if targets is not None:
        found["logp"] = torch.where(chosen <= LEAST, -torch.inf, chosen - p.max - log_s)
    if plan.wants("log_sum_sq"):
        found |= {"square": square, "log_sum_sq": square.log() - 2 * log_s}
    if reference is not None:
        log_r = r.sum.log()
        kl, reverse = gap / p.sum - log_s + log_r, reverse_gap / r.sum - log_r + log_s
        found |= {"ref_max": r.max, "ref_sum": r.sum, "kl": kl.masked_fill(lacks, torch.inf)}
        found["reverse_kl"] = reverse.masked_fill(exceeds, torch.inf)
        if plan.wants("log1p_chi2"):
            chi2 = (w.max + w.sum.log() - 2 * log_s + log_r).masked_fill(lacks, torch.inf)
            found |= {"chi2_max": w.max, "chi2_sum": w.sum, "log1p_chi2": chi2}
        if plan.wants("tv"):
            found |= total_variation(plan, head, reference, rows, found)
    if plan.sets:
        index = torch.arange(rows.start, rows.stop, device=zero.device)
        for token_set in plan.sets:
            found |= restricted(plan, head, token_set, index, tops, p)
    return found


def locate(targets: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
    """Columns (n, 1) of the targets within a tile, and whether they lie in it (n,)."""
    index = targets - cols.start
    width = cols.stop - cols.start
    return index.clamp(0, width - 1).unsqueeze(1), (index >= 0) & (index < width)


def total_variation(
    plan: Plan, head: Head, reference: Head, rows: slice, found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """sum |p - r| / 2 and sum p sign(p - r)."""
    distance = balance = torch.zeros_like(found["sum"])
    for cols in plan.tiles(head.vocab):
        p = probabilities(plan.tile(head, rows, cols), found["max"], found["sum"])
        r = probabilities(plan.tile(reference, rows, cols), found["ref_max"], found["ref_sum"])
        distance = distance + (p - r).abs().sum(-1) / 2
        balance = balance + (p * (p - r).sign()).sum(-1)
    return {"tv": distance, "balance": balance}


def probabilities(z: Tensor, largest: Tensor, total: Tensor) -> Tensor:
    return z.sub_(largest.unsqueeze(-1)).exp_().div_(total.unsqueeze(-1))


def restricted(
    plan: Plan, head: Head, token_set: TokenSet, rows: Tensor, tops: list[Tensor], p: Sum
) -> dict[str, Tensor]:
    """A set's entropy and log mass, and its least logit and shifted sum for the backward pass."""
    threshold, total, moment = delimit(plan, head, token_set, rows, tops, TOP, p.max, p.sum)
    some = total > 0
    safe = torch.where(some, total, 1)
    entropy = torch.where(some, safe.log() - moment / safe, 0)
    return {
        key(SetEntropy(token_set)): entropy,
        key(LogMass(token_set)): total.log() - p.sum.log(),
        f"threshold of {token_set}": threshold,
        f"sum of {token_set}": safe,
    }


def delimit(
    plan: Plan,
    head: Head,
    token_set: TokenSet,
    rows: Tensor,
    tops: list[Tensor],
    kept: int,
    largest: Tensor,
    total: Tensor,
) -> Tensor:
    """The set as a threshold on the logits, from the `kept` largest logits of every tile.

    Returns:
        (3, n): a threshold halfway between the set and the rest, so that it holds for logits made
        again; and over the set sum e^x and sum e^x x, with x = z - largest.
    """
    vocab = list(plan.tiles(head.vocab))
    top = torch.cat(tops, 1).sort(-1, descending=True).values
    ends = [t[:, -1] for t, cols in zip(tops, vocab, strict=True) if cols.stop - cols.start > kept]
    # Logits that were not kept are at most `missing`, which is itself one of those kept.
    missing = torch.stack(ends).amax(0) if ends else torch.full_like(largest, -torch.inf)
    x = top - largest.unsqueeze(-1)
    e = x.exp()
    inside = members(token_set, top, x, e / total.unsqueeze(-1))
    last = torch.where(inside, top, torch.inf).amin(-1)
    rest = torch.where(inside, -torch.inf, top).amax(-1)
    middle = last / 2 + rest / 2
    threshold = torch.where(middle > rest, middle, last)
    e = torch.where(inside, e, 0)
    found = torch.stack([threshold, e.sum(-1), (e * x).sum(-1)])
    short = (rest < missing).nonzero().squeeze(1)
    kept *= 4
    rows_at_once = plan.chunk_tokens * plan.chunk_vocab // min(kept * len(vocab), head.vocab)
    for part in short.split(max(rows_at_once, 1)) if len(short) else ():
        tiles = (plan.tile(head, rows[part], cols) for cols in vocab)
        again = [z.topk(min(kept, z.shape[1])).values for z in tiles]
        found[:, part] = delimit(
            plan, head, token_set, rows[part], again, kept, largest[part], total[part]
        )
    return found


def pull(
    plan: Plan,
    head: Head,
    reference: Head | None,
    targets: Tensor | None,
    rows: dict[str, Tensor],
    terms: list[tuple[Statistic, Tensor]],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden (or logits), weight and bias, from those of the statistics."""
    hidden, weight, bias = head.hidden, head.weight, head.bias
    to_hidden = torch.zeros_like(hidden, dtype=None if weight is None else plan.dtype)
    to_weight = torch.empty_like(weight) if weight is not None and needs[1] else None
    to_bias = torch.empty_like(bias) if bias is not None and needs[2] else None
    blocks = list(chunks(len(hidden), plan.chunk_tokens))
    recipes = [
        Recipe({k: v[b] for k, v in rows.items()}, [(s, g[b].to(plan.dtype)) for s, g in terms])
        for b in blocks
    ]
    for cols in plan.tiles(head.vocab):
        width = cols.stop - cols.start
        if to_weight is not None:
            weight_part = to_hidden.new_zeros(width, hidden.shape[1])
        if to_bias is not None:
            bias_part = to_hidden.new_zeros(width)
        for block, recipe in zip(blocks, recipes, strict=True):
            z = plan.tile(head, block, cols)
            slope = plan.slope(z)
            z_ref = None if reference is None else plan.tile(reference, block, cols)
            g = recipe.gradient(z, z_ref)
            if recipe.chosen is not None:
                assert targets is not None
                index, inside = locate(targets[block], cols)
                g.scatter_add_(1, index, torch.where(inside, recipe.chosen, 0).unsqueeze(1))
            if isinstance(slope, Tensor) or slope != 1:
                g *= slope
            if weight is None:
                to_hidden[block, cols] = g.to(to_hidden.dtype)
                continue
            if to_bias is not None:
                bias_part += g.sum(0)
            g = g.to(hidden.dtype)
            if needs[0]:
                add_product(to_hidden[block], g, weight[cols].to(hidden.dtype))
            if to_weight is not None:
                add_product(weight_part, g.T, hidden[block])
        if to_weight is not None:
            to_weight[cols] = weight_part
        if to_bias is not None:
            to_bias[cols] = bias_part
    return (to_hidden.to(hidden.dtype) if needs[0] else None), to_weight, to_bias


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, rounded to `dtype` alone: half precision would cost entropies a hundredth."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += product(a, b, total.dtype)


class Recipe:
    """The gradient of some rows' statistics with respect to their logits, tile by tile.

    With x = z - max and e = e^x it is e (constant + slope x + square e) plus terms of the sets and
    of the reference; all factors are (n, 1).
    """

    def __init__(self, rows: dict[str, Tensor], terms: list[tuple[Statistic, Tensor]]):
        self.rows = {name: value.unsqueeze(-1) for name, value in rows.items()}
        s = self.rows["sum"]
        log_s = s.log()
        self.constant, self.slope = torch.zeros_like(s), torch.zeros_like(s)
        self.chosen: Tensor | None = None  # (n,), of the target alone
        self.square: Tensor | None = None
        self.sets: dict[TokenSet, tuple[Tensor, Tensor]] = {}  # constant and slope within a set
        self.relative: dict[str, Tensor] = {}
        for statistic, gradient in terms:
            g = gradient.unsqueeze(-1)
            if statistic == "logp":
                self.chosen = gradient if self.chosen is None else self.chosen + gradient
                self.constant = self.constant - g / s
            elif statistic == "entropy":
                self.constant = self.constant - g * (self.rows["entropy"] - log_s) / s
                self.slope = self.slope - g / s
            elif statistic == "lse":
                self.constant = self.constant + g / s
            elif statistic == "log_sum_sq":
                self.constant = self.constant - 2 * g / s
                self.square = (0 if self.square is None else self.square) + 2 * g / self.rows[
                    "square"
                ]
            elif isinstance(statistic, str):
                g = torch.where(self.rows[statistic].isinf(), 0, g)
                self.relative[statistic] = self.relative.get(statistic, 0) + g
            else:
                self.add_set(statistic, g)

    def add_set(self, statistic: SetEntropy | LogMass, g: Tensor) -> None:
        s, s_set = self.rows["sum"], self.rows[f"sum of {statistic.set}"]
        constant, slope = self.sets.get(statistic.set, (torch.zeros_like(s), torch.zeros_like(s)))
        if isinstance(statistic, SetEntropy):
            entropy = self.rows[key(statistic)]
            constant = constant - g * (entropy - s_set.log()) / s_set
            slope = slope - g / s_set
        else:
            g = torch.where(self.rows[key(statistic)].isinf(), 0, g)
            constant = constant + g / s_set
            self.constant = self.constant - g / s
        self.sets[statistic.set] = constant, slope

    def gradient(self, z: Tensor, z_ref: Tensor | None) -> Tensor:
        """(n, v), given tiles of logits, which it overwrites."""
        rows = self.rows
        thresholds = {s: (z >= rows[f"threshold of {s}"]).to(z.dtype) for s in self.sets}
        x = z.sub_(rows["max"])
        e = x.exp()
        factor = torch.addcmul(self.constant, x, self.slope)
        if self.square is not None:
            factor += self.square * e
        for token_set, (constant, slope) in self.sets.items():
            factor.addcmul_(thresholds[token_set], torch.addcmul(constant, x, slope))
        if not self.relative:
            return factor.mul_(e)
        assert z_ref is not None
        x_ref = z_ref.sub_(rows["ref_max"])
        s, s_ref = rows["sum"], rows["ref_sum"]
        r = x_ref.exp().div_(s_ref)
        extra = torch.zeros_like(factor)
        if (g := self.relative.get("kl")) is not None:
            mean = torch.where(rows["kl"].isinf(), 0, rows["kl"])
            factor += (x - x_ref + (s_ref / s).log() - mean) * (g / s)
        if (g := self.relative.get("reverse_kl")) is not None:
            factor += g / s
            extra -= g * r
        if (g := self.relative.get("log1p_chi2")) is not None:
            factor -= 2 * g / s
            extra += (2 * x - x_ref - rows["chi2_max"]).exp() * (2 * g / rows["chi2_sum"])
        if (g := self.relative.get("tv")) is not None:
            factor += ((e / s - r).sign() - rows["balance"]) * (g / (2 * s))
        return factor.mul_(e).add_(extra)
