"""Packing: codes as the bytes that are stored, sent over the wire and written to a checkpoint.

Where codes do not fill a byte, a code c is stored as the unsigned field u = c - qmin. A group of neighbouring fields
fills one byte or three, the first column in the lowest bits and the lowest byte first:

    2 storage bits   byte = u0 | u1 << 2 | u2 << 4 | u3 << 6          columns 4i .. 4i+3
    4 storage bits   byte = u0 | u1 << 4                              columns 2i .. 2i+1
    6 storage bits   3 bytes = u0 | u1 << 6 | u2 << 12 | u3 << 18     columns 4i .. 4i+3
    8 storage bits   byte = c as int8, no offset

Rows are packed one by one, so any range of rows is a contiguous range of bytes. ZeRO shards and gathers such ranges. A
range of columns of one row that begins and ends with whole groups is a contiguous range of bytes too: tensor-parallel
ranks hold such ranges. A row whose length does not fill its last group is padded with u = 0, and unpacking drops the
padding.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

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
    fields = (codes - grid.qmin).to(torch.uint8)
    missing = -fields.shape[1] % grid.group_codes
    if missing:
        fields = torch.nn.functional.pad(fields, (0, missing))
    fields = fields.unflatten(1, (fields.shape[1] // grid.group_codes, grid.group_codes))
    packed = [
        reduce(or_, [_shifted(fields[..., place], shift) for place, b, shift in _overlaps(grid) if b == byte])
        for byte in range(grid.group_bytes)
    ]
    return torch.stack(packed, dim=-1).flatten(1)


def unpack(packed: Tensor, grid: Grid, columns: int) -> Tensor:
    """Inverse of `pack`: bytes [rows, packed_columns] to int8 codes [rows, columns]."""
    if grid.storage_bits == 8:
        return packed
    assert packed.dtype == torch.uint8, packed.dtype
    packed = packed.unflatten(1, (packed.shape[1] // grid.group_bytes, grid.group_bytes))
    mask = (1 << grid.storage_bits) - 1
    fields = [
        reduce(or_, [_shifted(packed[..., byte], -shift) for p, byte, shift in _overlaps(grid) if p == place]) & mask
        for place in range(grid.group_codes)
    ]
    codes = torch.stack(fields, dim=-1).flatten(1).to(torch.int8) + grid.qmin
    return codes[:, :columns]


def _overlaps(grid: Grid) -> list[tuple[int, int, int]]:
    """Which byte of a group has bits of which field: (field, byte, left shift of the field into this byte)."""
    places, group = range(grid.group_codes), range(grid.group_bytes)
    shifts = [(place, byte, place * grid.storage_bits - byte * 8) for place in places for byte in group]
    return [(place, byte, shift) for place, byte, shift in shifts if -grid.storage_bits < shift < 8]


def _shifted(x: Tensor, left: int) -> Tensor:
    """uint8 x << left, or x >> -left. Bits that leave the byte are lost."""
    return x << left if left >= 0 else x >> -left
