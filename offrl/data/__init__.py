"""Data sets, replays and samplers."""

from offrl.data.dataset import DataError, Dataset
from offrl.data.replay import Replay
from offrl.data.samplers import prepare, transitions

__all__ = ["DataError", "Dataset", "Replay", "prepare", "transitions"]
