"""What every test worker imports, imported once: workers are forked from a process that has done it (distributed.py)."""

from __future__ import annotations

import importlib
import os

# Read when they are imported.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

# By name: a linter takes import statements away that nothing uses.
for module in ("dqt_dist.checkpoint.store", "dqt_dist.training.step"):
    importlib.import_module(module)

# Before anything computes: threads do not survive a fork.
torch.set_num_threads(1)
