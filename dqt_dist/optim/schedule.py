"""Learning-rate schedules as functions of the step. A schedule has no state to save or restore.

warm-up    linear from 1/warmup_steps to 1 over the first warmup_steps updates
cosine     half a cosine from 1 to the floor at the last update
linear     a line from 1 to the floor
constant   1
wsd        warm-up, stable, decay: 1, then a line to the floor over the last decay_steps (arXiv 2404.06395)
two_stage  linear, times second_stage_ratio in the second half of the updates: BitNet b1.58's schedule, which goes with
           weight_decay_steps at the same half (arXiv 2504.12285, section 2.2, and the source at the config's field)

The linears of the blocks may have a schedule of their own length and floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dqt_dist.config import Config, OptimizerConfig


@dataclass(frozen=True)
class StepRates:
    """Learning rates and weight decays of one step. Made once per step; update, kernels and log read them here."""

    step: int
    """Counts from 1."""
    learning_rate: float
    """Rate of embeddings, head and norms."""
    low_bit_learning_rate: float
    """Rate of the linears of the blocks."""
    weight_decay: float = 0.0
    """Decoupled decay of the high-precision matrices."""
    low_bit_weight_decay: float = 0.0
    """Decoupled decay of the low-bit weights."""


def step_rates(step: int, config: Config) -> StepRates:
    """The rates of update `step` (1 .. training.steps)."""
    optimizer, steps = config.optimizer, config.training.steps
    low_bit_steps = optimizer.low_bit_schedule_steps or steps
    decays = optimizer.weight_decay_steps is None or step <= optimizer.weight_decay_steps
    multiplier = rate_multiplier(step, steps, optimizer.min_learning_rate_ratio, optimizer)
    low_bit_multiplier = rate_multiplier(step, low_bit_steps, optimizer.low_bit_min_learning_rate_ratio, optimizer)
    return StepRates(
        step,
        optimizer.learning_rate * multiplier,
        optimizer.low_bit_learning_rate * low_bit_multiplier,
        optimizer.weight_decay if decays else 0.0,
        optimizer.low_bit_weight_decay if decays else 0.0,
    )


def rate_multiplier(step: int, steps: int, floor: float, config: OptimizerConfig) -> float:
    """Multiplier of the peak learning rate for update `step`.

    The schedule is `steps` updates long and ends at `floor`, where it stays.
    """
    step, warmup = min(step, steps), config.warmup_steps
    if step <= warmup:
        return step / warmup
    if config.schedule == "constant":
        return 1.0
    begin = steps - (config.decay_steps or 0) if config.schedule == "wsd" else warmup
    if step <= begin:
        return 1.0
    progress = (step - begin) / (steps - begin)
    shape = (1.0 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1.0 - progress
    if config.second_stage_ratio is not None and 2 * step > steps:
        shape *= config.second_stage_ratio
    return floor + (1.0 - floor) * shape
