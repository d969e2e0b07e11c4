"""The update of Direct Quantized Training (arXiv 2412.04787): new weights are rounded stochastically onto the grid.

    t  = C - (lr / s) * direction - lr * wd * C          the wanted weight in units of one code, fp32
    C' = clamp(floor(t) + [u < t - floor(t)])            u = Philox(ROUND, seed, step, matrix, row, column)

No float weight is stored: t exists for one block of rows at a time. Where t is not finite, the code is kept.

Where a weight has a latent (`latent.py`), the latent takes the place of the code in these two lines, with the latent
scale and the grid of latents. The new code is a function of the new latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dqt_dist.config import Rounding
from dqt_dist.lowbit.coordinates import Purpose, random_words
from dqt_dist.lowbit.grid import Grid
from dqt_dist.lowbit.latent import codes_of_latents
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.packing import pack, unpack
from dqt_dist.lowbit.philox import to_unit_interval
from dqt_dist.lowbit.rounding import round_nearest, round_stochastic

COUNTS = ("flips", "zeros", "clamped")
"""What an update counts in each row: codes that changed, codes that are now zero, wanted weights that lay outside the
grid (of the latents, where there are latents)."""

LATENT_COUNTS = (*COUNTS, "latent_flips", "latent_abs_sum")
"""The same with latents: also latents that changed, and the sum of |L| after the update."""


@dataclass(frozen=True)
class RoundingKey:
    """Which random numbers an update uses. The key and the logical coordinates determine every u."""

    seed: int
    step: int
    mode: Rounding


def wanted_codes(
    codes: Tensor, direction: Tensor, row_scale: Tensor, learning_rate: float, weight_decay: float
) -> Tensor:
    """t in fp32 [rows, columns], for codes (or latents) and direction [rows, columns] and their row_scale [rows]."""
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
    latents: Tensor | None = None,
) -> Tensor:
    """Updates rows [start, start + len(direction)) of `weight` in place.

    `direction` is fp32 [n, columns]. `words` are the `rounding_words` of the rows, where the caller has drawn them
    already. `latents` are the packed latents of the rows, rewritten in place; None where there are none. Returns int64
    [n, 1, counts], one part per row, in the order of COUNTS or LATENT_COUNTS.
    """
    rows = slice(start, start + direction.shape[0])
    codes = weight.unpack(rows.start, rows.stop)
    if latents is None:
        stored, grid, row_scale = codes, weight.grid, weight.row_scale()[rows]
    else:
        assert weight.latent_grid is not None
        grid, row_scale = weight.latent_grid, weight.row_latent_scale()[rows]
        stored = unpack(latents, grid, weight.columns)
    wanted = wanted_codes(stored, direction, row_scale, learning_rate, weight_decay)
    wanted = torch.where(wanted.isfinite(), wanted, stored.float())
    uniforms = None
    if key.mode == "stochastic":
        uniforms = to_unit_interval(rounding_words(weight, rows.start, rows.stop, key) if words is None else words)
    clamped = (wanted < grid.qmin) | (wanted > grid.qmax)
    updated = round_to_grid(wanted, uniforms, grid)
    new_codes = updated
    if latents is not None:
        new_codes = codes_of_latents(updated, weight.row_codes_per_latent()[rows], weight.grid)
    # Counted before the write: integers that are stored as int8 are not packed, so what was unpacked shares the memory
    # that is written.
    counts = [(new_codes != codes).sum(1), (new_codes == 0).sum(1), clamped.sum(1)]
    if latents is not None:
        counts += [(updated != stored).sum(1), updated.int().abs().sum(1)]
        latents.copy_(pack(updated, grid))
    weight.set_codes(new_codes, start)
    return torch.stack(counts, dim=1)[:, None]
