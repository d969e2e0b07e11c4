"""What follows from the fields of a config, and what a section allows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dqt_dist.config import DTYPE_BYTES, Config, load_config
from dqt_dist.dtypes import TORCH_DTYPES
from tests.config.files import ROOT


@pytest.mark.parametrize("rule", ["absmean", "sigma", "absmax", "paper"])
def test_every_scale_rule_goes_with_ternary(file: Path, rule: str) -> None:
    assert load_config(file, [f"quantization.scale_rule={rule}"]).quantization.scale_rule == rule


def test_config_is_frozen(file: Path) -> None:
    config = load_config(file)
    assert isinstance(config, Config)
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_config_imports_no_torch() -> None:
    """A wrong config ends a run before the seconds that torch takes."""
    code = "import sys; import dqt_dist.config, dqt_dist.plan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_bytes_of_types_are_those_of_torch() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == DTYPE_BYTES


def test_widths_with_grouped_queries(file: Path) -> None:
    """4 heads of width 32; 2 groups of keys and values."""
    model = load_config(file, ["model.num_query_groups=2"]).model
    assert (model.head_dim, model.kv_hidden_size) == (32, 64)
    assert model.linear_shapes() == {
        "self_attn.q_proj": (128, 128),
        "self_attn.k_proj": (64, 128),
        "self_attn.v_proj": (64, 128),
        "self_attn.o_proj": (128, 128),
        "mlp.gate_proj": (384, 128),
        "mlp.up_proj": (384, 128),
        "mlp.down_proj": (128, 384),
    }
    assert model.linear_weights_per_block == 2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128


def test_chunks_and_their_layers(file: Path) -> None:
    config = load_config(file, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "training.recompute=full"])
    assert (config.parallel.num_model_chunks, config.layers_per_chunk, config.recompute_layers) == (4, 1, 1)


@pytest.mark.parametrize(
    ("zero", "stage", "offloads"),
    [
        ({}, 0, False),
        ({"stage": 1}, 1, False),
        ({"stage": 2, "offload_optimizer": {"device": "none"}}, 2, False),
        ({"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": True}}, 1, True),
    ],
)
def test_zero_is_read_from_the_deepspeed_section(file: Path, zero: dict[str, Any], stage: int, offloads: bool) -> None:
    config = load_config(file, [f"deepspeed.zero_optimization={json.dumps(zero)}"])
    assert (config.zero_stage, config.offloads_optimizer) == (stage, offloads)
    copied = config.model_copy(update={"deepspeed": {"zero_optimization": {"stage": 3}}})
    assert copied.zero_stage == 3  # nothing is remembered of the section before
