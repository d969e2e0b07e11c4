"""The configs in configs/: each loads, fits the stated numbers of processes and comes back equal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dqt_dist.config import load_config, process_grid, to_json
from dqt_dist.plan.footprint import largest_footprint
from tests.config.files import ROOT

WORLD_SIZES = {
    "demo_cpu": (4, 8),
    "130m_ternary": (1, 2, 4),
    "130m_pure_ternary": (1, 2, 4),
    "320m_ternary": (1, 8),
    "1b_ternary": (1, 8, 32),
    "1b_ternary_fp8": (1, 8, 32),
    "1b_int8": (1, 8),
    "1b_bf16": (1, 8),
    "1b_bitnet": (1, 8),
    "7b_ternary": (8, 32),
    "13b_ternary": (8, 64),
    "70b_ternary": (64, 512),
}
"""Process counts at which each shipped config must fit."""


def test_every_shipped_config_has_a_stated_world_size() -> None:
    assert sorted(path.stem for path in (ROOT / "configs").glob("*.json")) == sorted(WORLD_SIZES)


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_shipped_config_fits_and_comes_back_equal(name: str, tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / f"{name}.json")
    for world_size in WORLD_SIZES[name]:
        arrangement = process_grid(config, world_size)
        assert arrangement.tensor * arrangement.pipeline * arrangement.data == world_size
    copy = tmp_path / "config.json"
    copy.write_text(to_json(config))
    assert load_config(copy) == config


def test_shipped_1b_configs_differ_in_the_method_alone() -> None:
    """The baselines are comparable: same model, data and batch; only quantization, rates, decay and folder differ."""
    texts = []
    for name in ("1b_ternary", "1b_int8", "1b_bf16", "1b_bitnet"):
        values = json.loads((ROOT / "configs" / f"{name}.json").read_text())
        for section, key in (
            ("optimizer", "learning_rate"),
            ("optimizer", "low_bit_learning_rate"),
            ("optimizer", "low_bit_weight_decay"),
            ("checkpoint", "dir"),
        ):
            values[section].pop(key, None)
        values.pop("quantization")
        texts.append(values)
    assert all(values == texts[0] for values in texts)


TABLE = (ROOT / "configs/README.md").read_text()
ROWS = re.findall(
    r"^\| `(\w+)` \|[^|]*\| (\d+) \| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", TABLE, re.MULTILINE
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_table_of_configs_is_the_plan(row: tuple[str, ...]) -> None:
    """Layout and GiB by kind of the largest rank; all of it within an H100 less what the plan keeps free."""
    name, processes, layout, *memory = row
    config = load_config(ROOT / "configs" / f"{name}.json")
    grid = process_grid(config, int(processes))
    assert int(processes) in WORLD_SIZES[name]
    assert layout == f"TP {grid.tensor} x PP {grid.pipeline} x DP {grid.data}, ZeRO {config.zero_stage}"
    footprint = largest_footprint(config, grid)
    transient = footprint.activations + footprint.scratch
    state = footprint.total - footprint.gradients - transient
    assert memory == [f"{part / 2**30:.2f}" for part in (state, footprint.gradients, transient, footprint.total)]
    assert footprint.total < (80 - 3) * 2**30


def test_every_shipped_config_is_in_the_table() -> None:
    assert {name for name, *_ in ROWS} == set(WORLD_SIZES)


def test_the_largest_config_is_cut_in_all_three_directions() -> None:
    grid = process_grid(load_config(ROOT / "configs/70b_ternary.json"), 512)
    assert (grid.tensor, grid.pipeline, grid.data) == (8, 8, 8)
