"""A small config file, and what its refusals say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dqt_dist.config import check_world, load_config
from dqt_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def small() -> dict[str, Any]:
    """The least a config says: every field without a default."""
    return {
        "model": {
            "num_layers": 4,
            "hidden_size": 128,
            "ffn_hidden_size": 384,
            "num_attention_heads": 4,
            "vocab_size": 2048,
            "seq_length": 128,
        },
        "optimizer": {"learning_rate": 0.003},
        "data": {"train": [{"path": "data/a"}], "tokenizer": "data/tokenizer.model"},
        "training": {"steps": 100, "micro_batch_size": 2, "global_batch_size": 8},
        "checkpoint": {"dir": "runs/x"},
    }


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    return str(caught.value)


def world_refusal(file: Path, world_size: int, *overrides: str) -> str:
    config = load_config(file, overrides)
    with pytest.raises(UserError) as caught:
        check_world(config, world_size)
    return str(caught.value)
