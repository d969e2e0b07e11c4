"""The rounding optimizer: gradients to their owners, update, packed codes to everybody.

A low-bit shard is divided by ROWS over the data-parallel group: dW leaves its product row-major and packed rows are contiguous
bytes, so neither direction needs a flat copy. Rows need not divide evenly. D ranks, rank r owns rows [start_r, stop_r):

    stage 0   every rank owns every row; gradients are summed to everybody, all compute the same update from the same draws
    stage 1   a rank owns its rows: gradient rows go to their owner, the owner updates, PACKED codes are all-gathered

The sum over ranks is always taken by the owner of a row, in rank order 0 .. D-1, in both stages. So stage 0 and stage 1 give
the same bits. Moments exist for owned rows only.

The class sequences phases; what an update is stands in `optim/`:

    Phase 1 reduce_gradients   Phase 2 square_norm (then the caller's clip)   Phase 3 update   Phase 4 gather_codes
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dqt_dist.config import Config, OptimizerConfig
from dqt_dist.kernels.low_bit_update import update_rows
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.update import RoundingKey
from dqt_dist.optim import adafactor
from dqt_dist.optim.adamw import adamw_direction
from dqt_dist.parallel.groups import Groups
from dqt_dist.parallel.row_sharding import gather_rows, reduce_rows, row_bounds

# Elements updated at once. A block of rows keeps its dozen fp32 and int64 temporaries small beside the moments.
UPDATE_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass
class OwnedRows:
    """One low-bit shard and the part of it this rank updates."""

    weight: LowBitMatrix
    start: int
    stop: int
    state: dict[str, Tensor] = field(default_factory=dict)
    gradient: Tensor | None = None
    """Reduced gradient of the owned rows, fp32 [stop - start, columns]; alive from reduce to update."""
    counts: Tensor | None = None
    """int64 [matrices, 3] of the last update: flips, zeros, clamped; owned rows only."""

    @property
    def row_matrix(self) -> Tensor:
        return self.weight.row_matrix[self.start : self.stop].long()

    def chunks(self) -> Iterator[slice]:
        """Row ranges, relative to `start`, that are updated at once."""
        rows_at_once = max(1, UPDATE_CHUNK[self.weight.codes.device.type] // self.weight.columns)
        for low in range(0, self.stop - self.start, rows_at_once):
            yield slice(low, min(low + rows_at_once, self.stop - self.start))


class AdamWRule:
    """Two fp32 moments a weight."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.beta1, self.beta2, self.epsilon = config.beta1 or 0.0, config.beta2, config.epsilon

    def new_state(self, rows: OwnedRows) -> dict[str, Tensor]:
        shape, device = (rows.stop - rows.start, rows.weight.columns), rows.weight.codes.device
        return {name: torch.zeros(shape, device=device) for name in ("exp_avg", "exp_avg_sq")}

    def directions(self, rows: OwnedRows, gradient: Tensor, step: int) -> Iterator[tuple[slice, Tensor]]:
        """Yields the direction of each block of owned rows and updates its moments."""
        for block in rows.chunks():
            moments = (rows.state["exp_avg"][block], rows.state["exp_avg_sq"][block])
            yield (
                block,
                adamw_direction(
                    gradient[block], *moments, step=step, beta1=self.beta1, beta2=self.beta2, epsilon=self.epsilon
                ),
            )


class AdafactorRule:
    """Row and column means of the second moment; a first moment only when beta1 is given.

    Means run over whole logical matrices, so sums are completed over the ranks that share the matrix (`_reduce_*`).
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

    def directions(self, rows: OwnedRows, gradient: Tensor, step: int) -> Iterator[tuple[slice, Tensor]]:
        """Yields the direction of each block of owned rows, after updating the factored moments of the shard."""
        layout, state, row_matrix = rows.weight.layout, rows.state, rows.row_matrix
        assert layout is not None
        matrix_rows = torch.tensor([float(m.rows) for m in layout.matrices], device=gradient.device)
        num_matrices = len(layout.matrices)
        row_sums, column_sums = adafactor.square_sums(gradient, row_matrix, num_matrices)
        weight = 1 - adafactor.decay_at(step, self.config.adafactor_decay_rate)
        state["row_mean"].lerp_(self._over_columns(row_sums, rows) / layout.in_features, weight)
        state["column_mean"].lerp_(self._over_rows(column_sums, rows) / matrix_rows[:, None], weight)
        mean_row = torch.zeros(num_matrices, device=gradient.device).index_add_(0, row_matrix, state["row_mean"])
        mean_row = self._over_rows(mean_row, rows) / matrix_rows

        def unclipped(block: slice) -> Tensor:
            factors = (state["row_mean"][block], state["column_mean"], mean_row, row_matrix[block])
            return adafactor.factored_direction(gradient[block], *factors)

        squares = torch.zeros(num_matrices, device=gradient.device)
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


class LowBitOptimizer:
    """Owns the moments and the update of every low-bit shard of this rank."""

    def __init__(self, weights: list[LowBitMatrix], config: Config, groups: Groups) -> None:
        self.config, self.group = config, groups.data
        self.sharded = config.zero_stage >= 1
        self.used = config.quantization.method == "dqt"
        self.grid = make_grid(config.quantization.bits)
        optimizer = config.optimizer
        self.rule = (
            AdamWRule(optimizer)
            if optimizer.name == "adamw"
            else AdafactorRule(optimizer, groups, rows_sharded=self.sharded)
        )
        self.rows: list[OwnedRows] = []
        for weight in weights:
            bounds = row_bounds(weight.rows, self.group.size())
            start, stop = bounds[self.group.rank()] if self.sharded else (0, weight.rows)
            rows = OwnedRows(weight, start, stop)
            rows.state = self.rule.new_state(rows)
            self.rows.append(rows)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Phase 1: averages gradients over the data-parallel group; each rank keeps those of its rows."""
        for rows in self.rows:
            gradient, rows.weight.main_grad = rows.weight.main_grad, None
            if gradient is None:
                raise RuntimeError(f"no gradient reached {rows.weight.layout}")
            rows.gradient = reduce_rows(gradient, self.group, to_all=not self.sharded)

    def square_norm(self) -> Tensor:
        """Phase 2: sum of squares of the reduced gradients that this rank alone counts, fp64 scalar."""
        if not self.rows or (not self.sharded and self.group.rank() > 0):
            device = self.rows[0].weight.codes.device if self.rows else "cpu"
            return torch.zeros((), dtype=torch.float64, device=device)
        norms = [torch.linalg.vector_norm(rows.gradient).double() for rows in self.rows]
        return torch.stack(norms).square().sum()

    @torch.no_grad()
    def update(self, step: int, learning_rate: float, clip: Tensor) -> None:
        """Phase 3: gradients times `clip` (0-dim), direction, stochastic rounding onto the codes of the owned rows."""
        config = self.config
        key = RoundingKey(config.training.seed, step, config.quantization.rounding)
        decay = config.optimizer.low_bit_weight_decay
        for rows in self.rows:
            gradient, rows.gradient = rows.gradient, None
            assert gradient is not None
            # clip is 0 for a step whose norm is not finite; 0 * inf is nan, which becomes 0.
            gradient.mul_(clip).nan_to_num_(nan=0.0)
            counts = torch.zeros(len(rows.weight.scale), 3, dtype=torch.int64, device=gradient.device)
            for block, direction in self.rule.directions(rows, gradient, step):
                # Nor may the first moment move codes then.
                direction = direction * (clip > 0)
                counts += update_rows(rows.weight, direction, rows.start + block.start, learning_rate, decay, key)
            rows.counts = counts

    @torch.no_grad()
    def gather_codes(self) -> None:
        """Phase 4: every rank gets the packed codes of every row, storage_bits a weight on the wire."""
        if self.sharded:
            for rows in self.rows:
                gather_rows(rows.weight.codes, self.group)
