"""The state of a run as logical tensors: views of everything that must survive, by the names of the model.

    codes/<matrix>                 packed codes          uint8 or int8 [rows, packed columns]
    scale/<matrix>                 scale                 fp32 [1, 1]
    latent/<matrix>                packed latents        uint8 or int8 [rows, packed columns]; where there are latents
    latent_scale/<matrix>          scale of latents      fp32 [1, 1]
    low_bit.<moment>/<matrix>      optimizer state       fp32 or uint8, exp_avg and exp_avg_sq [rows, columns]; with
                                                         8-bit moments also the exponents of blocks,
                                                         *_scale [rows, columns / 32]; of a factored second moment
                                                         row_mean [rows, 1], column_mean [1, columns] and
                                                         matrix_mean [1, 1]
    parameter/<name>               master value          fp32 [rows, columns]
    parameter.<moment>/<name>      optimizer state       fp32 [rows, columns]

Nothing is copied: saving reads the live tensors and loading writes into them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from dqt_dist.checkpoint.logical_tensor import LogicalState, LogicalTensor
from dqt_dist.layers.parameters import low_bit_matrices
from dqt_dist.lowbit.coordinates import LogicalMatrix, ShardLayout
from dqt_dist.lowbit.grid import Grid
from dqt_dist.optim.deepspeed_adapter import MasterShard
from dqt_dist.optim.engine import CombinedOptimizer
from dqt_dist.optim.owned_rows import OwnedRows


def logical_state(model_chunks: nn.Module, optimizer: CombinedOptimizer) -> LogicalState:
    """Views of all of this rank's state, by logical name."""
    state: LogicalState = {}
    for weight in low_bit_matrices(model_chunks):
        assert weight.layout is not None
        _add_packed(state, "codes", weight.layout, weight.grid, weight.codes, *weight.held_rows)
        _add_scales(state, "scale", weight.layout, weight.scale)
        if weight.latent_grid is not None:
            _add_scales(state, "latent_scale", weight.layout, weight.latent_scale)
    for rows in optimizer.low_bit.rows:
        _add_optimizer_state(state, rows)
    for shard in optimizer.shards:
        _add_parameter(state, shard, optimizer)
    return state


def _add(state: LogicalState, name: str, shape: tuple[int, int], offset: tuple[int, int], view: Tensor) -> None:
    state.setdefault(name, LogicalTensor(shape, view.dtype)).add(offset, view)


def _add_packed(
    state: LogicalState, kind: str, layout: ShardLayout, grid: Grid, packed: Tensor, start: int, stop: int
) -> None:
    """Packed codes or latents of shard rows [start, stop). A rank's columns begin at a whole group of packed ones."""
    offset = grid.packed_columns(layout.column_offset)
    for matrix, row, local, count in layout.pieces(start, stop):
        shape = (matrix.rows, grid.packed_columns(matrix.columns))
        _add(state, f"{kind}/{matrix.name}", shape, (row, offset), packed[local - start : local - start + count])


def _add_scales(state: LogicalState, kind: str, layout: ShardLayout, scale: Tensor) -> None:
    for index, matrix in enumerate(layout.matrices):
        _add(state, f"{kind}/{matrix.name}", (1, 1), (0, 0), scale[index].view(1, 1))


def _add_optimizer_state(state: LogicalState, rows: OwnedRows) -> None:
    """Latents are packed like codes. Moments have a value per column, or one per block of columns. A factored second
    moment is a column [rows, 1], a row [1, columns] and a number [1, 1] per matrix."""
    layout = rows.weight.layout
    assert layout is not None
    for name, tensor in rows.state.items():
        if name == "latent":
            assert rows.weight.latent_grid is not None
            _add_packed(state, name, layout, rows.weight.latent_grid, tensor, rows.start, rows.stop)
            continue
        if name == "matrix_mean":
            _add_scales(state, f"low_bit.{name}", layout, tensor)
            continue
        if name == "column_mean":
            for index, matrix in enumerate(layout.matrices):
                view = tensor[index : index + 1]
                _add(state, f"low_bit.{name}/{matrix.name}", (1, matrix.columns), (0, layout.column_offset), view)
            continue
        for matrix, row, local, count in layout.pieces(rows.start, rows.stop):
            view = tensor[local - rows.start : local - rows.start + count]
            if tensor.dim() == 1:
                shape, offset, view = (matrix.rows, 1), (row, 0), view[:, None]
            else:
                per_value = layout.columns // tensor.shape[1]
                shape = (matrix.rows, matrix.columns // per_value)
                offset = (row, layout.column_offset // per_value)
            _add(state, f"low_bit.{name}/{matrix.name}", shape, offset, view)


def _add_parameter(state: LogicalState, shard: MasterShard, optimizer: CombinedOptimizer) -> None:
    """The owned elements of a parameter's master value and moments."""
    if shard.master is None:
        return
    kinds = {"parameter": shard.master.detach()}
    kinds |= {f"parameter.{name}": value for name, value in optimizer.high_precision.moments(shard).items()}
    layout = shard.parameter.layout
    for kind, tensor in kinds.items():
        for matrix, offset, view in rectangles(layout, shard.start, shard.view(tensor)):
            _add(state, f"{kind}/{matrix.name}", (matrix.rows, matrix.columns), offset, view)


def rectangles(
    layout: ShardLayout, start: int, flat: Tensor
) -> Iterator[tuple[LogicalMatrix, tuple[int, int], Tensor]]:
    """Cuts elements [start, start + len(flat)) of a row-major shard into rectangles of logical matrices.

    ZeRO partitions flattened parameters anywhere: a range is the end of a row, whole rows, the beginning of a row.
    """
    columns, position, end = layout.columns, start, start + flat.numel()
    while position < end:
        row, column = divmod(position, columns)
        if column == 0 and end - position >= columns:
            stop_row, width = end // columns, columns
        else:
            stop_row, width = row + 1, min(columns - column, end - position)
        for matrix, logical_row, local, count in layout.pieces(row, stop_row):
            first = max(position, local * columns + column) - start
            view = flat[first : first + count * width].view(count, width)
            yield matrix, (logical_row, layout.column_offset + column), view
        position += (stop_row - row) * width
