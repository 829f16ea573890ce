"""Offline and classical deep reinforcement learning in PyTorch, one readable file per method."""

import importlib
from typing import Any

__version__ = "0.1.0"

PUBLIC = {  # name -> its module, loaded on first use
    "Dataset": "offrl.data.build",
    "Policy": "offrl.runs.policy",
    "evaluate": "offrl.runs.api",
    "load_policy": "offrl.runs.policy",
    "train": "offrl.runs.api",
}
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'offrl' has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
