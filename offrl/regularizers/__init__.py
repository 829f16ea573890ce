"""Regularizers for any trainer: torch only, nothing else of this library is imported."""

from offrl.regularizers import functional
from offrl.regularizers.base import Compose, RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import DualVariable, Schedule

__all__ = [
    "Compose",
    "DualVariable",
    "RegInputs",
    "RegOutput",
    "Regularizer",
    "Schedule",
    "functional",
]
