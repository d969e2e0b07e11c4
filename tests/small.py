"""The small configurations of the tests, and the parts of a run that are built from them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from dqt_dist.config import Config, load_config

# Two layers, two query groups, every dimension a multiple of 4 under TP 2.
VALUES: dict[str, Any] = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 64,
        "seq_length": 16,
    },
    "quantization": {"method": "dqt", "bits": "ternary", "compute": "fp32"},
    "optimizer": {"learning_rate": 1e-2, "low_bit_learning_rate": 5e-3, "schedule": "constant"},
    "data": {"train": [{"path": "unused"}], "tokenizer": "unused", "num_workers": 0},
    "training": {"steps": 10, "micro_batch_size": 2, "global_batch_size": 12},
    "checkpoint": {"dir": "unused"},
    "logging": {"interval": 1},
}


def small_config(*overrides: str) -> Config:
    """The configuration above with `section.key=value` overrides.

    It is read from a file that only this process uses, because ranks call this function at the same time.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.json"
        path.write_text(json.dumps(VALUES))
        return load_config(path, overrides)


def random_batches(config: Config, step: int, data_rank: int, data_size: int) -> list[dict[str, torch.Tensor]]:
    """The micro-batches of one step for one data-parallel rank. The global batch depends on the step only."""
    training, model = config.training, config.model
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(model.vocab_size, (training.global_batch_size, model.seq_length + 1), generator=generator)
    micro = tokens.view(-1, data_size, training.micro_batch_size, model.seq_length + 1)[:, data_rank]
    mask = torch.ones(training.micro_batch_size, model.seq_length)
    batches = [{"tokens": t[:, :-1].contiguous(), "labels": t[:, 1:].contiguous(), "loss_mask": mask} for t in micro]
    if config.data.document_masking:
        # Other documents in every sample, fewer in some, and documents of length 0, which is what is left of a row.
        begins = torch.randint(1, model.seq_length + 1, (training.global_batch_size, 4), generator=generator)
        begins[:, 0] = 0
        starts = begins.sort(dim=1).values.int().view(-1, data_size, training.micro_batch_size, 4)[:, data_rank]
        batches = [batch | {"document_starts": start} for batch, start in zip(batches, starts, strict=True)]
    return batches
