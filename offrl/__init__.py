"""Offline and classical deep reinforcement learning in PyTorch, one readable file per method."""

__version__ = "0.1.0"
