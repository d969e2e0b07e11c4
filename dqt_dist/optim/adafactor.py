"""Adafactor's direction (Shazeer and Stern, arXiv 1804.04235) on a shard of one or several logical matrices.

The second moment of a matrix is kept as means of rows and columns only (algorithm 4, `factored.py`):

    r = b r + (1 - b) mean over columns (g^2 + eps)      c likewise over rows      b = 1 - t^-decay_rate
    V = r c^T / mean(r)        U = g / sqrt(V)           U = U / max(1, RMS(U) / clip_threshold)

The RMS is taken over the whole logical matrix, of which a rank holds a part. `AdafactorRule` adds up the ranks' sums as
integers, so all ZeRO stages give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from dqt_dist.config import OptimizerConfig
from dqt_dist.kernels.low_bit_update import update_rows
from dqt_dist.optim.factored import new_means, row_factors, update_means
from dqt_dist.optim.owned_rows import OwnedRows, UpdateSettings
from dqt_dist.parallel.groups import Groups

# Epsilon_1 of the paper, section 6. It keeps r and c positive.
SQUARE_EPSILON = 1e-30

# Squares of U are counted in units of 2^-16 and as at most 2^12, so the sum over a matrix of 2^34 weights fits 63 bits.
# U has an RMS near 1: the unit does not matter, and a square of 2^12 is a hundred times what clipping is there for.
SQUARES_PER_UNIT, LARGEST_SQUARE = 2.0**16, 2.0**12

GradientOfRows = Callable[[slice], Tensor]
"""Returns the clipped fp32 gradient of a range of owned rows."""


def decay_at(step: int, decay_rate: float) -> float:
    """beta2 of step t >= 1. It is 0 at the first step, so no bias correction is needed (section 7.2)."""
    return 1.0 - step**-decay_rate


def factored_direction(gradient: Tensor, row_factor: Tensor, column: Tensor, row_matrix: Tensor) -> Tensor:
    """U before clipping, fp32 [rows, columns].

    row_factor [rows] is r / mean(r), and column [matrices, columns] is c. row_matrix [rows] is the index of the matrix
    that a row belongs to.
    """
    return gradient * row_factor.rsqrt()[:, None] * column.rsqrt()[row_matrix]


def clip_by_rms(direction: Tensor, rms: Tensor, row_matrix: Tensor, clip_threshold: float) -> Tensor:
    """U / max(1, RMS(U) / threshold), with rms [matrices] over each whole logical matrix."""
    return direction / torch.clamp(rms / clip_threshold, min=1.0)[row_matrix][:, None]


class AdafactorRule:
    """Keeps row and column means of the second moment, and a first moment when low_bit_beta1 is given."""

    def __init__(self, config: OptimizerConfig, groups: Groups, rows_sharded: bool) -> None:
        self.config, self.groups, self.rows_sharded = config, groups, rows_sharded

    def new_state(self, rows: OwnedRows) -> dict[str, Tensor]:
        state = new_means(rows)
        if self.config.low_bit_beta1:
            shape, device = (rows.stop - rows.start, rows.weight.columns), rows.weight.codes.device
            state["exp_avg"] = torch.zeros(shape, device=device)
        return state

    def prepare(self, shards: list[OwnedRows], means: list[Tensor], settings: UpdateSettings) -> None:
        """Updates the factored second moments of all shards, before any shard is updated. A collective call."""
        assert settings.clip is not None and settings.norm is not None
        new_share = 1 - decay_at(settings.key.step, self.config.adafactor_decay_rate)
        step = (settings.norm, settings.clip, new_share, SQUARE_EPSILON)
        update_means(shards, means, *step, self.groups, self.rows_sharded)

    def _complete(self, total: Tensor) -> Tensor:
        """Adds up a sum over parts of a matrix: rows are split over their owners, rows or columns over TP ranks."""
        if self.rows_sharded and self.groups.data.size() > 1:
            dist.all_reduce(total, group=self.groups.data)
        if self.groups.tensor.size() > 1:
            dist.all_reduce(total, group=self.groups.tensor)
        return total

    def update(self, rows: OwnedRows, mean: Tensor, settings: UpdateSettings) -> Iterator[Tensor]:
        """Updates moments and codes of the owned rows. Yields the counts of the rows of each block."""
        clip = settings.clip
        assert clip is not None, "the config allows fused_backward with AdamW only"

        def clipped_gradient(block: slice) -> Tensor:
            # clip is 0 for a step whose norm is not finite. 0 * inf is nan, which becomes 0.
            return (mean[block].float() * clip).nan_to_num_(nan=0.0)

        # A step with clip 0 must not move codes by the first moment or by weight decay either: a code without direction
        # is kept.
        step_enabled = clip > 0
        for block, direction in self.directions(rows, clipped_gradient):
            start, latents = rows.start + block.start, rows.state.get("latent")
            yield update_rows(
                rows.weight,
                torch.where(step_enabled, direction, math.nan),
                start,
                settings.learning_rate,
                settings.weight_decay,
                settings.key,
                None if latents is None else latents[block],
                settings.counted,
            )

    def directions(self, rows: OwnedRows, gradient: GradientOfRows) -> Iterator[tuple[slice, Tensor]]:
        """Yields the direction of each block of owned rows, from the means that `prepare` has updated."""
        layout, state, row_matrix = rows.weight.layout, rows.state, rows.row_matrix
        assert layout is not None
        factors = row_factors(rows)

        def unclipped_direction(block: slice) -> Tensor:
            return factored_direction(gradient(block), factors[block], state["column_mean"], row_matrix[block])

        squares = torch.zeros(len(layout.matrices), dtype=torch.int64, device=row_matrix.device)
        for block in rows.row_blocks():
            units = unclipped_direction(block).square().clamp(max=LARGEST_SQUARE) * SQUARES_PER_UNIT
            squares.index_add_(0, row_matrix[block], units.to(torch.int64).sum(dim=1))
        mean_square = self._complete(squares) / SQUARES_PER_UNIT / (rows.matrix_rows * layout.in_features)
        rms = mean_square.sqrt().float()
        for block in rows.row_blocks():
            direction = clip_by_rms(
                unclipped_direction(block), rms, row_matrix[block], self.config.adafactor_clip_threshold
            )
            if self.config.low_bit_beta1:
                direction = state["exp_avg"][block].lerp_(direction, 1 - self.config.low_bit_beta1)
            yield block, direction
