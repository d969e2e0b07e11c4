"""Packing: codes as the bytes that are stored, sent over the wire and written to a checkpoint.

Below 5 bits a code c is stored as the unsigned field u = c - qmin. A byte holds several fields, the first column in the
lowest bits:

    2 storage bits   byte = u0 | u1 << 2 | u2 << 4 | u3 << 6      columns 4i .. 4i+3
    4 storage bits   byte = u0 | u1 << 4                          columns 2i .. 2i+1
    8 storage bits   byte = c as int8, no offset

Rows are packed one by one, so any range of rows is a contiguous range of bytes. ZeRO shards and gathers such ranges. A
row whose length does not fill its last byte is padded with u = 0, and unpacking drops the padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqt_dist.lowbit.grid import Grid


def storage_dtype(grid: Grid) -> torch.dtype:
    """uint8 for packed fields, int8 where a code fills a byte."""
    return torch.int8 if grid.storage_bits == 8 else torch.uint8


def new_packed(rows: int, columns: int, grid: Grid, device: torch.device | None = None) -> Tensor:
    """Memory for the packed codes of `rows` rows, not initialised."""
    return torch.empty(rows, grid.packed_columns(columns), dtype=storage_dtype(grid), device=device)


def pack(codes: Tensor, grid: Grid) -> Tensor:
    """Packs codes [rows, columns] (any integer dtype, on the grid) to bytes [rows, grid.packed_columns(columns)]."""
    if grid.storage_bits == 8:
        return codes.to(torch.int8)
    per_byte = grid.codes_per_byte
    fields = (codes - grid.qmin).to(torch.uint8)
    missing = -fields.shape[1] % per_byte
    if missing:
        fields = torch.nn.functional.pad(fields, (0, missing))
    fields = fields.view(fields.shape[0], -1, per_byte)
    packed = fields[..., 0].clone()
    for position in range(1, per_byte):
        packed |= fields[..., position] << (position * grid.storage_bits)
    return packed


def unpack(packed: Tensor, grid: Grid, columns: int) -> Tensor:
    """Inverse of `pack`: bytes [rows, packed_columns] to int8 codes [rows, columns]."""
    if grid.storage_bits == 8:
        return packed
    mask = (1 << grid.storage_bits) - 1
    fields = torch.stack([(packed >> (i * grid.storage_bits)) & mask for i in range(grid.codes_per_byte)], dim=-1)
    codes = fields.view(packed.shape[0], -1).to(torch.int8) + grid.qmin
    return codes[:, :columns]
