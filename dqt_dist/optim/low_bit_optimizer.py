"""The optimizer of the low-bit weights: gradient rows go to their owners, owners update, packed codes go to all ranks.

A low-bit shard is divided by ROWS over the data-parallel group. dW is row-major and packed rows are contiguous bytes,
so neither direction needs a flat copy. Rows need not divide evenly. There are D ranks, and rank r owns rows [start_r,
stop_r):

    stage 0   every rank owns every row; all ranks get the mean gradient and compute the same update from the same draws
    stage 1   a rank owns some rows: gradient rows go to their owner, the owner updates, PACKED codes are all-gathered
    stage 2   as stage 1: gradients of owned rows only are kept there already
    stage 3   a rank holds the codes of owned rows only; packed codes are gathered before use (parallel/code_shards.py)

In every stage the owner of a row takes the mean in rank order (gradient_reducer.py), so all stages give the same bits.
Moments and latents exist for owned rows only. They lie on the device or, with
deepspeed.zero_optimization.offload_optimizer, in pinned memory of the host.

With quantization.scale_refit_interval some steps refit the scales (scale_refit.py). A refit needs the sums of |L| after
the step before. That step's update has counted them, so there is no pass over the latents. The new scale is written
together with the new codes, when the matrix is updated.

`CombinedOptimizer.step` runs the phases; this class has phases 3 and 4. The update itself is a rule of `adamw.py` or
`adafactor.py`:

    Phase 1 reduce           GradientReducer.finish, called by CombinedOptimizer
    Phase 2 norm and clip    GradientReducer.square_norm, called by CombinedOptimizer
    Phase 3 update           `update`
    Phase 4 gather           `update` begins it: a matrix travels while the next is updated; `gather_codes` ends it

With optimizer.fused_backward phase 3 runs during the backward pass, one matrix at a time. The reducer hands over the
mean gradient of a matrix, the matrix is updated at once with the same step number, rate and draws, and the gradient is
freed. This is safe because the backward of a linear computes dx before dW: nothing later in the step reads the codes of
the matrix. The norm is not known yet, so there is no clip factor, and elements that are not finite count as zero
(`adamw_update_rows`).
"""

from __future__ import annotations

from collections import deque
from functools import partial

import torch
from torch import Tensor

from dqt_dist.config import Config
from dqt_dist.dtypes import TORCH_DTYPES
from dqt_dist.layers.initialize import initial_latents
from dqt_dist.lowbit.gradient_buffer import GradientBuffer
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.update import RoundingKey
from dqt_dist.optim.adafactor import AdafactorRule
from dqt_dist.optim.adamw import AdamWRule
from dqt_dist.optim.gradient_reducer import GradientReducer, reduce_when
from dqt_dist.optim.owned_rows import OwnedRows, UpdateSettings
from dqt_dist.optim.scale_refit import ScaleRefit
from dqt_dist.optim.schedule import StepRates
from dqt_dist.parallel.code_shards import CodeGatherer
from dqt_dist.parallel.groups import Groups
from dqt_dist.parallel.row_sharding import PendingGather, row_bounds, start_gather


class LowBitOptimizer:
    """Owns the moments and the update of every low-bit shard of this rank."""

    rates: StepRates
    """Rates of the current step. `begin_step` sets them."""

    def __init__(
        self,
        weights: list[LowBitMatrix],
        config: Config,
        groups: Groups,
        reducer: GradientReducer,
    ) -> None:
        self.config, self.group = config, groups.data
        self.stage = config.zero_stage
        self.enabled = config.quantization.method == "dqt"
        self.grid = make_grid(config.quantization.bits)
        optimizer = config.optimizer
        self.rule = (
            AdamWRule(optimizer, groups, self.sharded, config.offloads_optimizer)
            if optimizer.name == "adamw"
            else AdafactorRule(optimizer, groups, self.sharded)
        )
        self.rows = [self._register(index, weight, reducer) for index, weight in enumerate(weights)]
        self.scale_refit = ScaleRefit(self.rows, config.quantization, groups, self.sharded)
        self.gatherer = CodeGatherer(weights, self.group) if self.stage == 3 and self.group.size() > 1 else None
        self._gathers: list[tuple[Tensor, PendingGather]] = []
        """Codes of a shard, and the rows of all ranks on their way to these codes."""

    @property
    def sharded(self) -> bool:
        """Whether the rows of a shard are divided over the data-parallel ranks."""
        return self.stage >= 1

    @property
    def gradients(self) -> list[GradientBuffer]:
        """One buffer per low-bit shard."""
        return [rows.gradient for rows in self.rows]

    def _register(self, index: int, weight: LowBitMatrix, reducer: GradientReducer) -> OwnedRows:
        """Creates the state of the rows that this rank owns, and registers the gradient with the reducer."""
        assert weight.layout is not None
        bounds = row_bounds(weight.rows, self.group.size())
        rows = OwnedRows(weight, *(bounds[self.group.rank()] if self.sharded else (0, weight.rows)))
        rows.state = self.rule.new_state(rows)
        if weight.latent_grid is not None:
            latents = initial_latents(weight, rows.start, rows.stop, self.config)
            if self.config.offloads_optimizer:
                latents = latents.cpu().pin_memory() if latents.is_cuda else latents
            rows.state["latent"] = latents
        rows.gradient.dtype = TORCH_DTYPES[self.config.optimizer.gradient_dtype]
        reducer.register(
            rows.gradient,
            bounds,
            reduce_when(self.config),
            on_every_rank=not self.sharded,
            consumer=partial(self._update_in_backward, index) if self.config.optimizer.fused_backward else None,
        )
        return rows

    def begin_step(self, rates: StepRates) -> None:
        """Sets rates and new scales. Called before the first backward pass of a step: fused_backward updates there."""
        self.rates = rates
        self.scale_refit.begin_step(rates.step)

    @torch.no_grad()
    def update(self, clip: Tensor, norm: Tensor) -> None:
        """Phase 3 for all owned rows: gradient times `clip` (0-dim), direction, stochastic rounding onto the codes.

        `norm` (0-dim) is that of all gradients of the step, before clipping.
        """
        self.invalidate_gathered_codes()
        settings = self._settings(clip, norm)
        means = deque(rows.gradient.take() for rows in self.rows)
        self.rule.prepare(self.rows, list(means), settings)
        self.scale_refit.write(clip)
        for index in range(len(self.rows)):
            # Each gradient is freed as soon as it has been used.
            self._update(index, means.popleft(), settings)

    def _update_in_backward(self, index: int, mean: Tensor) -> None:
        """Phase 3 for one matrix, as soon as the mean of its gradient is known."""
        if self.gatherer is not None:
            self.gatherer.invalidate(index)
        self.scale_refit.write_one(index)
        self._update(index, mean, self._settings(None, None))

    def _settings(self, clip: Tensor | None, norm: Tensor | None) -> UpdateSettings:
        key = RoundingKey(self.config.training.seed, self.rates.step, self.config.quantization.rounding)
        rates = self.rates.low_bit_learning_rate, self.rates.low_bit_weight_decay
        return UpdateSettings(*rates, key, clip, norm, self.counted)

    @property
    def counted(self) -> bool:
        """Whether the update of this step counts flips, zeros and clamped weights: where the run shows them."""
        return self.config.shows_metrics(self.rates.step) or self.config.shows_codes(self.rates.step)

    def _update(self, index: int, mean: Tensor, settings: UpdateSettings) -> None:
        rows = self.rows[index]
        rows.row_counts = list(self.rule.update(rows, mean, settings))
        if self.stage in (1, 2) and self.group.size() > 1:
            codes = rows.weight.codes
            self._gathers.append((codes, start_gather(codes[rows.start : rows.stop], len(codes), self.group, "codes")))

    def state_was_loaded(self) -> None:
        """Drops what the last update has left behind: its counts, and codes that stage 3 has gathered."""
        for rows in self.rows:
            rows.row_counts = []
        self.invalidate_gathered_codes()

    def invalidate_gathered_codes(self) -> None:
        """Drops the codes that stage 3 has gathered. Call this before codes are written."""
        if self.gatherer is not None:
            self.gatherer.invalidate()

    @torch.no_grad()
    def gather_codes(self) -> None:
        """Phase 4: every rank gets the packed codes of every row, storage_bits per weight on the wire.

        Nothing is to be gathered in stage 0, where every rank updates all rows, and in stage 3, which gathers before
        use.
        """
        for codes, gather in self._gathers:
            codes.copy_(gather.finish())
        self._gathers.clear()
