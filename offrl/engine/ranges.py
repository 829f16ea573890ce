"""Types of settings that carry their range: `discount: Share = 0.99`.

To a type checker they are int and float. The configuration refuses a value out of range before
anything is made.
"""

import math
import sys
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """low <= value <= high.

    Args:
        words: how messages and the help say it, after "must be".
        strict: the ends themselves are out of range.
    """

    words: str
    low: float
    high: float = math.inf
    strict: bool = False

    def __contains__(self, value: float) -> bool:
        ends = self.strict and value in (self.low, self.high)
        return self.low <= value <= self.high and not ends


Count = Annotated[int, Range("at least 1", 1)]
Several = Annotated[int, Range("at least 2", 2)]
Whole = Annotated[int, Range("at least 0", 0)]
Positive = Annotated[float, Range("above 0 and finite", 0, strict=True)]
NonNegative = Annotated[float, Range("at least 0 and finite", 0, sys.float_info.max)]
Bound = Annotated[float, Range("at least 0", 0)]  # inf: no bound
Share = Annotated[float, Range("in [0, 1]", 0, 1)]
Between = Annotated[float, Range("above 0 and below 1", 0, 1, strict=True)]
Real = Annotated[float, Range("finite", -math.inf, strict=True)]
