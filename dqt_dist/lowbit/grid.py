"""Grids: the integers that a low-bit weight may take, and how many codes share how many bytes.

    name      codes           stored as                     bytes per weight
    ternary   -1 .. 1         4 codes in 1 byte, 2 bits     1/4
    2 bit     -2 .. 1         4 codes in 1 byte, 2 bits     1/4
    3 bit     -4 .. 3         2 codes in 1 byte, 4 bits     1/2
    4 bit     -8 .. 7         2 codes in 1 byte, 4 bits     1/2
    5 bit     -16 .. 15       1 code in 1 byte, int8        1
    6 bit     -32 .. 31       4 codes in 3 bytes, 6 bits    3/4
    7 bit     -64 .. 63       1 code in 1 byte, int8        1
    8 bit     -128 .. 127     1 code in 1 byte, int8        1

A code is an integer on the grid. The weight of a code is `scale * code`. Two's complement fixes Qn = -2^(b-1) and Qp =
2^(b-1) - 1. The ternary grid is symmetric; it is the 1.58 bit of the BitNet b1.58 paper (arXiv 2402.17764).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dqt_dist.config import Bits


@dataclass(frozen=True)
class Grid:
    """One grid. `qmin` and `qmax` are its smallest and largest code (Qn, Qp in the papers)."""

    bits: Bits
    qmin: int
    qmax: int
    storage_bits: int
    """Bits that one code takes in memory: 2, 4, 6 or 8."""

    @property
    def group_codes(self) -> int:
        """Codes of a group. A group is the fewest neighbouring codes that fill whole bytes."""
        return 8 // math.gcd(8, self.storage_bits)

    @property
    def group_bytes(self) -> int:
        return self.storage_bits // math.gcd(8, self.storage_bits)

    def packed_columns(self, columns: int) -> int:
        """Bytes that hold one row of `columns` codes. A row always fills whole groups."""
        return -(-columns // self.group_codes) * self.group_bytes


def make_grid(bits: Bits) -> Grid:
    """Returns the grid of `bits` ("ternary" or 2..8). Raises ValueError for anything else."""
    if bits == "ternary":
        return Grid(bits, -1, 1, storage_bits=2)
    if isinstance(bits, bool) or bits not in range(2, 9):
        raise ValueError(f"bits must be 'ternary' or an integer from 2 to 8, not {bits!r}")
    storage_bits = {2: 2, 3: 4, 4: 4, 6: 6}.get(bits, 8)
    return Grid(bits, -(1 << (bits - 1)), (1 << (bits - 1)) - 1, storage_bits)
