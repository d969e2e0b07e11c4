"""The rounding update of some rows: the Triton kernel on CUDA, the definition in `lowbit/update.py` elsewhere.

`optim/adamw.py` does AdamW and the rounding update in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dqt_dist.config import CODES_PER_GROUP
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.update import RoundingKey, update_rows_reference

GRADIENT_LIMIT = 2.0**63
"""Gradient elements of this magnitude and above are treated like elements that are not finite: their squares almost
overflow."""


@dataclass(frozen=True)
class AdamW:
    """The constants of AdamW; symbols as in optim/adamw.py."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    """Decoupled: a step makes each weight smaller by the fraction learning_rate * weight_decay."""


def update_rows(
    weight: LowBitMatrix,
    direction: Tensor,
    start: int,
    learning_rate: float,
    weight_decay: float,
    key: RoundingKey,
    latents: Tensor | None = None,
    counted: bool = True,
) -> Tensor:
    """Updates rows [start, start + len(direction)) in place. Arguments and meaning: `update_rows_reference`.

    Returns int32 or int64 [n, parts, counts], counts of each part of each row. Unless `counted`, only the sums of |L|
    are sure to be there: the kernel saves the instructions of the others, which are 0 then.
    """
    if kernel_fits(weight):
        # Triton need not be installed where there is no CUDA.
        from dqt_dist.kernels.low_bit_update_triton import update_rows_triton

        return update_rows_triton(weight, direction, start, learning_rate, weight_decay, key, latents, counted)
    return update_rows_reference(weight, direction, start, learning_rate, weight_decay, key, latents=latents)


def sum_by_matrix(weight: LowBitMatrix, start: int, row_counts: Tensor) -> Tensor:
    """Counts per logical matrix, int64 [matrices, counts], from [n, parts, counts] of rows [start, start + n)."""
    counts = torch.zeros(len(weight.scale), row_counts.shape[2], dtype=torch.int64, device=row_counts.device)
    return counts.index_add_(0, weight.row_matrix[start : start + len(row_counts)].int(), row_counts.sum(dim=1))


def kernel_fits(weight: LowBitMatrix) -> bool:
    """Whether the kernels can update `weight`.

    The codes must be on CUDA. Columns must be in whole Philox groups of 4; the config allows no other shape. The
    counter of each element must fit into one 32-bit word.
    """
    layout = weight.layout
    assert layout is not None
    groups_are_whole = not any(n % CODES_PER_GROUP for n in (layout.in_features, layout.column_offset, layout.columns))
    largest = max(matrix.rows * matrix.columns for matrix in layout.matrices)
    return weight.codes.is_cuda and groups_are_whole and largest <= CODES_PER_GROUP << 32
