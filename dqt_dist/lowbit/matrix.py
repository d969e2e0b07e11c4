"""LowBitMatrix: the codes that a rank holds, their scales, and their place in the model.

All tensors are buffers, none is an nn.Parameter: integers cannot require a gradient, and DeepSpeed would clone a float
master of each parameter. The gradient has its own `GradientBuffer`. The linear's backward fills the gradient buffer and
the optimizer empties it, as with Megatron's main_grad (`gradient_buffer.py`).

    codes          uint8 or int8 [held rows, packed_columns]   what products see; without latents the only copy of the
                                                               weight
    scale          fp32 [matrices]                             weight of a code; one per logical matrix, equal on every
                                                               rank
    latent_scale   fp32 [matrices]                             weight of a latent, where there are latents

A rank holds all rows of its shard. After `keep_rows` (ZeRO stage 3) it holds some rows, and `gather` returns all rows
for a product. Row numbers are always those of the shard. Latents (`latent.py`) are optimizer state: they lie with the
owner of a row, beside its moments, and are never gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dqt_dist.config import QuantizationConfig
from dqt_dist.lowbit.coordinates import ShardLayout
from dqt_dist.lowbit.gradient_buffer import GradientBuffer
from dqt_dist.lowbit.grid import Grid, make_grid
from dqt_dist.lowbit.latent import codes_of_latents, codes_per_latent
from dqt_dist.lowbit.packing import pack, storage_dtype, unpack
from dqt_dist.lowbit.rounding import round_nearest


class ScaleTensors(NamedTuple):
    """The scale of a matrix with latents, and what follows from it."""

    scale: Tensor
    """fp32 [matrices]"""
    row_scale: Tensor
    """fp32 [rows]"""
    row_codes_per_latent: Tensor
    """fp32 [rows]"""


class LowBitMatrix(nn.Module):
    """Packed codes of one shard. Built with zeros. `assign` sets the place in the model, `set_codes` the values."""

    codes: Tensor
    scale: Tensor
    row_matrix: Tensor
    latent_scale: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        grid: Grid,
        device: torch.device | None = None,
        latent_grid: Grid | None = None,
        latent_threshold: int | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.columns, self.grid = rows, columns, grid
        self.latent_grid, self.latent_threshold = latent_grid, latent_threshold
        self.layout: ShardLayout | None = None
        self.first_row = 0
        self.gather: Callable[[], Tensor] | None = None
        """Returns the packed codes of all rows. None where this rank holds all rows."""
        self._of_rows: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        """Values of each row, with the versions of the tensors they were made from."""
        self.gradient = GradientBuffer("", rows, columns)
        codes = torch.zeros(rows, grid.packed_columns(columns), dtype=storage_dtype(grid), device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.ones(1, device=device))
        self.register_buffer("latent_scale", None if latent_grid is None else torch.ones(1, device=device))
        self.register_buffer("row_matrix", torch.zeros(rows, dtype=torch.uint8, device=device), persistent=False)

    @classmethod
    def of(cls, quantization: QuantizationConfig, rows: int, columns: int, device: torch.device) -> LowBitMatrix:
        """A matrix on the grids of a config."""
        latent_grid = None if quantization.latent_bits is None else make_grid(quantization.latent_bits)
        return cls(rows, columns, make_grid(quantization.bits), device, latent_grid, quantization.latent_threshold)

    def assign(self, layout: ShardLayout) -> None:
        """Sets the logical coordinates of the shard. Raises ValueError when the shapes disagree."""
        if (layout.rows, layout.columns) != (self.rows, self.columns):
            raise ValueError(f"layout {layout.rows} x {layout.columns} for a shard of {self.rows} x {self.columns}")
        device = self.codes.device
        self.layout = layout
        self.gradient.name = " ".join(matrix.name for matrix in layout.matrices)
        self.scale = torch.ones(len(layout.matrices), device=device)
        if self.latent_grid is not None:
            self.latent_scale = torch.ones_like(self.scale)
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
        return self._expanded("scale", lambda: self.scale)

    def row_latent_scale(self) -> Tensor:
        """The latent scale of each row, fp32 [rows]."""
        return self._expanded("latent_scale", lambda: self.latent_scale)

    def row_codes_per_latent(self) -> Tensor:
        """r of each row, fp32 [rows]; see latent.py."""
        return self._expanded(
            "codes_per_latent", lambda: codes_per_latent(self.scale, self.latent_scale, self.latent_threshold)
        )

    def _expanded(self, name: str, of_matrices: Callable[[], Tensor]) -> Tensor:
        """A value of each matrix for each of its rows, fp32 [rows].

        The result is kept, because a step asks for it several times. After a scale has been written, it is written
        again to the same memory: CUDA graphs read it there.
        """
        versions = self._scale_versions()
        kept = self._of_rows.get(name)
        if kept is not None and kept[0] == versions:
            return kept[1]
        values = of_matrices()[self.row_matrix.int()]
        if kept is not None and kept[1].shape == values.shape and kept[1].device == values.device:
            values = kept[1].copy_(values)
        self._of_rows[name] = (versions, values)
        return values

    def _scale_versions(self) -> tuple[int, ...]:
        """What tells whether a scale has been written, or replaced."""
        sources = self.scale, self.latent_scale
        return tuple(number for source in sources if source is not None for number in (id(source), source._version))

    def scale_tensors(self) -> ScaleTensors:
        """The tensors that a refit of the scale writes, to be marked as written by `scale_was_refitted`."""
        return ScaleTensors(self.scale, self.row_scale(), self.row_codes_per_latent())

    def scale_was_refitted(self) -> None:
        """Says that all of `scale_tensors` have been written."""
        versions = self._scale_versions()
        self._of_rows = {name: (versions, values) for name, (_, values) in self._of_rows.items()}

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

        With latents the codes are those of the nearest latents. The first row written is the held row `start`.
        """
        rows = slice(start, start + weights.shape[0])
        if self.latent_grid is None:
            codes = round_nearest(weights.float() / self.row_scale()[rows, None], self.grid)
        else:
            codes = codes_of_latents(self.nearest_latents(weights, start), self.row_codes_per_latent()[rows], self.grid)
        self.set_codes(codes, start)

    def nearest_latents(self, weights: Tensor, start: int) -> Tensor:
        """int8 latents nearest to float weights [n, columns] of rows from `start` on."""
        assert self.latent_grid is not None
        row_scale = self.row_latent_scale()[start : start + weights.shape[0], None]
        return round_nearest(weights.float() / row_scale, self.latent_grid)

    def dequantize(self) -> Tensor:
        """The weights, scale * code, as fp32 [rows, columns]. For tests and export; training never calls it."""
        return self.unpack().float() * self.row_scale()[:, None]

    def extra_repr(self) -> str:
        latents = "" if self.latent_grid is None else f", latent_bits={self.latent_grid.bits}"
        return f"{self.rows} x {self.columns}, bits={self.grid.bits}{latents}"
