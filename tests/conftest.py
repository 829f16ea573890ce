"""One torch thread: with two, small products wait at barriers for a busy neighbor.

OFFRL_NEEDS=trl,ogbench names modules without which tests fail instead of being skipped.
"""

import importlib
import os

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
torch.set_num_threads(1)

needed = os.environ.get("OFFRL_NEEDS", "").split(",")
skipping = pytest.importorskip


def import_or_skip(name, *args, **kwargs):
    if name.partition(".")[0] in needed:
        return importlib.import_module(name)
    return skipping(name, *args, **kwargs)


pytest.importorskip = import_or_skip
