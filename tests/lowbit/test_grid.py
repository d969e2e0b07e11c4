"""Grids: smallest and largest code, groups, bytes per row, and refused values of `bits`."""

from __future__ import annotations

import pytest

from dqt_dist.config import CODES_PER_GROUP, Bits
from dqt_dist.lowbit.grid import make_grid

# bits, qmin, qmax, storage bits, codes and bytes of a group, bytes of a row of 5 codes
TABLE: list[tuple[Bits, int, int, int, tuple[int, int], int]] = [
    ("ternary", -1, 1, 2, (4, 1), 2),
    (2, -2, 1, 2, (4, 1), 2),
    (3, -4, 3, 4, (2, 1), 3),
    (4, -8, 7, 4, (2, 1), 3),
    (5, -16, 15, 8, (1, 1), 5),
    (6, -32, 31, 6, (4, 3), 6),
    (7, -64, 63, 8, (1, 1), 5),
    (8, -128, 127, 8, (1, 1), 5),
]


@pytest.mark.parametrize(("bits", "qmin", "qmax", "storage_bits", "group", "row_bytes"), TABLE)
def test_grid_table(
    bits: Bits, qmin: int, qmax: int, storage_bits: int, group: tuple[int, int], row_bytes: int
) -> None:
    grid = make_grid(bits)
    assert (grid.qmin, grid.qmax, grid.storage_bits, grid.packed_columns(5)) == (qmin, qmax, storage_bits, row_bytes)
    assert (grid.group_codes, grid.group_bytes) == group
    # A group fills its bytes, and a draw of 4 words (config.CODES_PER_GROUP) has whole groups.
    assert grid.group_codes * storage_bits == 8 * grid.group_bytes and CODES_PER_GROUP % grid.group_codes == 0
    # Every code has a field of its own.
    assert qmax - qmin < 1 << storage_bits


@pytest.mark.parametrize("bits", [0, 1, 9, -2, True, 1.58, "4", "binary", None])
def test_what_is_no_grid_is_refused(bits: object) -> None:
    with pytest.raises(ValueError, match="bits must be 'ternary' or an integer from 2 to 8"):
        make_grid(bits)  # type: ignore[arg-type]
