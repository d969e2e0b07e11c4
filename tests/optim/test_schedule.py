"""Schedules at the steps where their form changes: first and last update, end of warm-up, start of a decay."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from dqt_dist.config import OptimizerConfig
from dqt_dist.optim.schedule import rate_multiplier

STEPS = 100


def factor(step: int, schedule: str, steps: int = STEPS, **fields: Any) -> float:
    return rate_multiplier(step, steps, OptimizerConfig(learning_rate=1.0, schedule=schedule, **fields))


ALL = ["cosine", "linear", "constant", "wsd"]


@pytest.mark.parametrize("schedule", ALL)
def test_warm_up_is_a_line_from_one_share_to_the_peak(schedule: str) -> None:
    """The first update has a rate above 0 (1/10 of the peak), and the last warm-up step has the peak rate."""
    values = [factor(step, schedule, warmup_steps=10, decay_steps=20) for step in range(1, 11)]
    assert values == [step / 10 for step in range(1, 11)]


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.1), ("linear", 0.1), ("wsd", 0.1), ("constant", 1.0)])
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_last_update_is_at_the_floor(schedule: str, last: float, warmup_steps: int) -> None:
    fields = {"warmup_steps": warmup_steps, "decay_steps": 20, "min_learning_rate_ratio": 0.1}
    assert factor(STEPS, schedule, **fields) == pytest.approx(last, abs=1e-15)
    assert factor(STEPS, schedule, warmup_steps=warmup_steps, decay_steps=20) == pytest.approx(
        0.0 if schedule != "constant" else 1.0, abs=1e-15
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_half_way_is_half_way_between_peak_and_floor(schedule: str) -> None:
    fields = {"warmup_steps": 20, "min_learning_rate_ratio": 0.2}
    assert factor(60, schedule, **fields) == pytest.approx(0.6, abs=1e-15)


def test_cosine_and_linear_at_a_quarter() -> None:
    assert factor(25, "linear") == pytest.approx(0.75, abs=1e-15)
    assert factor(25, "cosine") == pytest.approx((1 + math.cos(math.pi / 4)) / 2, abs=1e-15)


def test_wsd_is_stable_until_its_decay() -> None:
    fields = {"warmup_steps": 10, "decay_steps": 20, "min_learning_rate_ratio": 0.5}
    assert [factor(step, "wsd", **fields) for step in (10, 11, 50, 80)] == [1.0] * 4
    assert factor(81, "wsd", **fields) == pytest.approx(1 - 0.5 / 20, abs=1e-15)
    assert factor(90, "wsd", **fields) == pytest.approx(0.75, abs=1e-15)
    assert factor(100, "wsd", **fields) == pytest.approx(0.5, abs=1e-15)


@pytest.mark.parametrize("schedule", ALL)
def test_a_floor_at_the_peak_is_constant(schedule: str) -> None:
    fields = {"warmup_steps": 10, "decay_steps": 20, "min_learning_rate_ratio": 1.0}
    assert {factor(step, schedule, **fields) for step in range(10, STEPS + 1)} == {1.0}


@pytest.mark.parametrize("schedule", ALL)
def test_after_warm_up_it_never_rises_and_stays_between_floor_and_peak(schedule: str) -> None:
    fields = {"warmup_steps": 10, "decay_steps": 20, "min_learning_rate_ratio": 0.1}
    values = [factor(step, schedule, **fields) for step in range(10, STEPS + 1)]
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert max(values) == 1.0 and min(values) >= 0.1 - 1e-15


@pytest.mark.parametrize("schedule", ALL)
def test_corners_that_could_divide_by_zero(schedule: str) -> None:
    """Warm-up over the whole run; a run of one step; a decay over the whole run."""
    assert factor(STEPS, schedule, warmup_steps=STEPS, decay_steps=1) == 1.0
    assert factor(1, schedule, steps=1, decay_steps=1) == pytest.approx(
        1.0 if schedule == "constant" else 0.0, abs=1e-15
    )
    assert factor(STEPS, "wsd", decay_steps=STEPS) == pytest.approx(0.0, abs=1e-15)
