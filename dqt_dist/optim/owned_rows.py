"""The part of a low-bit shard that this rank updates: some rows of the codes and the optimizer state of these rows.

`UpdateSettings` holds what an update needs besides gradient and state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dqt_dist.kernels.low_bit_update import sum_by_matrix
from dqt_dist.lowbit.gradient_buffer import GradientBuffer
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.packing import unpack
from dqt_dist.lowbit.update import RoundingKey

# Elements updated at once where the update has temporaries. An update has about a dozen temporaries, fp32 and int64.
# With blocks of this size the temporaries take little memory compared with the moments.
ELEMENTS_PER_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass
class OwnedRows:
    """Rows [start, stop) of one low-bit shard, which this rank updates."""

    weight: LowBitMatrix
    start: int
    stop: int
    state: dict[str, Tensor] = field(default_factory=dict)
    """Optimizer state of the rows: moments by the names of their rule, and packed latents as "latent"."""
    row_counts: list[Tensor] = field(default_factory=list)
    """One tensor per block of the last update, [rows, parts of a row, counts]; empty before the first update."""

    @property
    def gradient(self) -> GradientBuffer:
        """The gradient of the whole shard. The update takes the mean of the owned rows."""
        return self.weight.gradient

    @property
    def row_matrix(self) -> Tensor:
        """Index of the logical matrix of each owned row, int64 [rows]."""
        return self.weight.row_matrix[self.start : self.stop].long()

    @cached_property
    def matrix_rows(self) -> Tensor:
        """Rows of each whole logical matrix, fp64 [matrices]. Made once, because a copy to the device waits for it."""
        assert self.weight.layout is not None
        rows = [float(matrix.rows) for matrix in self.weight.layout.matrices]
        return torch.tensor(rows, dtype=torch.float64, device=self.weight.codes.device)

    def counts(self) -> Tensor:
        """What the last update counted in the owned rows of each matrix: int64 [matrices, counts].

        The counts are those of COUNTS, or with latents of LATENT_COUNTS (lowbit/update.py).
        """
        return sum_by_matrix(self.weight, self.start, torch.cat(self.row_counts))

    def latent_abs_sum(self) -> Tensor:
        """Sum of |L| over the owned rows of each matrix, int64 [matrices], from the latents themselves."""
        total = torch.zeros(len(self.weight.scale), dtype=torch.int64, device=self.weight.codes.device)
        assert self.weight.latent_grid is not None
        for block in self.row_blocks():
            latents = unpack(self.state["latent"][block], self.weight.latent_grid, self.weight.columns)
            total.index_add_(0, self.row_matrix[block], latents.int().abs().sum(dim=1).to(total.device))
        return total

    def row_blocks(self, whole: bool = False) -> Iterator[slice]:
        """Row ranges, relative to `start`, to update one after the other. With `whole` one range has all rows."""
        rows_at_once = max(1, ELEMENTS_PER_BLOCK[self.weight.codes.device.type] // self.weight.columns)
        if whole:
            rows_at_once = max(1, self.stop - self.start)
        for low in range(0, self.stop - self.start, rows_at_once):
            yield slice(low, min(low + rows_at_once, self.stop - self.start))


@dataclass(frozen=True)
class UpdateSettings:
    """What an update needs besides gradient and state."""

    learning_rate: float
    weight_decay: float
    key: RoundingKey
    clip: Tensor | None
    """fp32 scalar on the device, a factor of the gradients. None when the global norm is not known yet."""
    norm: Tensor | None
    """The global norm, of the gradients before they are multiplied by `clip`; None when it is not known yet."""
    counted: bool
    """Whether the counts of the update will be looked at. The sums of |L| are there in any case."""
