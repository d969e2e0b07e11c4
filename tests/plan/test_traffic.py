"""The bytes of dqt_dist/plan/traffic.py against what real steps count, and against Megatron's messages."""

from __future__ import annotations

import pytest

from dqt_dist.config import process_grid
from dqt_dist.plan.traffic import bytes_sent
from tests.plan.observed import CASES, observed
from tests.small import small_config


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bytes_planned_are_the_bytes_counted(case: tuple) -> None:
    """Equal for the first and the last pipeline stage. Ranks count along the tensor axis first."""
    world_size, *overrides = case
    found = [rank.sent_bytes for rank in observed(*case)]
    config = small_config(*overrides)
    grid = process_grid(config, world_size)
    for number in {0, grid.pipeline - 1}:
        planned = bytes_sent(config, grid, number)
        rank = number * grid.tensor * grid.data
        assert {kind: planned[kind] for kind in found[rank]} == found[rank]
    assert any(found[0].values()) == (world_size > 1)
