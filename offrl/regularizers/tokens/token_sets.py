"""Sets of candidate tokens, and the statistics that look at one set only."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MinP:
    """Tokens of probability at least `share` in (0, 1] of the largest; never empty."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {self.share}")


@dataclass(frozen=True)
class Threshold:
    """Tokens of probability at least `probability` in (0, 1); empty when there are none."""

    probability: float

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise ValueError(f"probability must lie in (0, 1), got {self.probability}")


@dataclass(frozen=True)
class Nucleus:
    """The most probable tokens up to `mass` in (0, 1); tokens of equal logits enter together.

    Attributes:
        include_crossing: True keeps the tokens above which lies less than `mass`, so that the one
            that crosses it belongs to the set, which is never empty. False keeps those down to
            which lies at most `mass`: the set is empty where one token holds more.
    """

    mass: float
    include_crossing: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.mass < 1:
            raise ValueError(f"mass must lie in (0, 1), got {self.mass}")


TokenSet = MinP | Threshold | Nucleus


@dataclass(frozen=True)
class SetEntropy:
    """Entropy in nats of the distribution restricted to a set; 0 for one token and for none."""

    set: TokenSet


@dataclass(frozen=True)
class LogMass:
    """Log of the probability of a set: 0 for all tokens, -inf (without gradient) for none."""

    set: TokenSet


Statistic = str | SetEntropy | LogMass


def members(token_set: TokenSet, top: Tensor, x: Tensor, p: Tensor) -> Tensor:
    """Which of the sorted logits `top` (n, k) belong to the set; p are their probabilities."""
    if isinstance(token_set, MinP):
        return x >= math.log(token_set.share)
    if isinstance(token_set, Threshold):
        return p >= token_set.probability
    mass = p.cumsum(-1)
    if token_set.include_crossing:
        first = mass - p < token_set.mass
        return top >= torch.where(first, top, torch.inf).amin(-1, keepdim=True)
    beyond = mass > token_set.mass
    return top > torch.where(beyond, top, -torch.inf).amax(-1, keepdim=True)
