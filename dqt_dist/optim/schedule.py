"""Learning-rate schedules as functions of the step. A schedule has no state to save or restore.

warm-up   linear from 1/warmup_steps to 1 over the first warmup_steps updates
cosine    half a cosine from 1 to the floor at the last update
linear    a line from 1 to the floor
constant  1
wsd       warm-up, stable, decay: 1, then a line to the floor over the last decay_steps (arXiv 2404.06395)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dqt_dist.config import Config, OptimizerConfig


@dataclass(frozen=True)
class StepRates:
    """The learning rates of one step. Made once per step; update, kernels and log read them here."""

    step: int
    """Counts from 1."""
    learning_rate: float
    """Rate of embeddings, head and norms."""
    low_bit_learning_rate: float
    """Rate of the linears of the blocks."""


def step_rates(step: int, config: Config) -> StepRates:
    """The rates of update `step` (1 .. training.steps)."""
    optimizer = config.optimizer
    multiplier = rate_multiplier(step, config.training.steps, optimizer)
    return StepRates(step, optimizer.learning_rate * multiplier, optimizer.low_bit_learning_rate * multiplier)


def rate_multiplier(step: int, steps: int, config: OptimizerConfig) -> float:
    """Multiplier of the peak learning rate for update `step` (1 .. steps)."""
    warmup = config.warmup_steps
    if step <= warmup:
        return step / warmup
    floor = config.min_learning_rate_ratio
    if config.schedule == "constant":
        return 1.0
    begin = steps - (config.decay_steps or 0) if config.schedule == "wsd" else warmup
    if step <= begin:
        return 1.0
    progress = (step - begin) / (steps - begin)
    shape = (1.0 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1.0 - progress
    return floor + (1.0 - floor) * shape
