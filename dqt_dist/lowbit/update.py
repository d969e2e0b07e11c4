"""The update of Direct Quantized Training (arXiv 2412.04787): new weights are rounded stochastically onto the grid.

    t  = C - (lr / s) * direction - lr * wd * C          the wanted weight in units of one code, fp32
    C' = clamp(floor(t) + [u < t - floor(t)])            u = Philox(ROUND, seed, step, matrix, row, column)

No float weight is stored: t exists for one block of rows at a time. Where t is not finite, the code is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dqt_dist.config import Rounding
from dqt_dist.lowbit.coordinates import Purpose, random_words
from dqt_dist.lowbit.grid import Grid
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.philox import to_unit_interval
from dqt_dist.lowbit.rounding import round_nearest, round_stochastic


@dataclass(frozen=True)
class RoundingKey:
    """Which random numbers an update uses. The key and the logical coordinates determine every u."""

    seed: int
    step: int
    mode: Rounding


def wanted_codes(
    codes: Tensor, direction: Tensor, row_scale: Tensor, learning_rate: float, weight_decay: float
) -> Tensor:
    """t in fp32 [rows, columns], for codes and direction [rows, columns] and row_scale [rows]."""
    wanted = codes.float()
    if weight_decay:
        wanted = wanted * (1.0 - learning_rate * weight_decay)
    return wanted - direction * (learning_rate / row_scale)[:, None]


def round_to_grid(wanted: Tensor, uniforms: Tensor | None, grid: Grid) -> Tensor:
    """Rounds stochastically with `uniforms`, to nearest without."""
    return round_nearest(wanted, grid) if uniforms is None else round_stochastic(wanted, uniforms, grid)


def rounding_words(weight: LowBitMatrix, start: int, stop: int, key: RoundingKey) -> Tensor:
    """The 32-bit random words for the rounding of rows [start, stop): int64 [stop - start, columns]."""
    assert weight.layout is not None
    return random_words(Purpose.ROUND, key.seed, key.step, weight.layout, start, stop, weight.codes.device)


def update_rows_reference(
    weight: LowBitMatrix,
    direction: Tensor,
    start: int,
    learning_rate: float,
    weight_decay: float,
    key: RoundingKey,
    words: Tensor | None = None,
) -> Tensor:
    """Updates rows [start, start + len(direction)) of `weight` in place.

    `direction` is fp32 [n, columns]. `words` are the `rounding_words` of the rows, where the caller has drawn them
    already. Returns int64 [n, 1, 3], one part per row: codes that changed, codes that are now zero, wanted weights that
    lay outside the grid.
    """
    stop = start + direction.shape[0]
    codes = weight.unpack(start, stop)
    wanted = wanted_codes(codes, direction, weight.row_scale()[start:stop], learning_rate, weight_decay)
    wanted = torch.where(wanted.isfinite(), wanted, codes.float())
    uniforms = None
    if key.mode == "stochastic":
        uniforms = to_unit_interval(rounding_words(weight, start, stop, key) if words is None else words)
    clamped = (wanted < weight.grid.qmin) | (wanted > weight.grid.qmax)
    updated = round_to_grid(wanted, uniforms, weight.grid)
    # Counted before the write, because codes of 5 to 8 bits are not packed and `codes` shares the memory that is
    # written.
    counts = torch.stack([(updated != codes).sum(1), (updated == 0).sum(1), clamped.sum(1)], dim=1)[:, None]
    weight.set_codes(updated, start)
    return counts
