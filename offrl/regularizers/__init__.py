"""Regularizers for any trainer: torch only, nothing else of this library is imported."""

from offrl.regularizers import functional
from offrl.regularizers.base import Compose, RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import DualVariable, Schedule
from offrl.regularizers.constraints import ConstrainedRewards, LagrangianPenalty
from offrl.regularizers.control import AdvantageGatedClone
from offrl.regularizers.lipschitz import LipschitzPenalty, SpectralClip
from offrl.regularizers.occupancy import Chi2Occupancy, OccupancyReward
from offrl.regularizers.rank import FeatureRank
from offrl.regularizers.self_evolution import ProgressiveTarget
from offrl.regularizers.tokens.advantage import EMPG, IGPO, STCR
from offrl.regularizers.tokens.entropy import (
    EntropyAnchor,
    EntropyBand,
    EntropyBonus,
    PeakEntropyMask,
    TemperatureController,
)
from offrl.regularizers.tokens.kl import DADS, EMAAnchor, GeometricMixture, KLReward, KLToReference
from offrl.regularizers.tokens.length import LengthShaper, PromptHistory
from offrl.regularizers.tokens.length_objectives import DLER, DRPO
from offrl.regularizers.tokens.preference import INPO, LDDPO, RPO, SPO, GenARM, NLLAnchor, XPOTerm
from offrl.regularizers.tokens.selective import ClipCov, KLCov, LowProbability
from offrl.regularizers.tokens.softq import InverseSoftQ

__all__ = [
    "DADS",
    "DLER",
    "DRPO",
    "EMPG",
    "IGPO",
    "INPO",
    "LDDPO",
    "RPO",
    "SPO",
    "STCR",
    "AdvantageGatedClone",
    "Chi2Occupancy",
    "ClipCov",
    "Compose",
    "ConstrainedRewards",
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
    "LagrangianPenalty",
    "LengthShaper",
    "LipschitzPenalty",
    "LowProbability",
    "NLLAnchor",
    "OccupancyReward",
    "PeakEntropyMask",
    "ProgressiveTarget",
    "PromptHistory",
    "RegInputs",
    "RegOutput",
    "Regularizer",
    "Schedule",
    "SpectralClip",
    "TemperatureController",
    "XPOTerm",
    "functional",
]
