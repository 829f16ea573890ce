"""Numbers that change while training: multipliers that answer a constraint, and schedules.

Everything that changes is a buffer, so `state_dict`, `.to` and `deepcopy` carry it; nothing is a
parameter, so data-parallel wrappers find nothing to synchronize.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Link = Literal["identity", "exp", "softplus", "sigmoid", "tanh"]
Rule = Literal["sgd", "adam", "additive", "proportional", "factor"]


class DualVariable(nn.Module):
    """A multiplier that grows while its constraint is violated: value = link(raw).

    `update(violation)` takes a 0-d tensor; positive asks for more weight.

    Args:
        init: the first value (after the link).
        link: identity, exp (temperatures), softplus or sigmoid or tanh (mixing weights).
        rule: how `raw` answers a violation v:
            sgd           momentum <- momentum_decay momentum + clip(v); raw += lr momentum
            adam          Adam ascent with rate lr and betas 0.9, 0.999 (SAC's temperature)
            additive      raw += delta if v >= 0 else -delta (adaptive entropy of Skywork and TRL)
            proportional  raw *= 1 + clip(v, +-clip) scale: Ziegler's KL controller, with
                          v = KL / target - 1 and scale = samples / horizon
            factor        raw *= factor if v > 0 else 1 / factor
        lr: rate of sgd and adam.
        momentum: decay of sgd.
        clip: bound of |v| for sgd and proportional; None for none.
        delta, scale, factor: of the rules above.
        bounds: least and largest value, kept after the link.
        gate: True makes the value 0 until and unless the last violation was >= 0 (TRL's adaptive
            entropy applies its coefficient only when the last entropy lay at or below the target).

    Raises:
        ValueError: `init` outside the link's range or the bounds.
    """

    raw: Tensor
    momentum: Tensor
    second: Tensor
    step: Tensor
    applied: Tensor

    def __init__(
        self,
        init: float = 0.0,
        link: Link = "identity",
        rule: Rule = "sgd",
        lr: float = 0.01,
        momentum: float = 0.0,
        clip: float | None = None,
        delta: float = 0.005,
        scale: float = 1.0,
        factor: float = 2.0,
        bounds: tuple[float, float] = (-math.inf, math.inf),
        gate: bool = False,
    ):
        super().__init__()
        if not bounds[0] <= init <= bounds[1]:
            raise ValueError(f"init must lie in {bounds}, got {init}")
        self.link, self.rule, self.lr, self.decay, self.clip = link, rule, lr, momentum, clip
        self.delta, self.scale, self.factor = delta, scale, factor
        self.bounds, self.gate = bounds, gate
        for name, value in (("raw", unlink(init, link)), ("momentum", 0.0), ("second", 0.0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))
        self.register_buffer("step", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("applied", torch.tensor(0.0 if gate else 1.0))

    @property
    def value(self) -> Tensor:
        """0-d float32, detached."""
        linked = {
            "identity": lambda raw: raw,
            "exp": torch.exp,
            "softplus": F.softplus,
            "sigmoid": torch.sigmoid,
            "tanh": torch.tanh,
        }[self.link](self.raw)
        return linked.clamp(*self.bounds) * self.applied

    @torch.no_grad()
    def update(self, violation: Tensor) -> None:
        """Answer a violation once; not finite ones are ignored."""
        if not self.training:
            return
        finite = torch.isfinite(violation)
        v = torch.where(finite, violation, 0.0).to(self.raw)
        if self.gate:
            self.applied.copy_(torch.where(finite, (v >= 0).to(self.applied), self.applied))
        bounded = v if self.clip is None else v.clamp(-self.clip, self.clip)
        self.step += finite.to(self.step)
        if self.rule == "sgd":
            self.momentum.copy_(
                torch.where(finite, self.decay * self.momentum + bounded, self.momentum)
            )
            raw = self.raw + self.lr * self.momentum
        elif self.rule == "adam":
            self.momentum.copy_(torch.where(finite, self.momentum.lerp(v, 0.1), self.momentum))
            self.second.copy_(torch.where(finite, self.second.lerp(v * v, 0.001), self.second))
            first = self.momentum / (1 - 0.9 ** self.step.clamp(min=1))
            second = self.second / (1 - 0.999 ** self.step.clamp(min=1))
            raw = self.raw + self.lr * first / (second.sqrt() + 1e-8)
        elif self.rule == "additive":
            raw = self.raw + torch.where(v >= 0, self.delta, -self.delta)
        elif self.rule == "proportional":
            raw = self.raw * (1 + bounded * self.scale)
        else:
            raw = self.raw * torch.where(v > 0, self.factor, 1 / self.factor)
        low, high = (unlink(b, self.link, limit=True) for b in self.bounds)
        self.raw.copy_(torch.where(finite, raw.clamp(low, high), self.raw))


def unlink(value: float, link: Link, limit: bool = False) -> float:
    """The raw number behind a value; with `limit`, ends of the link's range become infinite."""
    low, high = {
        "exp": (0, math.inf),
        "softplus": (0, math.inf),
        "sigmoid": (0, 1),
        "tanh": (-1, 1),
    }.get(link, (-math.inf, math.inf))
    if link == "identity":
        return value
    if not low < value < high:
        if limit:
            return -math.inf if value <= low else math.inf
        raise ValueError(f"a value through {link} lies strictly between {low} and {high}: {value}")
    if link == "exp":
        return math.log(value)
    if link == "softplus":
        return value + math.log(-math.expm1(-value))
    return math.log(value / (1 - value)) if link == "sigmoid" else math.atanh(value)


class Schedule(nn.Module):
    """A coefficient that follows the count of optimizer steps.

    Args:
        kind: constant; linear or cosine from `start` to `end` within `steps`, then `end`;
            exponential: start factor^floor(step / steps), not below `end`;
            two-phase: EPO's weight of its smoothing term, with k = step up to `steps` = 2 h:
            start (1 - 0.2 (1 - e^(-2 k / h))) for k <= h, then 0.8 start e^(-3 (k - h) / h):
            1 -> 0.827, a jump to 0.8, -> 0.040. The numbers are those of the released code, whose
            comment states 0.8 and 0 instead; the paper's formula is not checked.
        factor: of exponential.
    """

    step: Tensor

    def __init__(
        self,
        kind: Literal["constant", "linear", "cosine", "exponential", "two-phase"],
        start: float,
        end: float = 0.0,
        steps: int = 1,
        factor: float = 0.5,
    ):
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.kind, self.start, self.end, self.steps, self.factor = kind, start, end, steps, factor
        self.register_buffer("step", torch.tensor(0, dtype=torch.int64))

    @property
    def value(self) -> Tensor:
        """0-d float32."""
        now = (self.step.float() / self.steps).clamp(max=1)
        if self.kind == "constant":
            return torch.full_like(now, self.start)
        if self.kind == "linear":
            return self.start + (self.end - self.start) * now
        if self.kind == "cosine":
            return self.end + (self.start - self.end) * (1 + torch.cos(math.pi * now)) / 2
        if self.kind == "two-phase":
            early = 1 - 0.2 * (1 - torch.exp(-4 * now))
            return self.start * torch.where(now <= 0.5, early, 0.8 * torch.exp(3 - 6 * now))
        return (self.start * self.factor ** (self.step // self.steps)).float().clamp(min=self.end)

    @torch.no_grad()
    def update(self, violation: Tensor | None = None) -> None:
        """Count one optimizer step; a violation is accepted and not looked at."""
        if self.training:
            self.step += 1


Coefficient = float | DualVariable | Schedule


def needs_target(coefficient: Coefficient, target: float | None) -> float:
    """The target, NaN if there is none; a `DualVariable` cannot do without.

    Raises:
        ValueError: if it has to.
    """
    if isinstance(coefficient, DualVariable) and target is None:
        raise ValueError("an adaptive coefficient needs target=")
    return math.nan if target is None else target


def value_of(coefficient: Coefficient) -> Tensor | float:
    """The number now, whatever kind of coefficient it is."""
    return coefficient if isinstance(coefficient, (int, float)) else coefficient.value
