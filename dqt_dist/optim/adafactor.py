"""Adafactor's direction (Shazeer and Stern, arXiv 1804.04235) on a shard of one or several logical matrices.

The second moment of a matrix is kept as its row means r and column means c only, V = r c^T / mean(r) (algorithm 4):

    r = b r + (1 - b) mean over columns (g^2 + eps)      c likewise over rows      b = 1 - t^-decay_rate
    U = g / sqrt(V)            U = U / max(1, RMS(U) / clip_threshold)

Means and the RMS belong to the logical matrix, so what a rank sees of it must be summed over the ranks that hold the rest.
Those sums are the caller's: the three phases below sit between them and know nothing of process groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Epsilon_1 of the paper, section 6: keeps r and c positive.
SQUARE_EPSILON = 1e-30


def square_sums(gradient: Tensor, row_matrix: Tensor, num_matrices: int) -> tuple[Tensor, Tensor]:
    """Phase 1: local sums of g^2. Returns rows [rows] over local columns and columns [matrices, columns] over local rows."""
    squares = gradient.square().add_(SQUARE_EPSILON)
    column_sums = squares.new_zeros(num_matrices, gradient.shape[1])
    column_sums.index_add_(0, row_matrix, squares)
    return squares.sum(dim=1), column_sums


def decay_at(step: int, decay_rate: float) -> float:
    """beta2 of step t >= 1: 0 at the first step, so no bias correction is needed (section 7.2)."""
    return 1.0 - step**-decay_rate


def factored_direction(gradient: Tensor, row: Tensor, column: Tensor, mean_row: Tensor, row_matrix: Tensor) -> Tensor:
    """Phase 2: U before clipping, fp32 [rows, columns].

    row [rows] and column [matrices, columns] are the averaged means, mean_row [matrices] the mean of `row` over each whole
    logical matrix, row_matrix [rows] says which matrix a row belongs to.
    """
    row_factor = (row / mean_row[row_matrix]).rsqrt()[:, None]
    return gradient * row_factor * column.rsqrt()[row_matrix]


def clip_by_rms(direction: Tensor, rms: Tensor, row_matrix: Tensor, clip_threshold: float) -> Tensor:
    """Phase 3: U / max(1, RMS(U) / threshold), with rms [matrices] over each whole logical matrix."""
    return direction / torch.clamp(rms / clip_threshold, min=1.0)[row_matrix][:, None]
