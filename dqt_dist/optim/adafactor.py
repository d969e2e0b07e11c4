"""Adafactor's direction (Shazeer and Stern, arXiv 1804.04235) on a shard of one or several logical matrices.

The second moment of a matrix is kept as its row means r and column means c only, V = r c^T / mean(r) (algorithm 4):

    r = b r + (1 - b) mean over columns (g^2 + eps)      c likewise over rows      b = 1 - t^-decay_rate
    U = g / sqrt(V)            U = U / max(1, RMS(U) / clip_threshold)

The means and the RMS are taken over the whole logical matrix. A rank holds a part of the matrix, so its sums are
completed by sums over the ranks that hold the other parts. The three phases are pure functions without process groups.
`AdafactorRule` makes the sums over ranks between the phases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from dqt_dist.config import OptimizerConfig
from dqt_dist.kernels.low_bit_update import update_rows
from dqt_dist.optim.owned_rows import OwnedRows, UpdateSettings
from dqt_dist.parallel.groups import Groups

# Epsilon_1 of the paper, section 6. It keeps r and c positive.
SQUARE_EPSILON = 1e-30

GradientOfRows = Callable[[slice], Tensor]
"""Returns the clipped fp32 gradient of a range of owned rows."""


def square_sums(gradient: Tensor, row_matrix: Tensor, num_matrices: int) -> tuple[Tensor, Tensor]:
    """Phase 1: local sums of g^2.

    Returns the sums over local columns, [rows], and the sums over local rows, [matrices, columns].
    """
    squares = gradient.square().add_(SQUARE_EPSILON)
    column_sums = squares.new_zeros(num_matrices, gradient.shape[1])
    column_sums.index_add_(0, row_matrix, squares)
    return squares.sum(dim=1), column_sums


def decay_at(step: int, decay_rate: float) -> float:
    """beta2 of step t >= 1. It is 0 at the first step, so no bias correction is needed (section 7.2)."""
    return 1.0 - step**-decay_rate


def factored_direction(gradient: Tensor, row: Tensor, column: Tensor, mean_row: Tensor, row_matrix: Tensor) -> Tensor:
    """Phase 2: U before clipping, fp32 [rows, columns].

    row [rows] and column [matrices, columns] are the moving averages of the means. mean_row [matrices] is the mean of
    `row` over each whole logical matrix. row_matrix [rows] is the index of the matrix that a row belongs to.
    """
    row_factor = (row / mean_row[row_matrix]).rsqrt()[:, None]
    return gradient * row_factor * column.rsqrt()[row_matrix]


def clip_by_rms(direction: Tensor, rms: Tensor, row_matrix: Tensor, clip_threshold: float) -> Tensor:
    """Phase 3: U / max(1, RMS(U) / threshold), with rms [matrices] over each whole logical matrix."""
    return direction / torch.clamp(rms / clip_threshold, min=1.0)[row_matrix][:, None]


class AdafactorRule:
    """Keeps row and column means of the second moment, and a first moment when beta1 is given.

    Means are taken over whole logical matrices: `_complete_row_sum` and `_complete_column_sum` add the parts of the
    other ranks.
    """

    def __init__(self, config: OptimizerConfig, groups: Groups, rows_sharded: bool) -> None:
        self.config, self.tensor = config, groups.tensor
        self.row_owners = groups.data if rows_sharded else None

    def new_state(self, rows: OwnedRows) -> dict[str, Tensor]:
        weight, num_rows = rows.weight, rows.stop - rows.start
        device = weight.codes.device
        assert weight.layout is not None
        state = {
            "row_mean": torch.zeros(num_rows, device=device),
            "column_mean": torch.zeros(len(weight.layout.matrices), weight.columns, device=device),
        }
        if self.config.beta1:
            state["exp_avg"] = torch.zeros(num_rows, weight.columns, device=device)
        return state

    def _complete_row_sum(self, total: Tensor, rows: OwnedRows) -> Tensor:
        """Completes a sum over rows. Rows are split over owners, and over TP ranks where TP does not split columns."""
        if self.row_owners is not None and self.row_owners.size() > 1:
            dist.all_reduce(total, group=self.row_owners)
        if not self._splits_columns(rows) and self.tensor.size() > 1:
            dist.all_reduce(total, group=self.tensor)
        return total

    def _complete_column_sum(self, total: Tensor, rows: OwnedRows) -> Tensor:
        """Completes a sum over columns, which TP may split."""
        if self._splits_columns(rows) and self.tensor.size() > 1:
            dist.all_reduce(total, group=self.tensor)
        return total

    @staticmethod
    def _splits_columns(rows: OwnedRows) -> bool:
        layout = rows.weight.layout
        assert layout is not None
        return layout.columns != layout.in_features

    def update(self, rows: OwnedRows, mean: Tensor, settings: UpdateSettings) -> Iterator[Tensor]:
        """Updates moments and codes of the owned rows. Yields the counts of the rows of each block."""
        clip = settings.clip
        assert clip is not None, "the config allows fused_backward with AdamW only"

        def clipped_gradient(block: slice) -> Tensor:
            # clip is 0 for a step whose norm is not finite. 0 * inf is nan, which becomes 0.
            return (mean[block].float() * clip).nan_to_num_(nan=0.0)

        # A step with clip 0 must not move codes by the first moment either.
        step_enabled = clip > 0
        for block, direction in self.directions(rows, clipped_gradient, settings.key.step):
            start, latents = rows.start + block.start, rows.state.get("latent")
            yield update_rows(
                rows.weight,
                direction * step_enabled,
                start,
                settings.learning_rate,
                settings.weight_decay,
                settings.key,
                None if latents is None else latents[block],
            )

    def directions(self, rows: OwnedRows, gradient: GradientOfRows, step: int) -> Iterator[tuple[slice, Tensor]]:
        """Updates the factored moments of the shard, then yields the direction of each block of owned rows."""
        layout, state, row_matrix = rows.weight.layout, rows.state, rows.row_matrix
        assert layout is not None
        device, num_matrices = row_matrix.device, len(layout.matrices)
        matrix_rows = torch.tensor([float(m.rows) for m in layout.matrices], device=device)
        row_sums = torch.zeros(rows.stop - rows.start, device=device)
        column_sums = torch.zeros(num_matrices, layout.columns, device=device)
        for block in rows.row_blocks():
            row_sums[block], block_column_sums = square_sums(gradient(block), row_matrix[block], num_matrices)
            column_sums += block_column_sums
        new_share = 1 - decay_at(step, self.config.adafactor_decay_rate)
        state["row_mean"].lerp_(self._complete_column_sum(row_sums, rows) / layout.in_features, new_share)
        state["column_mean"].lerp_(self._complete_row_sum(column_sums, rows) / matrix_rows[:, None], new_share)
        mean_row = torch.zeros(num_matrices, device=device).index_add_(0, row_matrix, state["row_mean"])
        mean_row = self._complete_row_sum(mean_row, rows) / matrix_rows

        def unclipped_direction(block: slice) -> Tensor:
            factors = (state["row_mean"][block], state["column_mean"], mean_row, row_matrix[block])
            return factored_direction(gradient(block), *factors)

        squares = torch.zeros(num_matrices, device=device)
        for block in rows.row_blocks():
            squares.index_add_(0, row_matrix[block], unclipped_direction(block).square().sum(dim=1))
        squares = self._complete_column_sum(self._complete_row_sum(squares, rows), rows)
        rms = (squares / (matrix_rows * layout.in_features)).sqrt()
        for block in rows.row_blocks():
            direction = clip_by_rms(
                unclipped_direction(block), rms, row_matrix[block], self.config.adafactor_clip_threshold
            )
            if self.config.beta1:
                direction = state["exp_avg"][block].lerp_(direction, 1 - self.config.beta1)
            yield block, direction
