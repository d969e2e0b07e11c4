"""Schedules at the steps where their form changes: first and last update, end of warm-up, start of a decay."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from dqt_dist.config import OptimizerConfig
from dqt_dist.optim.schedule import rate_multiplier, step_rates
from tests.small import small_config

STEPS = 100


def factor(step: int, schedule: str, steps: int = STEPS, **fields: Any) -> float:
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, **fields)
    return rate_multiplier(step, steps, config.min_learning_rate_ratio, config)


ALL = ["cosine", "linear", "constant", "wsd", "two_stage"]


@pytest.mark.parametrize("schedule", ALL)
def test_warm_up_is_a_line_from_one_share_to_the_peak(schedule: str) -> None:
    """The first update has a rate above 0 (1/10 of the peak), and the last warm-up step has the peak rate."""
    values = [factor(step, schedule, warmup_steps=10, decay_steps=20) for step in range(1, 11)]
    assert values == [step / 10 for step in range(1, 11)]


LAST = [("cosine", 0.1), ("linear", 0.1), ("wsd", 0.1), ("two_stage", 0.1), ("constant", 1.0)]


@pytest.mark.parametrize(("schedule", "last"), LAST)
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


def test_two_stages_are_a_line_that_falls_at_half() -> None:
    """The peaks of BitNet b1.58 at 700 M weights: from 1.5e-3 towards 0, at half on the line from 1e-3 towards 0."""
    peak = 1.5e-3
    rates = {step: peak * factor(step, "two_stage") for step in (25, 50, 51, 75, 100)}
    expected = {25: 1.5e-3 * 0.75, 50: 1.5e-3 * 0.5, 51: 1e-3 * 0.49, 75: 1e-3 * 0.25, 100: 0.0}
    assert rates == pytest.approx(expected, abs=1e-15)
    assert factor(75, "two_stage", second_stage_ratio=0.5) == pytest.approx(0.125, abs=1e-15)


def test_linears_may_have_a_schedule_of_their_own_length_and_floor() -> None:
    """At their last step the linears are at their floor and stay there; everything else goes on."""
    config = small_config(
        *("optimizer.schedule=linear", "training.steps=100", "optimizer.min_learning_rate_ratio=0.1"),
        *("optimizer.low_bit_schedule_steps=80", "optimizer.low_bit_min_learning_rate_ratio=0.0"),
    )
    peak, low_bit_peak = config.optimizer.learning_rate, config.optimizer.low_bit_learning_rate
    rates = {step: step_rates(step, config) for step in (40, 79, 80, 81, 100)}
    assert rates[40].learning_rate == pytest.approx(peak * (0.1 + 0.9 * 0.6), abs=1e-15)
    assert rates[40].low_bit_learning_rate == pytest.approx(low_bit_peak / 2, abs=1e-15)
    assert rates[79].low_bit_learning_rate > 0
    assert [rates[step].low_bit_learning_rate for step in (80, 81, 100)] == [0.0] * 3
    assert rates[100].learning_rate == pytest.approx(0.1 * peak, abs=1e-15)


def test_without_own_fields_linears_follow_the_rest() -> None:
    config = small_config("optimizer.schedule=cosine", "optimizer.min_learning_rate_ratio=0.3")
    peak, low_bit_peak = config.optimizer.learning_rate, config.optimizer.low_bit_learning_rate
    for step in range(1, config.training.steps + 1):
        rates = step_rates(step, config)
        assert rates.learning_rate / peak == rates.low_bit_learning_rate / low_bit_peak


@pytest.mark.parametrize(("last", "decaying_steps"), [("null", 10), ("6", 6), ("0", 0)])
def test_both_decays_hold_up_to_their_last_step(last: str, decaying_steps: int) -> None:
    config = small_config(f"optimizer.weight_decay_steps={last}", "optimizer.low_bit_weight_decay=0.2")
    rates = [step_rates(step, config) for step in range(1, 11)]
    decays = [(at_step.weight_decay, at_step.low_bit_weight_decay) for at_step in rates]
    assert decays == [(0.1, 0.2)] * decaying_steps + [(0.0, 0.0)] * (10 - decaying_steps)
