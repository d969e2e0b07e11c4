"""The rounding optimizer: gradients to their owners, update, packed codes to everybody.

A low-bit shard is divided by ROWS over the data-parallel group: dW leaves its product row-major and packed rows are contiguous
bytes, so neither direction needs a flat copy. Rows need not divide evenly. D ranks, rank r owns rows [start_r, stop_r):

    stage 0   every rank owns every row; all get the mean gradient and compute the same update from the same draws
    stage 1   a rank owns its rows: gradient rows go to their owner, the owner updates, PACKED codes are all-gathered
    stage 2   the same, and gradient rows leave during the backward pass
    stage 3   codes of owned rows only; the packed codes are gathered just before use (code_shards.py)

Means are taken by the owner of a row in rank order in every stage (gradients.py), so all stages give the same bits. Moments
exist for owned rows only, on the device or, with deepspeed.zero_optimization.offload_optimizer, in pinned memory of the host.

The class sequences phases; what an update is stands in `optim/`:

    Phase 1 GradientReducer.finish   Phase 2 square_norm, clip (the caller's)   Phase 3 update   Phase 4 gather_codes

With optimizer.fused_backward phase 3 comes first and in pieces: the reducer hands over the mean of a matrix's gradient while the
backward pass is under way (`Gradient.consume`), the matrix is updated at once with the same step number, rate and draws, and the
gradient is freed. Nobody needs its codes any more in this step: a linear's backward takes dx before dW. There is no clip factor then,
as the norm is not known yet; elements that are not finite count as zero (`adamw_update_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dqt_dist.config import Config, OptimizerConfig
from dqt_dist.dtypes import TORCH_DTYPES
from dqt_dist.kernels.low_bit_update import sum_by_matrix, update_rows
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.update import RoundingKey
from dqt_dist.optim import adafactor
from dqt_dist.optim.adamw import AdamW, adamw_update_rows, new_moments
from dqt_dist.optim.gradients import Gradient, GradientReducer
from dqt_dist.parallel.code_shards import CodeGatherer
from dqt_dist.parallel.groups import Groups
from dqt_dist.parallel.row_sharding import row_bounds, start_gather

Block = Callable[[slice], Tensor]
"""The clipped fp32 gradient of a range of owned rows."""

# Elements updated at once where the update has temporaries: a block of rows keeps the dozen of fp32 and int64 small beside moments.
UPDATE_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass
class OwnedRows:
    """One low-bit shard and the part of it this rank updates."""

    weight: LowBitMatrix
    start: int
    stop: int
    state: dict[str, Tensor] = field(default_factory=dict)
    gradient: Gradient = field(init=False)
    row_counts: list[Tensor] = field(default_factory=list)
    """Of each block of the last update, [rows, parts of a row, 3]: flips, zeros, clamped."""

    @property
    def row_matrix(self) -> Tensor:
        return self.weight.row_matrix[self.start : self.stop].long()

    def counts(self) -> Tensor:
        """Flips, zeros and clamped weights of the last update, owned rows only: int64 [matrices, 3]."""
        return sum_by_matrix(self.weight, self.start, torch.cat(self.row_counts))

    def chunks(self, whole: bool = False) -> Iterator[slice]:
        """Row ranges, relative to `start`, that are updated at once: all there are for `whole`."""
        rows_at_once = max(1, UPDATE_CHUNK[self.weight.codes.device.type] // self.weight.columns)
        if whole:
            rows_at_once = max(1, self.stop - self.start)
        for low in range(0, self.stop - self.start, rows_at_once):
            yield slice(low, min(low + rows_at_once, self.stop - self.start))


@dataclass(frozen=True)
class StepFacts:
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

    def update(self, rows: OwnedRows, mean: Tensor, facts: StepFacts) -> Iterator[Tensor]:
        """Updates moments and codes of the owned rows; yields the counts of each block's rows."""
        device = rows.weight.codes.device
        for block in rows.chunks(whole=device.type == "cuda" and not self.offload):
            kept = {name: tensor[block] for name, tensor in rows.state.items()}
            # The kept tensors themselves, unless they are offloaded.
            moments = {name: tensor.to(device, non_blocking=True) for name, tensor in kept.items()}
            start = rows.start + block.start
            yield adamw_update_rows(
                rows.weight, mean[block], moments, start, facts.clip, facts.learning_rate, self.adamw, facts.key
            )
            if self.offload:
                for name, tensor in kept.items():
                    tensor.copy_(moments[name], non_blocking=True)


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

    def update(self, rows: OwnedRows, mean: Tensor, facts: StepFacts) -> Iterator[Tensor]:
        """Updates moments and codes of the owned rows; yields the counts of each block's rows."""
        clip = facts.clip
        assert clip is not None, "the config allows fused_backward with AdamW only"

        def clipped(block: slice) -> Tensor:
            # clip is 0 for a step whose norm is not finite; 0 * inf is nan, which becomes 0.
            return (mean[block].float() * clip).nan_to_num_(nan=0.0)

        # A step that is clipped to nothing must not move codes by its first moment either.
        moves = clip > 0
        decay = self.config.low_bit_weight_decay
        for block, direction in self.directions(rows, clipped, facts.key.step):
            start = rows.start + block.start
            yield update_rows(rows.weight, direction * moves, start, facts.learning_rate, decay, facts.key)

    def directions(self, rows: OwnedRows, gradient: Block, step: int) -> Iterator[tuple[slice, Tensor]]:
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


class LowBitOptimizer:
    """Owns the moments and the update of every low-bit shard of this rank."""

    def __init__(
        self,
        weights: list[LowBitMatrix],
        config: Config,
        groups: Groups,
        reducer: GradientReducer,
        step_under_way: Callable[[], tuple[int, float]],
    ) -> None:
        """`step_under_way` tells number and learning rate of the step whose backward pass is running."""
        self.config, self.group, self.step_under_way = config, groups.data, step_under_way
        self.stage = config.zero_stage
        self.used = config.quantization.method == "dqt"
        self.grid = make_grid(config.quantization.bits)
        optimizer = config.optimizer
        self.rule = (
            AdamWRule(optimizer, config.offloads_optimizer)
            if optimizer.name == "adamw"
            else AdafactorRule(optimizer, groups, rows_sharded=self.sharded)
        )
        self.rows = [self._own(index, weight, reducer) for index, weight in enumerate(weights)]
        self.gatherer = CodeGatherer(weights, self.group) if self.stage == 3 and self.group.size() > 1 else None

    @property
    def sharded(self) -> bool:
        """Whether a rank updates some rows only."""
        return self.stage >= 1

    @property
    def gradients(self) -> list[Gradient]:
        return [rows.gradient for rows in self.rows]

    def _own(self, index: int, weight: LowBitMatrix, reducer: GradientReducer) -> OwnedRows:
        assert weight.layout is not None
        bounds = row_bounds(weight.rows, self.group.size())
        rows = OwnedRows(weight, *(bounds[self.group.rank()] if self.sharded else (0, weight.rows)))
        rows.state = self.rule.new_state(rows)

        def take() -> Tensor | None:
            gradient, weight.main_grad = weight.main_grad, None
            return gradient

        name = weight.layout.matrices[0].name
        rows.gradient = Gradient(name, weight.rows, weight.columns, bounds, not self.sharded, take)
        if self.config.optimizer.fused_backward:
            rows.gradient.consume = partial(self._update_in_backward, index)
        weight.gradient_dtype = TORCH_DTYPES[self.config.optimizer.gradient_dtype]
        weight.on_gradient = reducer.add(rows.gradient)
        return rows

    @torch.no_grad()
    def update(self, step: int, learning_rate: float, clip: Tensor) -> None:
        """Phase 3: gradients times `clip` (0-dim), direction, stochastic rounding onto the codes of the owned rows."""
        self.codes_change()
        facts = self._facts(step, learning_rate, clip)
        for rows in self.rows:
            mean, rows.gradient.mean = rows.gradient.mean, None
            assert mean is not None
            self._update(rows, mean, facts)

    def _update_in_backward(self, index: int, mean: Tensor) -> None:
        """Phase 3 for one matrix, when its gradient has come."""
        if self.gatherer is not None:
            self.gatherer.forget(index)
        self._update(self.rows[index], mean, self._facts(*self.step_under_way(), None))

    def _facts(self, step: int, learning_rate: float, clip: Tensor | None) -> StepFacts:
        return StepFacts(
            learning_rate, RoundingKey(self.config.training.seed, step, self.config.quantization.rounding), clip
        )

    def _update(self, rows: OwnedRows, mean: Tensor, facts: StepFacts) -> None:
        rows.row_counts = list(self.rule.update(rows, mean, facts))

    def codes_change(self) -> None:
        """To be called before anybody writes to codes: what stage 3 has gathered ahead is out of date then."""
        if self.gatherer is not None:
            self.gatherer.forget()

    @torch.no_grad()
    def gather_codes(self) -> None:
        """Phase 4: every rank gets the packed codes of every row, storage_bits a weight on the wire; not in stage 3."""
        if self.stage not in (1, 2) or self.group.size() == 1:
            return
        for rows in self.rows:
            codes = rows.weight.codes
            codes.copy_(start_gather(codes[rows.start : rows.stop], rows.weight.rows, self.group, "codes").finish())
