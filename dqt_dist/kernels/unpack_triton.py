# pyright: reportMissingImports=false, reportIndexIssue=false
"""Triton form of `unpack.py`: one program per tile of packed bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqt_dist.kernels.device.packing import unpack_codes
from dqt_dist.kernels.launch import launch
from dqt_dist.lowbit.grid import Grid

# A tile of 64 rows x 128 columns: 8 KiB to 16 KiB written, whole 128-byte lines in both layouts.
ROWS, COLUMNS = 64, 128


@triton.jit
def _unpack_kernel(
    packed,
    row_scale,
    out,
    rows,
    columns,
    packed_columns,
    QMIN: tl.constexpr,
    STORAGE_BITS: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 8 // STORAGE_BITS
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(1) * (COLUMNS // PER_BYTE) + tl.arange(0, COLUMNS // PER_BYTE)
    inside = (row < rows)[:, None] & (byte < packed_columns)[None, :]
    fields = tl.load(packed + row[:, None] * packed_columns + byte[None, :], mask=inside, other=0).to(tl.int32)
    value = unpack_codes(fields, QMIN, STORAGE_BITS).to(tl.float32)
    if ROW_SCALE:
        value *= tl.load(row_scale + row, mask=row < rows, other=0.0)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = value.to(out.dtype.element_ty)
    if TRANSPOSED:
        target = out + column.to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(target, tl.trans(value), mask=tl.trans(inside))
    else:
        tl.store(out + row[:, None] * columns + column[None, :], value, mask=inside)


def unpack_operand(
    packed: Tensor, grid: Grid, columns: int, dtype: torch.dtype, row_scale: Tensor | None, transposed: bool
) -> Tensor:
    """See unpack.py."""
    assert packed.is_contiguous()
    rows = packed.shape[0]
    out = torch.empty((columns, rows) if transposed else (rows, columns), dtype=dtype, device=packed.device)
    launch(
        _unpack_kernel,
        (triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)),
        packed,
        row_scale,
        out,
        rows,
        columns,
        packed.shape[1],
        QMIN=grid.qmin,
        STORAGE_BITS=grid.storage_bits,
        ROW_SCALE=row_scale is not None,
        TRANSPOSED=transposed,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return out
