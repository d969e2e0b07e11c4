"""The rounding update of some rows: the Triton kernel on CUDA, its definition in `lowbit/update.py` elsewhere."""

from __future__ import annotations

from torch import Tensor

from dqt_dist.lowbit.coordinates import LANES
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.update import RoundingKey, update_rows_reference


def update_rows(
    weight: LowBitMatrix, direction: Tensor, start: int, learning_rate: float, weight_decay: float, key: RoundingKey
) -> Tensor:
    """Updates rows [start, start + len(direction)) in place; arguments and meaning as `update_rows_reference`.

    Returns int64 [matrices, 3]: flips, zeros and clamped weights, summed over the rows of each logical matrix.
    """
    if _kernel_fits(weight):
        from dqt_dist.kernels.low_bit_update_triton import (
            update_rows_triton as update,
        )  # Triton exists beside CUDA only
    else:
        update = update_rows_reference
    row_counts = update(weight, direction, start, learning_rate, weight_decay, key)
    stop = start + direction.shape[0]
    counts = row_counts.new_zeros(len(weight.scale), 3)
    return counts.index_add_(0, weight.row_matrix[start:stop].int(), row_counts)


def _kernel_fits(weight: LowBitMatrix) -> bool:
    """On CUDA, with columns in whole Philox groups (every shape the config allows is)."""
    layout = weight.layout
    assert layout is not None
    return weight.codes.is_cuda and not any(
        n % LANES for n in (layout.in_features, layout.column_offset, layout.columns)
    )
