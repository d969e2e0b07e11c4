# pyright: reportMissingImports=false, reportIndexIssue=false
"""Triton form of `exact_square_sums.py`: a program walks down some rows of a block of columns.

Sums that several programs share are added by integer atomics, whose order does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqt_dist.kernels.launch import launch

ROWS, BLOCK, NUM_WARPS = 64, 512, 4


@triton.jit
def _exact_square_sums_kernel(
    gradient, scale, row_matrix, row_sums, column_sums, rows, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows [i * ROWS, (i + 1) * ROWS), columns [j * BLOCK, (j + 1) * BLOCK).

    argument      shape                 dtype          meaning
    gradient      [rows, columns]       bf16 or fp32   g
    scale         []                    fp32           factor of g; 0: nothing is read
    row_matrix    [rows]                integer        index of the row's matrix
    row_sums      [rows]                int64          added to
    column_sums   [matrices, columns]   int64          added to
    """
    factor = tl.load(scale)
    first = tl.program_id(0) * ROWS
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (factor > 0) if WHOLE else (factor > 0) & (offsets < columns)
    if factor > 0:
        gradient_row = gradient + first.to(tl.int64) * columns
        row_matrix += first
        row_sums += first
        matrix = tl.load(row_matrix).to(tl.int64)
        total = tl.zeros((BLOCK,), tl.int64)
        for _ in range(tl.minimum(ROWS, rows - first)):
            g = tl.load(gradient_row + offsets, mask=inside, other=0.0).to(tl.float32) * factor
            squares = (g * g).to(tl.int64)
            tl.atomic_add(row_sums, tl.sum(squares), sem="relaxed")
            next_matrix = tl.load(row_matrix).to(tl.int64)
            gradient_row += columns
            row_matrix += 1
            row_sums += 1
            if next_matrix != matrix:
                tl.atomic_add(column_sums + matrix * columns + offsets, total, mask=inside, sem="relaxed")
                total = tl.zeros((BLOCK,), tl.int64)
                matrix = next_matrix
            total += squares
        tl.atomic_add(column_sums + matrix * columns + offsets, total, mask=inside, sem="relaxed")


def exact_square_sums(gradient: Tensor, scale: Tensor, row_matrix: Tensor, num_matrices: int) -> tuple[Tensor, Tensor]:
    """See exact_square_sums.py."""
    assert gradient.is_contiguous()
    rows, columns = gradient.shape
    row_sums = torch.zeros(rows, dtype=torch.int64, device=gradient.device)
    column_sums = torch.zeros(num_matrices, columns, dtype=torch.int64, device=gradient.device)
    launch(
        _exact_square_sums_kernel,
        (int(triton.cdiv(rows, ROWS)), int(triton.cdiv(columns, BLOCK))),
        gradient,
        scale,
        row_matrix,
        row_sums,
        column_sums,
        rows,
        columns,
        ROWS=ROWS,
        BLOCK=BLOCK,
        WHOLE=columns % BLOCK == 0,
        num_warps=NUM_WARPS,
    )
    return row_sums, column_sums
