"""The rounding update of some rows: the Triton kernel on CUDA, its definition in `lowbit/update.py` elsewhere.

With AdamW in the same pass: `optim/adamw.py`, which also holds the definition of that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqt_dist.config import CODES_PER_GROUP
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.update import RoundingKey, update_rows_reference


def update_rows(
    weight: LowBitMatrix, direction: Tensor, start: int, learning_rate: float, weight_decay: float, key: RoundingKey
) -> Tensor:
    """Updates rows [start, start + len(direction)) in place; arguments and meaning as `update_rows_reference`.

    Returns integers [n, parts, 3]: flips, zeros and clamped weights of each part of each row.
    """
    if kernel_fits(weight):
        from dqt_dist.kernels.low_bit_update_triton import (
            update_rows_triton as update,
        )  # Triton exists beside CUDA only
    else:
        update = update_rows_reference
    return update(weight, direction, start, learning_rate, weight_decay, key)


def sum_by_matrix(weight: LowBitMatrix, start: int, row_counts: Tensor) -> Tensor:
    """Counts of rows from `start` on [n, parts, 3] as counts of their logical matrices, int64 [matrices, 3]."""
    counts = torch.zeros(len(weight.scale), 3, dtype=torch.int64, device=row_counts.device)
    return counts.index_add_(0, weight.row_matrix[start : start + len(row_counts)].int(), row_counts.sum(dim=1))


def kernel_fits(weight: LowBitMatrix) -> bool:
    """On CUDA, with columns in whole Philox groups (every shape the config allows is) and counters of one word."""
    layout = weight.layout
    assert layout is not None
    groups_are_whole = not any(n % CODES_PER_GROUP for n in (layout.in_features, layout.column_offset, layout.columns))
    largest = max(matrix.rows * matrix.columns for matrix in layout.matrices)
    return weight.codes.is_cuda and groups_are_whole and largest <= CODES_PER_GROUP << 32
