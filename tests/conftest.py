"""One torch thread: with two, small products wait at barriers for a busy neighbor."""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
torch.set_num_threads(1)
