"""What test workers and commands have imported: they are forked from a process that has imported this file
(distributed.py, forked.py)."""

from __future__ import annotations

import gc
import importlib
import os

# The libraries read these variables when they are imported.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

# Imported by name, because a linter removes import statements that nothing uses.
MODULES = ("deepspeed", "dqt_dist.checkpoint.store", "dqt_dist.training.loop", "dqt_dist.training.report")
# What the sample of a run and the tools that open a model need beside these.
MODULES += ("dqt_dist.inference.run_sample", "transformers.models.llama.modeling_llama")
for module in MODULES:
    importlib.import_module(module)

# Set before any computation, because threads do not survive a fork.
torch.set_num_threads(1)

# What is there now stays: collections, which a run asks for, need not look at it again in each process.
gc.collect()
gc.freeze()
