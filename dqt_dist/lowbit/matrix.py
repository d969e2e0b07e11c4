"""LowBitMatrix: the codes a rank holds, their scales, and where they lie in the model.

Everything is a buffer, not an nn.Parameter: integers cannot require a gradient, and DeepSpeed would clone a float master of
whatever parameter it is given. The gradient has its own sink, `main_grad`, filled by the linear's backward and emptied by the
optimizer, the way Megatron's main_grad works.

    codes   uint8 or int8 [rows, packed_columns]   the only copy of the weight
    scale   fp32 [matrices]                        one a logical matrix, the same on every rank, fixed after initialisation
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dqt_dist.lowbit.coordinates import ShardLayout
from dqt_dist.lowbit.grid import Grid
from dqt_dist.lowbit.packing import pack, storage_dtype, unpack
from dqt_dist.lowbit.rounding import round_nearest


class LowBitMatrix(nn.Module):
    """Packed codes of one shard. Built empty; `assign` gives it its place in the model, `set_codes` its values."""

    codes: Tensor
    scale: Tensor
    row_matrix: Tensor

    def __init__(self, rows: int, columns: int, grid: Grid, device: torch.device | None = None) -> None:
        super().__init__()
        self.rows, self.columns, self.grid = rows, columns, grid
        self.layout: ShardLayout | None = None
        self.main_grad: Tensor | None = None
        codes = torch.zeros(rows, grid.packed_columns(columns), dtype=storage_dtype(grid), device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.ones(1, device=device))
        self.register_buffer("row_matrix", torch.zeros(rows, dtype=torch.uint8, device=device), persistent=False)

    def assign(self, layout: ShardLayout) -> None:
        """Gives the shard its logical coordinates; raises ValueError when the shapes disagree."""
        if (layout.rows, layout.columns) != (self.rows, self.columns):
            raise ValueError(f"layout {layout.rows} x {layout.columns} for a shard of {self.rows} x {self.columns}")
        device = self.codes.device
        self.layout = layout
        self.scale = torch.ones(len(layout.matrices), device=device)
        self.row_matrix = layout.row_matrix().to(device=device, dtype=torch.uint8)

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    def row_scale(self) -> Tensor:
        """The scale of each row, fp32 [rows]; applied in the GEMM's epilogue, never multiplied into stored codes."""
        return self.scale[self.row_matrix.int()]

    def unpack(self, start: int = 0, stop: int | None = None) -> Tensor:
        """int8 codes of rows [start, stop): scratch for one use, [stop - start, columns]."""
        return unpack(self.codes[start:stop], self.grid, self.columns)

    def set_codes(self, codes: Tensor, start: int = 0) -> None:
        """Overwrites rows from `start` on with integer codes [n, columns]."""
        self.codes[start : start + codes.shape[0]] = pack(codes, self.grid)

    def set_weights(self, weights: Tensor, start: int = 0) -> None:
        """Quantises float weights [n, columns] to nearest, with the scales as they are, into rows from `start` on."""
        row_scale = self.row_scale()[start : start + weights.shape[0], None]
        self.set_codes(round_nearest(weights.float() / row_scale, self.grid), start)

    def dequantize(self) -> Tensor:
        """fp32 [rows, columns]: what the codes stand for. For tests and export; training never calls it."""
        return self.unpack().float() * self.row_scale()[:, None]

    def gradient_sink(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, bool]:
        """The gradient buffer [rows, columns] and whether it already holds a sum to add to."""
        if self.main_grad is None:
            self.main_grad = torch.empty(self.rows, self.columns, dtype=dtype, device=self.codes.device)
            return self.main_grad, False
        return self.main_grad, True

    def extra_repr(self) -> str:
        return f"{self.rows} x {self.columns}, bits={self.grid.bits}"
