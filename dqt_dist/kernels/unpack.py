"""Packed codes as an operand of a product: scratch for one use, never kept.

    [rows, columns]    bf16, fp32, int8 or e4m3. All four hold codes of up to 4 bits exactly; bf16, fp32 and int8 hold
                       codes of up to 8 bits exactly
    transposed         [columns, rows], contiguous: the layout that fp8 products need in the second operand of a dgrad
    row_scale          multiplied in before the only rounding: exact in bf16 when scales are powers of two

Floor for a ternary matrix, per weight: 1/4 byte read, and 1, 2 or 4 bytes of the operand written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqt_dist.lowbit.grid import Grid
from dqt_dist.lowbit.packing import unpack


def unpack_operand(
    packed: Tensor,
    grid: Grid,
    columns: int,
    dtype: torch.dtype,
    row_scale: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """The operand of packed codes [rows, packed_columns]; row_scale fp32 [rows]."""
    if packed.is_cuda:
        from dqt_dist.kernels import unpack_triton

        return unpack_triton.unpack_operand(packed, grid, columns, dtype, row_scale, transposed)
    codes = unpack(packed, grid, columns)
    operand = codes.to(dtype) if row_scale is None else (codes.float() * row_scale[:, None]).to(dtype)
    return operand.t().contiguous() if transposed else operand
