"""The update rules on the owned rows of a low-bit shard: which state they keep, and how a mean gradient changes state and codes.

A rule is written as pure functions elsewhere: `adamw.py`, `adafactor.py` and `lowbit/update.py`. The classes here hold a rule's settings
and cut the rows into blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dqt_dist.config import OptimizerConfig
from dqt_dist.kernels.low_bit_update import update_rows
from dqt_dist.lowbit.update import RoundingKey
from dqt_dist.optim import adafactor
from dqt_dist.optim.adamw import AdamW, adamw_update_rows, new_moments
from dqt_dist.optim.owned_rows import OwnedRows
from dqt_dist.parallel.groups import Groups

GradientOfRows = Callable[[slice], Tensor]
"""The clipped fp32 gradient of a range of owned rows."""


@dataclass(frozen=True)
class UpdateSettings:
    """What an update needs beside gradient and state."""

    learning_rate: float
    key: RoundingKey
    clip: Tensor | None
    """fp32 scalar on the device that gradients are multiplied with; None before the global norm is known."""


class AdamWRule:
    """Two moments a weight, of 32 or 8 bits; on CUDA one pass over a matrix, without temporaries."""

    def __init__(self, config: OptimizerConfig, offload: bool) -> None:
        self.offload, self.state_bits = offload, config.state_bits
        self.adamw = AdamW(config.beta1 or 0.0, config.beta2, config.epsilon, config.low_bit_weight_decay)

    def new_state(self, rows: OwnedRows) -> dict[str, Tensor]:
        shape, device = (rows.stop - rows.start, rows.weight.columns), rows.weight.codes.device
        if self.offload:
            return new_moments(*shape, self.state_bits, pin_memory=device.type == "cuda")
        return new_moments(*shape, self.state_bits, device)

    def update(self, rows: OwnedRows, mean: Tensor, settings: UpdateSettings) -> Iterator[Tensor]:
        """Updates moments and codes of the owned rows; yields the counts of each block's rows."""
        device = rows.weight.codes.device
        for block in rows.chunks(whole=device.type == "cuda" and not self.offload):
            kept = {name: tensor[block] for name, tensor in rows.state.items()}
            # The kept tensors themselves, unless they are offloaded.
            moments = {name: tensor.to(device, non_blocking=True) for name, tensor in kept.items()}
            start = rows.start + block.start
            yield adamw_update_rows(
                rows.weight,
                mean[block],
                moments,
                start,
                settings.clip,
                settings.learning_rate,
                self.adamw,
                settings.key,
            )
            if self.offload:
                for name, tensor in kept.items():
                    tensor.copy_(moments[name], non_blocking=True)


class AdafactorRule:
    """Row and column means of the second moment; a first moment only when beta1 is given.

    Means run over whole logical matrices, so sums are completed over the ranks that share the matrix (`_over_rows`, `_over_columns`).
    """

    def __init__(self, config: OptimizerConfig, groups: Groups, rows_sharded: bool) -> None:
        self.config, self.tensor = config, groups.tensor
        self.row_owners = groups.data if rows_sharded else None

    def new_state(self, rows: OwnedRows) -> dict[str, Tensor]:
        weight, num_rows = rows.weight, rows.stop - rows.start
        device = weight.codes.device
        assert weight.layout is not None
        state = {
            "row_mean": torch.zeros(num_rows, device=device),
            "column_mean": torch.zeros(len(weight.layout.matrices), weight.columns, device=device),
        }
        if self.config.beta1:
            state["exp_avg"] = torch.zeros(num_rows, weight.columns, device=device)
        return state

    def _over_rows(self, total: Tensor, rows: OwnedRows) -> Tensor:
        """Completes a sum over rows: rows are split over owners, and over TP when columns are not."""
        if self.row_owners is not None and self.row_owners.size() > 1:
            dist.all_reduce(total, group=self.row_owners)
        if not self._splits_columns(rows) and self.tensor.size() > 1:
            dist.all_reduce(total, group=self.tensor)
        return total

    def _over_columns(self, total: Tensor, rows: OwnedRows) -> Tensor:
        if self._splits_columns(rows) and self.tensor.size() > 1:
            dist.all_reduce(total, group=self.tensor)
        return total

    @staticmethod
    def _splits_columns(rows: OwnedRows) -> bool:
        layout = rows.weight.layout
        assert layout is not None
        return layout.columns != layout.in_features

    def update(self, rows: OwnedRows, mean: Tensor, settings: UpdateSettings) -> Iterator[Tensor]:
        """Updates moments and codes of the owned rows; yields the counts of each block's rows."""
        clip = settings.clip
        assert clip is not None, "the config allows fused_backward with AdamW only"

        def clipped(block: slice) -> Tensor:
            # clip is 0 for a step whose norm is not finite; 0 * inf is nan, which becomes 0.
            return (mean[block].float() * clip).nan_to_num_(nan=0.0)

        # A step that is clipped to nothing must not move codes by its first moment either.
        moves = clip > 0
        decay = self.config.low_bit_weight_decay
        for block, direction in self.directions(rows, clipped, settings.key.step):
            start = rows.start + block.start
            yield update_rows(rows.weight, direction * moves, start, settings.learning_rate, decay, settings.key)

    def directions(self, rows: OwnedRows, gradient: GradientOfRows, step: int) -> Iterator[tuple[slice, Tensor]]:
        """Yields the direction of each block of owned rows, after updating the factored moments of the shard."""
        layout, state, row_matrix = rows.weight.layout, rows.state, rows.row_matrix
        assert layout is not None
        device, num_matrices = row_matrix.device, len(layout.matrices)
        matrix_rows = torch.tensor([float(m.rows) for m in layout.matrices], device=device)
        row_sums = torch.zeros(rows.stop - rows.start, device=device)
        column_sums = torch.zeros(num_matrices, layout.columns, device=device)
        for block in rows.chunks():
            row_sums[block], of_block = adafactor.square_sums(gradient(block), row_matrix[block], num_matrices)
            column_sums += of_block
        weight = 1 - adafactor.decay_at(step, self.config.adafactor_decay_rate)
        state["row_mean"].lerp_(self._over_columns(row_sums, rows) / layout.in_features, weight)
        state["column_mean"].lerp_(self._over_rows(column_sums, rows) / matrix_rows[:, None], weight)
        mean_row = torch.zeros(num_matrices, device=device).index_add_(0, row_matrix, state["row_mean"])
        mean_row = self._over_rows(mean_row, rows) / matrix_rows

        def unclipped(block: slice) -> Tensor:
            factors = (state["row_mean"][block], state["column_mean"], mean_row, row_matrix[block])
            return adafactor.factored_direction(gradient(block), *factors)

        squares = torch.zeros(num_matrices, device=device)
        for block in rows.chunks():
            squares.index_add_(0, row_matrix[block], unclipped(block).square().sum(dim=1))
        squares = self._over_columns(self._over_rows(squares, rows), rows)
        rms = (squares / (matrix_rows * layout.in_features)).sqrt()
        for block in rows.chunks():
            direction = adafactor.clip_by_rms(
                unclipped(block), rms, row_matrix[block], self.config.adafactor_clip_threshold
            )
            if self.config.beta1:
                direction = state["exp_avg"][block].lerp_(direction, 1 - self.config.beta1)
            yield block, direction
