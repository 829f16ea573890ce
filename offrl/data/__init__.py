"""Data sets, replays and samplers."""

from offrl.data.dataset import Dataset
from offrl.data.replay import Replay
from offrl.data.samplers import prepare, transitions
from offrl.errors import DataError

__all__ = ["DataError", "Dataset", "Replay", "prepare", "transitions"]
