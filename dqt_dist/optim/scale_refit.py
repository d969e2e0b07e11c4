"""Refits the scales of all low-bit shards of this rank from the sums of |L| (lowbit/latent.py, `refit_scale`).

    begin_step   sums of |L| of the last update, two all-reduces of 8 bytes per matrix (TP, owners of rows), new scales
    write        new scales and what follows from them for each row, together with the new codes

Everything is done for all shards at once. A model has a hundred shards and more, and a launch per shard and operation
would be thousands per step: more than a stream takes ahead (1,024), so the GPU would wait for Python in every step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dqt_dist.config import QuantizationConfig
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.latent import codes_per_latent, refit_scale, scale_multiple
from dqt_dist.lowbit.update import LATENT_COUNTS
from dqt_dist.optim.owned_rows import OwnedRows
from dqt_dist.parallel.groups import Groups


class ScaleRefit:
    """The refit of one rank's shards. Matrices are numbered through all of them, in the order of `shards`."""

    def __init__(
        self, shards: list[OwnedRows], quantization: QuantizationConfig, groups: Groups, rows_sharded: bool
    ) -> None:
        self.shards, self.groups, self.rows_sharded = shards, groups, rows_sharded
        self.interval = quantization.scale_refit_interval
        self.weights = [rows.weight for rows in shards]
        self.threshold = quantization.latent_threshold
        self.multiple = scale_multiple(make_grid(quantization.bits), quantization.scale_sigmas)
        layouts = [weight.layout for weight in self.weights if weight.layout is not None]
        self._num_matrices = [len(layout.matrices) for layout in layouts]
        self._num_rows = [weight.rows for weight in self.weights]
        numel = [matrix.rows * matrix.columns for layout in layouts for matrix in layout.matrices]
        self._numel = torch.tensor(numel, device=groups.device)
        first = [sum(self._num_matrices[:index]) for index in range(len(shards))]
        self._matrix_of_row = [weight.row_matrix.long() + n for weight, n in zip(self.weights, first, strict=True)]
        """Number of the matrix of each row, of each shard."""
        self._matrix_of_count: tuple[list[torch.Size], Tensor] | None = None
        """Number of the matrix of each count, with the shapes of the counts it was made for."""
        self._new: Tensor | None = None
        """Scale of each matrix that this step writes; None in a step without a refit."""

    @torch.no_grad()
    def begin_step(self, step: int) -> None:
        """Makes the scales of a step in which there is a refit. A collective call."""
        self._new = None
        if not self.interval or step % self.interval:
            return
        abs_sum = self._abs_sums()
        dist.all_reduce(abs_sum, group=self.groups.tensor)
        if self.rows_sharded:
            dist.all_reduce(abs_sum, group=self.groups.data)
        latent_scale = torch.cat([weight.latent_scale for weight in self.weights])
        before = torch.cat([weight.scale for weight in self.weights])
        self._new = refit_scale(abs_sum, self._numel, latent_scale, before, self.multiple)

    @torch.no_grad()
    def write(self, clip: Tensor) -> None:
        """Writes the scales of this step, if it has some, to all shards. A `clip` (0-dim) of 0 skips the step."""
        if self._new is not None:
            before = torch.cat([weight.scale for weight in self.weights])
            self._write(slice(None), torch.where(clip > 0, self._new, before), torch.cat(self._matrix_of_row))

    @torch.no_grad()
    def write_one(self, index: int) -> None:
        """Writes the scales of this step, if it has some, to one shard."""
        if self._new is not None:
            scale = self._new.split(self._num_matrices)[index]
            self._write(slice(index, index + 1), scale, self.weights[index].row_matrix.int())

    def _write(self, chosen: slice, scale: Tensor, matrix_of_row: Tensor) -> None:
        """Writes `scale` of the matrices of some shards, and what follows from it. `matrix_of_row` are places in it."""
        weights, num_rows = self.weights[chosen], self._num_rows[chosen]
        latent_scale = torch.cat([weight.latent_scale for weight in weights])
        ratio = codes_per_latent(scale, latent_scale, self.threshold)
        of_rows = (values[matrix_of_row].split(num_rows) for values in (scale, ratio))
        new = zip(scale.split(self._num_matrices[chosen]), *of_rows, strict=True)
        written = [tensor for weight in weights for tensor in weight.scale_tensors()]
        copies = [tensor for tensors in new for tensor in tensors]
        torch._foreach_copy_(written, copies)  # pyright: ignore[reportPrivateImportUsage]
        for weight in weights:
            weight.scale_was_refitted()

    def _abs_sums(self) -> Tensor:
        """Sum of |L| over this rank's rows of each matrix, int64: counted by the last update, or now."""
        counts = [count for rows in self.shards for count in rows.row_counts]
        if not counts:
            return torch.cat([rows.latent_abs_sum() for rows in self.shards])
        shapes = [count.shape for count in counts]
        if self._matrix_of_count is None or self._matrix_of_count[0] != shapes:
            self._matrix_of_count = shapes, self._find_matrix_of_count()
        of_parts = torch.cat([count.flatten(0, 1) for count in counts])[:, LATENT_COUNTS.index("latent_abs_sum")]
        return torch.zeros_like(self._numel).index_add_(0, self._matrix_of_count[1], of_parts.long())

    def _find_matrix_of_count(self) -> Tensor:
        found = []
        for rows, matrix_of_row in zip(self.shards, self._matrix_of_row, strict=True):
            first = rows.start
            for count in rows.row_counts:
                found.append(matrix_of_row[first : first + len(count)].repeat_interleave(count.shape[1]))
                first += len(count)
        return torch.cat(found)
