"""Regularizers for any trainer: torch only, nothing else of this library is imported."""

from offrl.regularizers import functional
from offrl.regularizers.base import Compose, RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import DualVariable, Schedule
from offrl.regularizers.entropy import (
    EntropyAnchor,
    EntropyBand,
    EntropyBonus,
    PeakEntropyMask,
    TemperatureController,
)
from offrl.regularizers.kl import DADS, EMAAnchor, GeometricMixture, KLReward, KLToReference
from offrl.regularizers.occupancy import Chi2Occupancy, OccupancyReward
from offrl.regularizers.preference import INPO, LDDPO, RPO, SPO, GenARM, NLLAnchor, XPOTerm
from offrl.regularizers.rank import FeatureRank
from offrl.regularizers.selective import ClipCov, KLCov, LowProbability
from offrl.regularizers.softq import InverseSoftQ

__all__ = [
    "DADS",
    "INPO",
    "LDDPO",
    "RPO",
    "SPO",
    "Chi2Occupancy",
    "ClipCov",
    "Compose",
    "DualVariable",
    "EMAAnchor",
    "EntropyAnchor",
    "EntropyBand",
    "EntropyBonus",
    "FeatureRank",
    "GenARM",
    "GeometricMixture",
    "InverseSoftQ",
    "KLCov",
    "KLReward",
    "KLToReference",
    "LowProbability",
    "NLLAnchor",
    "OccupancyReward",
    "PeakEntropyMask",
    "RegInputs",
    "RegOutput",
    "Regularizer",
    "Schedule",
    "TemperatureController",
    "XPOTerm",
    "functional",
]
