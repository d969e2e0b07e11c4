"""Packing: nothing is lost, the bits lie where the drawing says, and rows are ranges of bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dqt_dist.config import Bits
from dqt_dist.lowbit.grid import Grid, make_grid
from dqt_dist.lowbit.packing import pack, storage_dtype, unpack

ALL_BITS: list[Bits] = ["ternary", 2, 3, 4, 5, 6, 7, 8]
ROW_LENGTHS = [*range(1, 10), 31, 64, 123]


def every_code_everywhere(grid: Grid, columns: int, dtype: torch.dtype = torch.int8) -> Tensor:
    """One row per code, each row shifted by one against the row before: every code is once in every column."""
    num_codes = grid.qmax - grid.qmin + 1
    shifted = (torch.arange(num_codes)[:, None] + torch.arange(columns)) % num_codes + grid.qmin
    return shifted.to(dtype)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("columns", ROW_LENGTHS)
def test_unpack_inverts_pack_for_every_code_in_every_place(bits: Bits, columns: int) -> None:
    grid = make_grid(bits)
    for dtype in (torch.int8, torch.int64):
        codes = every_code_everywhere(grid, columns, dtype)
        packed = pack(codes, grid)
        unpacked = unpack(packed, grid, columns)
        assert packed.dtype == storage_dtype(grid) and unpacked.dtype == torch.int8
        assert torch.equal(unpacked, codes.to(torch.int8))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_pack_inverts_unpack_for_every_byte(bits: Bits) -> None:
    """Every byte at every place of a group, beside other bytes."""
    grid = make_grid(bits)
    every_byte = torch.arange(256, dtype=torch.uint8)
    groups = torch.stack([every_byte.roll(85 * place) for place in range(grid.group_bytes)], dim=1)
    packed = groups.view(storage_dtype(grid)).view(2, 128 * grid.group_bytes)
    codes = unpack(packed, grid, 128 * grid.group_codes)
    assert torch.equal(pack(codes, grid), packed)


def group_as_drawn(codes: list[int], grid: Grid) -> bytes:
    """The drawing in packing.py with Python integers: the first column in the lowest bits, absent columns 0."""
    word = sum((code - grid.qmin) << (grid.storage_bits * place) for place, code in enumerate(codes))
    return word.to_bytes(grid.group_bytes, "little")


@pytest.mark.parametrize("bits", ["ternary", 2, 3, 4, 6])
@pytest.mark.parametrize("columns", [1, 5, 7, 16])
def test_bits_lie_as_drawn(bits: Bits, columns: int) -> None:
    """Control: with the first column in the highest bits, every row that is not symmetric differs."""
    grid = make_grid(bits)
    codes = every_code_everywhere(grid, columns)
    step = grid.group_codes
    expected = [
        b"".join(group_as_drawn(row[first : first + step], grid) for first in range(0, columns, step))
        for row in codes.tolist()
    ]
    assert [bytes(row) for row in pack(codes, grid).tolist()] == expected


def test_known_bytes() -> None:
    """The same drawing once more as literals: checkpoints and exported files depend on it."""
    ternary, four = make_grid("ternary"), make_grid(4)
    assert pack(torch.tensor([[-1, 0, 1, -1, 1]]), ternary).tolist() == [[0b00_10_01_00, 0b00_00_00_10]]
    assert pack(torch.tensor([[-8, 7, 0]]), four).tolist() == [[0b1111_0000, 0b0000_1000]]
    six = [0b01_000000, 0b1111_0000, 0b100001_11, 0b00_111111, 0, 0]  # fields 0, 1, 63, 33 and 63
    assert pack(torch.tensor([[-32, -31, 31, 1, 31]]), make_grid(6)).tolist() == [six]
    assert pack(torch.tensor([[-128, 127]]), make_grid(8)).tolist() == [[-128, 127]]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_bytes_are_numel_times_storage_bits_over_8(bits: Bits) -> None:
    grid = make_grid(bits)
    packed = pack(torch.zeros(6, 20, dtype=torch.int8), grid)
    assert packed.nbytes == 6 * 20 * grid.storage_bits // 8
    # A last group that is not full takes all its bytes.
    odd = pack(torch.zeros(6, 21, dtype=torch.int8), grid)
    assert odd.nbytes == 6 * -(-21 // grid.group_codes) * grid.group_bytes


@pytest.mark.parametrize("bits", ALL_BITS)
def test_rows_of_the_packed_are_the_packed_rows(bits: Bits) -> None:
    """ZeRO updates, sends and gathers ranges of rows as bytes, and relies on this."""
    grid = make_grid(bits)
    codes = every_code_everywhere(grid, 13)
    packed = pack(codes, grid)
    assert torch.equal(packed[1:3], pack(codes[1:3], grid))
    assert torch.equal(unpack(packed[1:3], grid, 13), codes[1:3])
    assert unpack(packed[:0], grid, 13).shape == (0, 13)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_columns_of_the_packed_are_the_packed_columns(bits: Bits) -> None:
    """Tensor-parallel ranks hold ranges of columns, and checkpoints put them together as bytes."""
    grid = make_grid(bits)
    codes = every_code_everywhere(grid, 24)
    packed = pack(codes, grid)
    for first, last in ((0, 4), (4, 12), (12, 24)):
        part = packed[:, grid.packed_columns(first) : grid.packed_columns(last)]
        assert torch.equal(part, pack(codes[:, first:last], grid))
        assert torch.equal(unpack(part, grid, last - first), codes[:, first:last])
