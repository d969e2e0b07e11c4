"""Scales: the weight of the code 1, chosen once from the initial weights and then fixed.

A scale belongs to a logical matrix, so its rule needs statistics of the whole matrix, while each rank holds a part.
Sums are taken in fixed point. Integer addition is associative: partial sums may be added in any order and by any
collective, and the scale has the same bits in every layout.

    rule      s                      for
    absmean   mean|W|                ternary (BitNet b1.58, arXiv 2402.17764, eq. 3; also the DQT paper)
    sigma     k * std(W) / qmax      n bits; k = 3 for b <= 4 and 6 above were the best of a short sweep
    absmax    max|W| / qmax          n bits, nothing clipped
    paper     mean|W| / qmax         the DQT paper's rule, which clips 42 % of a Gaussian; for parity only

With `power_of_two` the scale is rounded to the nearest power of two (in the exponent). Then s * C is exact in bf16 for
every b <= 8, in fp8 e4m3 for b <= 4, and every export format is lossless.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dqt_dist.config import ScaleRule
from dqt_dist.lowbit.grid import Grid

# The floor of BitNet b1.58 on mean|W|, from its published weight_quant. It gives a matrix of zeros a scale. The layer
# that trains and the code that derives codes elsewhere use the same floor.
BITNET_SCALE_FLOOR = 1e-5

# Resolution of the fixed-point sums relative to `unit`: 2^20 steps per unit. Values up to 2^3 units (the normal table
# ends at 4.32) have squares below 2^26 steps. An int64 holds the sum of 2^37 such squares, and no matrix has so many
# weights.
FIXED_POINT = float(1 << 20)


@dataclass
class WeightStatistics:
    """Exact statistics of a part of a matrix, int64 scalars. `merge` combines the statistics of two parts."""

    unit: float
    """The weight that counts as 1, such as the initial standard deviation. It need not be a power of two."""
    count: Tensor
    abs_sum: Tensor
    square_sum: Tensor
    abs_max: Tensor

    @classmethod
    def of(cls, weights: Tensor, unit: float) -> WeightStatistics:
        """Statistics of a float tensor of any shape."""
        relative = weights.to(torch.float64).abs() / unit
        fixed = (relative * FIXED_POINT).round().to(torch.int64)
        squares = (relative.square() * FIXED_POINT).round().to(torch.int64)
        largest = fixed.max() if weights.numel() else fixed.new_zeros(())
        return cls(unit, fixed.new_tensor(weights.numel()), fixed.sum(), squares.sum(), largest)

    def merge(self, other: WeightStatistics) -> WeightStatistics:
        """Statistics of the two parts together. Raises ValueError when the units differ."""
        if self.unit != other.unit:
            raise ValueError(f"cannot add statistics in units of {self.unit} and {other.unit}")
        return WeightStatistics(
            self.unit,
            self.count + other.count,
            self.abs_sum + other.abs_sum,
            self.square_sum + other.square_sum,
            torch.maximum(self.abs_max, other.abs_max),
        )


def choose_scale(
    statistics: WeightStatistics, grid: Grid, rule: ScaleRule, *, sigmas: float, power_of_two: bool
) -> float:
    """The scale of a matrix from its complete statistics.

    `sigmas` is k of the sigma rule. Raises ValueError for a matrix of zeros, which has no scale.
    """
    count = int(statistics.count)
    mean_abs = int(statistics.abs_sum) / count / FIXED_POINT * statistics.unit
    std = math.sqrt(int(statistics.square_sum) / count / FIXED_POINT) * statistics.unit
    abs_max = int(statistics.abs_max) / FIXED_POINT * statistics.unit
    scale = {
        "absmean": mean_abs,
        "sigma": sigmas * std / grid.qmax,
        "absmax": abs_max / grid.qmax,
        "paper": mean_abs / grid.qmax,
    }[rule]
    if scale <= 0:
        raise ValueError("a matrix of zeros has no scale")
    if power_of_two:
        scale = 2.0 ** round(math.log2(scale))
    # The stored scale is fp32. Rounding here makes every use see the stored value.
    return float(torch.tensor(scale, dtype=torch.float32))
