# pyright: reportMissingImports=false, reportIndexIssue=false
"""Triton form of `unpack.py`: one program per tile of packed codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqt_dist.kernels.device.packing import group_bytes, group_codes, load_groups, unpack_codes
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
    GROUP_CODES: tl.constexpr = group_codes(STORAGE_BITS)
    GROUP_BYTES: tl.constexpr = group_bytes(STORAGE_BITS)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1) * (COLUMNS // GROUP_CODES) + tl.arange(0, COLUMNS // GROUP_CODES)
    byte = group * GROUP_BYTES
    inside = (row < rows)[:, None] & (byte < packed_columns)[None, :]
    groups = load_groups(packed + row[:, None] * packed_columns + byte[None, :], inside, STORAGE_BITS)
    value = unpack_codes(groups, QMIN, STORAGE_BITS).to(tl.float32)
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
