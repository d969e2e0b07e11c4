"""The imports of every test worker. Workers are forked from a process that has imported this file (distributed.py)."""

from __future__ import annotations

import importlib
import os

# The libraries read these variables when they are imported.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

# Imported by name, because a linter removes import statements that nothing uses.
for module in ("dqt_dist.checkpoint.store", "dqt_dist.training.step"):
    importlib.import_module(module)

# Set before any computation, because threads do not survive a fork.
torch.set_num_threads(1)
