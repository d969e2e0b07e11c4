"""LowBitMatrix: the codes that a rank holds, their scales, and their place in the model.

All tensors are buffers, none is an nn.Parameter: integers cannot require a gradient, and DeepSpeed would clone a float
master of each parameter. The gradient has its own `GradientBuffer`. The linear's backward fills the gradient buffer and
the optimizer empties it, as with Megatron's main_grad (`gradient_buffer.py`).

    codes   uint8 or int8 [held rows, packed_columns]   the only copy of the weight
    scale   fp32 [matrices]                             one per logical matrix, equal on every rank, fixed after
                                                        initialisation

A rank holds all rows of its shard. After `keep_rows` (ZeRO stage 3) it holds some rows, and `gather` returns all rows
for a product. Row numbers are always those of the shard.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dqt_dist.lowbit.coordinates import ShardLayout
from dqt_dist.lowbit.gradient_buffer import GradientBuffer
from dqt_dist.lowbit.grid import Grid
from dqt_dist.lowbit.packing import pack, storage_dtype, unpack
from dqt_dist.lowbit.rounding import round_nearest


class LowBitMatrix(nn.Module):
    """Packed codes of one shard. Built with zeros. `assign` sets the place in the model, `set_codes` the values."""

    codes: Tensor
    scale: Tensor
    row_matrix: Tensor

    def __init__(self, rows: int, columns: int, grid: Grid, device: torch.device | None = None) -> None:
        super().__init__()
        self.rows, self.columns, self.grid = rows, columns, grid
        self.layout: ShardLayout | None = None
        self.first_row = 0
        self.gather: Callable[[], Tensor] | None = None
        """Returns the packed codes of all rows. None where this rank holds all rows."""
        # Cached, because products ask for the row scale several times per step. Recomputed after the scale was written.
        self._row_scale: tuple[tuple[int, int], Tensor] | None = None
        self.gradient = GradientBuffer("", rows, columns)
        codes = torch.zeros(rows, grid.packed_columns(columns), dtype=storage_dtype(grid), device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.ones(1, device=device))
        self.register_buffer("row_matrix", torch.zeros(rows, dtype=torch.uint8, device=device), persistent=False)

    def assign(self, layout: ShardLayout) -> None:
        """Sets the logical coordinates of the shard. Raises ValueError when the shapes disagree."""
        if (layout.rows, layout.columns) != (self.rows, self.columns):
            raise ValueError(f"layout {layout.rows} x {layout.columns} for a shard of {self.rows} x {self.columns}")
        device = self.codes.device
        self.layout = layout
        self.gradient.name = layout.matrices[0].name
        self.scale = torch.ones(len(layout.matrices), device=device)
        self.row_matrix = layout.row_matrix().to(device=device, dtype=torch.uint8)

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def held_rows(self) -> tuple[int, int]:
        """[start, stop) of the rows whose codes this rank holds."""
        return self.first_row, self.first_row + self.codes.shape[0]

    def keep_rows(self, start: int, stop: int, gather: Callable[[], Tensor]) -> None:
        """Drops the codes of all rows but [start, stop)."""
        self.codes, self.first_row, self.gather = self.codes[start:stop].clone(), start, gather

    def row_scale(self) -> Tensor:
        """The scale of each row, fp32 [rows]. Applied in the GEMM's epilogue, never multiplied into stored codes."""
        version = (id(self.scale), self.scale._version)
        if self._row_scale is None or self._row_scale[0] != version:
            self._row_scale = (version, self.scale[self.row_matrix.int()])
        return self._row_scale[1]

    def packed(self, start: int, stop: int) -> Tensor:
        """View of the packed codes of held rows [start, stop)."""
        first, last = self.held_rows
        assert first <= start <= stop <= last, (start, stop, self.held_rows)
        return self.codes[start - first : stop - first]

    def whole(self) -> Tensor:
        """Packed codes of all rows. Where this rank does not hold all rows, the result is scratch for one use."""
        return self.codes if self.gather is None else self.gather()

    def unpack(self, start: int | None = None, stop: int | None = None) -> Tensor:
        """int8 codes of held rows [start, stop), or of all rows, [stop - start, columns]. Scratch for one use."""
        packed = self.whole() if start is None or stop is None else self.packed(start, stop)
        return unpack(packed, self.grid, self.columns)

    def set_codes(self, codes: Tensor, start: int = 0) -> None:
        """Overwrites held rows from `start` on with integer codes [n, columns]."""
        self.packed(start, start + codes.shape[0]).copy_(pack(codes, self.grid))

    def set_weights(self, weights: Tensor, start: int = 0) -> None:
        """Rounds float weights [n, columns] to the nearest codes, with the present scales, and writes the codes.

        The first row written is the held row `start`.
        """
        row_scale = self.row_scale()[start : start + weights.shape[0], None]
        self.set_codes(round_nearest(weights.float() / row_scale, self.grid), start)

    def dequantize(self) -> Tensor:
        """The weights, scale * code, as fp32 [rows, columns]. For tests and export; training never calls it."""
        return self.unpack().float() * self.row_scale()[:, None]

    def extra_repr(self) -> str:
        return f"{self.rows} x {self.columns}, bits={self.grid.bits}"
