"""A range of a flattened shard, cut as by ZeRO, becomes rectangles of logical matrices that cover it exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqt_dist.checkpoint.state import rectangles
from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout

Q, K = LogicalMatrix("q", 6, 10), LogicalMatrix("k", 4, 10)
LAYOUTS = {
    "whole": ShardLayout((Q,), (RowBlock(0, 0, 6),), 10),
    "interleaved": ShardLayout(
        (Q, K), (RowBlock(0, 3, 2), RowBlock(1, 0, 1), RowBlock(0, 5, 1), RowBlock(1, 1, 3)), 10
    ),
    "columns split": ShardLayout((Q,), (RowBlock(0, 0, 6),), 4, column_offset=4),
    "vector": ShardLayout((LogicalMatrix("norm", 7, 1),), (RowBlock(0, 2, 5),), 1),
}


def place_of(layout: ShardLayout, element: int) -> tuple[str, int, int]:
    """(matrix, row, column) of an element of the flattened shard, one at a time: the definition."""
    row, column = divmod(element, layout.columns)
    matrix = layout.matrices[int(layout.row_matrix()[row])]
    return matrix.name, int(layout.row_logical()[row]), layout.column_offset + column


@pytest.mark.parametrize("name", LAYOUTS)
@given(data=st.data())
def test_rectangles_cover_a_range_exactly_and_share_its_memory(name: str, data: st.DataObject) -> None:
    layout = LAYOUTS[name]
    size = layout.rows * layout.columns
    start = data.draw(st.integers(0, size))
    flat = torch.arange(start, data.draw(st.integers(start, size)))
    found: dict[tuple[str, int, int], int] = {}
    for matrix, (row, column), view in rectangles(layout, start, flat):
        assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
        for i in range(view.shape[0]):
            for j in range(view.shape[1]):
                assert found.setdefault((matrix.name, row + i, column + j), int(view[i, j])) == view[i, j]
    assert found == {place_of(layout, int(element)): int(element) for element in flat}
