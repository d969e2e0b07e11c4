"""Whether the codes of a run move as those of runs that learned. Pure functions of the figures of a logged step.

The limits come from the curves in docs/benchmarks/quality/S_*.json: seven runs that learned (8 layers x 512, AdamW,
rates 5e-4 to 2e-3), with 8-bit and 4-bit codes, ternary codes, and ternary codes of 8-bit and 4-bit latents.

    flips           A flip moves a weight by one scale at least. Flips times scale is how far the weights of a step
                    move: at most 0.32 * 0.049 = 0.016 standard deviations of the initial weights in those runs (8 bit
                    at 2e-3, which was behind 1e-3). On fine grids most codes may flip, and a flip rate says no more
                    than that.
    flips per rate  Codes flip in proportion to the rate in codes, rate / scale, because rounding is stochastic. The
                    proportion was 0.15 for 8 and 4 bits, 0.10 for ternary codes, and 0.04 or more with latents.
    saturation      at most 0.10 with 4-bit latents, 0.08 with 4-bit codes and 0.01 with 8-bit ones. Two thirds of
                    ternary codes are at an end of their grid, and half of these are drawn outwards: 0.37.

The rate is that of the step, so a schedule changes nothing. In the first steps, AdamW moves each weight by the whole
rate; nothing is said of them.
"""

from __future__ import annotations

import math

from dqt_dist.config import Config
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.optim.schedule import StepRates

LARGEST_MOVE = 4 * 0.016
"""Standard deviations of the initial weights per step: four times the largest of the runs above."""
LARGEST_FLIP_RATE = 2 * 0.32
"""Twice the largest of the runs above, where LARGEST_MOVE allows more."""
SMALLEST_FLIPS_PER_RATE = 0.04 / 4
"""A quarter of the smallest of the runs above."""
LARGEST_SATURATION = 2 * 0.10
LARGEST_SATURATION_OF_TERNARY_CODES = 0.6
"""Without latents: above 0.37, and what draws of no meaning at huge rates exceed."""
STANDARD_DEVIATION_PER_ABSMEAN = math.sqrt(math.pi / 2)
"""Of a normal distribution."""
ABSMAX_DEVIATIONS = 5.0
"""Largest of some million normal numbers, in standard deviations."""


def scale_in_deviations(config: Config) -> float:
    """Scale of the codes at initialisation, in standard deviations of the initial weights, without its rounding to a
    power of two."""
    quantization = config.quantization
    qmax = make_grid(quantization.bits).qmax
    return {
        "absmean": 1 / STANDARD_DEVIATION_PER_ABSMEAN,
        "paper": 1 / STANDARD_DEVIATION_PER_ABSMEAN / qmax,
        "sigma": quantization.scale_sigmas / qmax,
        "absmax": ABSMAX_DEVIATIONS / qmax,
    }[quantization.scale_rule]


def unhealthy(metrics: dict[str, float], rates: StepRates, config: Config) -> list[str]:
    """A line per figure of the step's `metrics` (`LowBitMetrics.overall`) that no run should have: the figure, its
    limit, and what to change."""
    quantization, optimizer = config.quantization, config.optimizer
    settled = max(optimizer.warmup_steps, round(1 / (1 - optimizer.beta2)))  # the memory of AdamW's second moment
    if rates.step <= settled:
        return []
    rate, flips, saturation = rates.low_bit_learning_rate, metrics["flip_rate"], metrics["saturation"]
    scale = scale_in_deviations(config)
    rate_in_codes = rate / (scale * config.model.init_std)
    lines = []
    most_flips = min(LARGEST_FLIP_RATE, LARGEST_MOVE / scale)
    if flips > most_flips:
        lines.append(
            f"flip_rate {flips:.2g} is above {most_flips:.2g}, so codes move at random: lower "
            f"optimizer.low_bit_learning_rate, which is {rate:.2g} in this step"
        )
    # At the end of a schedule too few codes flip to be counted.
    if 2 * rate > optimizer.low_bit_learning_rate and flips < SMALLEST_FLIPS_PER_RATE * rate_in_codes:
        change = (
            'use quantization.rounding = "stochastic"'
            if quantization.rounding == "nearest"
            else "raise optimizer.low_bit_learning_rate"
        )
        lines.append(
            f"flip_rate {flips:.2g} is below {SMALLEST_FLIPS_PER_RATE * rate_in_codes:.2g}, a hundredth of the rate "
            f"{rate:.2g} in codes, so the low-bit weights learn nothing: {change}"
        )
    coarse = quantization.bits == "ternary" and quantization.latent_bits is None
    most_saturation = LARGEST_SATURATION_OF_TERNARY_CODES if coarse else LARGEST_SATURATION
    if saturation > most_saturation:
        sigmas = "scale_sigmas" if quantization.latent_bits is None else "latent_sigmas"
        change = f"raise quantization.{sigmas} (a wider grid) or optimizer.low_bit_weight_decay, or "
        lines.append(
            f"saturation {saturation:.2g} is above {most_saturation:.2g}, so weights press against the end of their "
            f"grid: {'' if coarse else change}lower optimizer.low_bit_learning_rate"
        )
    return lines
