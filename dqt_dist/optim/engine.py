"""DeepSpeed's engine over both kinds of weights: one optimizer object, one gradient norm, one clip factor.

    high-precision parameters   torch.optim.AdamW inside DeepSpeed's optimizer of the ZeRO stage (deepspeed_adapter.py)
    low-bit codes               LowBitOptimizer, in the same step()

DeepSpeed divides masters, moments and (in stage 3) parameters over the ranks. gradient_reducer.py reduces the gradients
of both kinds of weights, in the same way in every stage. A gradient is divided twice: Megatron's schedule divides the
loss by the number of micro-batches, and the reduction divides by the data-parallel size. Gradients are clipped once, in
`CombinedOptimizer.step`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqt_dist.config import Config, process_grid
from dqt_dist.dtypes import TORCH_DTYPES
from dqt_dist.kernels.low_bit_update import GRADIENT_LIMIT
from dqt_dist.layers.parameters import low_bit_matrices, parameters
from dqt_dist.lowbit.gradient_buffer import GradientBuffer
from dqt_dist.optim.deepspeed_adapter import (
    HIGH_PRECISION_OPTIMIZERS,
    HighPrecisionOptimizer,
    MasterShard,
    initialize_engine,
)
from dqt_dist.optim.gradient_reducer import GradientReducer, reduce_when
from dqt_dist.optim.loss_spikes import is_spike, new_window, pushed
from dqt_dist.optim.low_bit_optimizer import LowBitOptimizer
from dqt_dist.optim.schedule import StepRates, step_rates
from dqt_dist.parallel.groups import Groups
from dqt_dist.parallel.row_sharding import row_bounds

# Megatron-LM's clip_grad_norm_fp32 divides by the norm plus this.
NORM_EPSILON = 1e-6


def high_precision_adamw(model_chunks: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW over the parameters that DeepSpeed manages. Vectors (norms) have no weight decay.

    The block linears of a baseline have the learning rate and beta1 of the low-bit linears of method dqt, so methods
    are compared with the same settings. Each group keeps its own peak rate.
    """
    optimizer = config.optimizer
    all_parameters = parameters(model_chunks)
    matrices = [p for p in all_parameters if p.layout.columns > 1]
    linears = [p.tensor for p in matrices if p.layout.matrices[0].name.startswith("layers.")]
    others = [p.tensor for p in matrices if not p.layout.matrices[0].name.startswith("layers.")]
    vectors = [p.tensor for p in all_parameters if p.layout.columns == 1]
    param_groups = [
        {"params": others, "decays": True, "rate_name": "learning_rate"},
        {"params": vectors, "decays": False, "rate_name": "learning_rate"},
        {
            "params": linears,
            "decays": True,
            "rate_name": "low_bit_learning_rate",
            "betas": (optimizer.beta1 if optimizer.low_bit_beta1 is None else optimizer.low_bit_beta1, optimizer.beta2),
        },
    ]
    return torch.optim.AdamW(
        [group for group in param_groups if group["params"]],
        # Rate and decay are set before each step. DeepSpeed's bf16 optimizer without ZeRO makes a step on zero
        # gradients when it is built. This step changes nothing.
        lr=0.0,
        weight_decay=0.0,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        # Masters that are offloaded to the host are updated on the host.
        fused=vectors[0].is_cuda and not config.offloads_optimizer,
    )


class CombinedOptimizer:
    """Updates both kinds of weights. DeepSpeed's engine sees it as its one optimizer."""

    def __init__(
        self, high_precision: HighPrecisionOptimizer, model_chunks: nn.Module, config: Config, groups: Groups
    ) -> None:
        self.config, self.groups, self.high_precision = config, groups, high_precision
        self.reducer = GradientReducer(groups.data, process_grid(config, groups.world.size()).num_microbatches)
        self.gradients = [self._register_gradient(shard) for shard in high_precision.shards]
        """Gradients of the high-precision parameters, in the order of `shards`."""
        self.low_bit = LowBitOptimizer(low_bit_matrices(model_chunks), config, groups, self.reducer)
        self.steps_done = 0
        self.rates: StepRates | None = None
        """Rates of the current step or, between steps, of the last one."""
        self.grad_norm = torch.zeros((), device=groups.device)
        self.loss = torch.zeros((), device=groups.device)
        """Loss of the step on this rank, from whoever runs the backward passes. One that is not finite, on any rank,
        makes the step change no weight, as a norm that is not finite does."""
        self.before_update: Callable[[Tensor], None] | None = None
        """Called with the clip factor, 0 for a step that is skipped, when the mean gradients wait for the update."""
        self.mean_loss = torch.zeros((), dtype=torch.float64, device=groups.device)
        """Loss of the global batch in the last step, the same on all ranks."""
        self.loss_window = new_window(config.training.spike_window, [], groups.device)
        """What a loss spike is measured against (loss_spikes.py); all nan without training.spike_deviations."""
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=groups.device)
        """Steps of this process that changed no weight for such a reason or for a spike; the same on all ranks."""
        self.skipped_in_a_row = torch.zeros_like(self.skipped_steps)
        """Of these, the ones since the last step that changed weights."""
        self.skipped_in_a_row_on_host = torch.zeros((), dtype=torch.int64, pin_memory=groups.device.type == "cuda")
        """A copy that is read without waiting for the device, and may therefore be some steps late."""

    @property
    def shards(self) -> list[MasterShard]:
        """Where the master of each high-precision parameter lies, in model order."""
        return self.high_precision.shards

    def _register_gradient(self, shard: MasterShard) -> GradientBuffer:
        """Makes each backward pass add the parameter's gradient to a buffer of type `optimizer.gradient_dtype`."""
        layout, group = shard.parameter.layout, self.groups.data
        numel = layout.rows * layout.columns
        buffer = GradientBuffer(layout.matrices[0].name, numel, 1, TORCH_DTYPES[self.config.optimizer.gradient_dtype])
        stage_0 = self.config.zero_stage == 0
        owners = row_bounds(numel, group.size()) if stage_0 else shard.bounds
        self.reducer.register(buffer, owners, reduce_when(self.config), on_every_rank=stage_0)

        @torch.no_grad()
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            new, parameter.grad = parameter.grad.reshape(-1), None
            buffer.add(new)

        shard.parameter.tensor.register_post_accumulate_grad_hook(add)
        return buffer

    def begin_step(self) -> StepRates:
        """Makes the rates of the step. Called once per step, before the first backward pass."""
        self.rates = step_rates(self.steps_done + 1, self.config)
        self.low_bit.begin_step(self.rates)
        return self.rates

    def step(self, *_: Any, **__: Any) -> None:
        """One update of all weights, after the backward passes of a step."""
        rates, optimizer = self.rates, self.config.optimizer
        assert rates is not None and rates.step == self.steps_done + 1, "begin_step comes before the backward passes"
        # Phase 1 reduce: the gradients that the backward passes have not reduced.
        self.reducer.finish()
        # Phase 2 norm and clip: one norm over the gradients of all weights. A clip of 0 skips the step.
        self.grad_norm, self.mean_loss = self._global_norm_and_loss()
        clip = self._skip_spike(clip_factor(self.grad_norm, optimizer.max_grad_norm))
        self._count_skipped(clip)
        if self.before_update is not None:
            self.before_update(clip)
        # Phase 3 update. With fused_backward the backward pass has already updated the low-bit matrices.
        self._update_high_precision(rates, clip)
        if not optimizer.fused_backward:
            self.low_bit.update(clip, self.grad_norm)
        # Phase 4 gather: every rank gets the packed codes of all rows.
        self.low_bit.gather_codes()
        self.steps_done = rates.step

    @torch.no_grad()
    def _update_high_precision(self, rates: StepRates, clip: Tensor) -> None:
        # A step with clip 0 also gets learning rate 0. The first moments would change the weights otherwise.
        self.high_precision.set_rates(rates, (clip > 0).to(self.high_precision.device))
        self.high_precision.put_gradients([gradient.take().view(-1) for gradient in self.gradients], clip)
        self.high_precision.step()

    def _global_norm_and_loss(self) -> tuple[Tensor, Tensor]:
        """L2 norm of all gradients, fp32 scalar, and the mean loss of the global batch, fp64 scalar.

        Exactly one rank of the world counts each element of the gradients. The norm is not finite when the loss is not.
        """
        counted_here = list(self.low_bit.gradients)
        for shard, gradient in zip(self.shards, self.gradients, strict=True):
            if not (shard.parameter.replicated and self.groups.tensor.rank() > 0):
                counted_here.append(gradient)
        square_norm = self.reducer.square_norm(counted_here).to(self.groups.device)
        totals = torch.stack([square_norm, self.loss.double()])
        dist.all_reduce(totals, group=self.groups.world)
        square_norm, loss = totals.unbind()
        # Ranks that are not in the last pipeline stage have loss 0.
        mean_loss = loss / (self.groups.data.size() * self.groups.tensor.size())
        return (square_norm + 0.0 * loss).sqrt().float(), mean_loss

    def _skip_spike(self, clip: Tensor) -> Tensor:
        """`clip`, or 0 where the loss is a spike. A loss of a step that is not skipped enters the window."""
        deviations = self.config.training.spike_deviations
        if deviations is None:
            return clip
        spike = is_spike(self.mean_loss, self.loss_window, deviations)
        clip = torch.where(spike, torch.zeros_like(clip), clip)
        self.loss_window = pushed(self.loss_window, self.mean_loss, clip > 0)
        return clip

    def _count_skipped(self, clip: Tensor) -> None:
        skipped = clip == 0
        self.skipped_steps += skipped
        self.skipped_in_a_row.add_(1).mul_(skipped)
        self.skipped_in_a_row_on_host.copy_(self.skipped_in_a_row, non_blocking=True)

    def state_was_loaded(self, step: int) -> None:
        """Updates everything that depends on the state just loaded, which is that of step `step`. A collective call."""
        self.steps_done = step
        self.low_bit.state_was_loaded()
        self.high_precision.set_step(step)
        self.high_precision.refresh_parameters()

    # ---- what DeepSpeed's engine asks of an optimizer ----

    overflow = False
    """Always False: `clip_factor` already makes a step with a norm that is not finite change nothing."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the high-precision parameters."""
        return self.high_precision.torch_optimizer.param_groups

    def zero_grad(self) -> None:
        self.high_precision.zero_grad()

    def finalize_gradient_accumulation_boundary(self) -> None:
        """The engine calls this before `step` in stages 2 and 3. There is nothing to do: GradientReducer reduces."""


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """The factor of all gradients, at most 1.

    The factor is 0 when the norm is not finite or is GRADIENT_LIMIT or more. The step then changes no weight.
    """
    factor = torch.clamp(max_norm / (norm + NORM_EPSILON), max=1.0) if max_norm > 0 else torch.ones_like(norm)
    return torch.where(norm < GRADIENT_LIMIT, factor, torch.zeros_like(norm))


def build_engine(model_chunks: nn.ModuleList, config: Config, groups: Groups) -> Any:
    """DeepSpeed's engine over the high-precision parameters. Its `optimizer` is replaced by a CombinedOptimizer."""
    torch_optimizer = high_precision_adamw(model_chunks, config)
    # Stage 3 attaches its gathers to the calls of the module, so the engine needs a module that is called. A ModuleList
    # is not called, but several model chunks mean pipeline > 1, where the stage is 0 or 1.
    module = model_chunks[0] if len(model_chunks) == 1 else model_chunks
    engine = initialize_engine(module, torch_optimizer, config, groups)
    high_precision = HIGH_PRECISION_OPTIMIZERS[config.zero_stage](
        engine.optimizer, torch_optimizer, parameters(model_chunks), config, groups
    )
    engine.optimizer = CombinedOptimizer(high_precision, model_chunks, config, groups)
    return engine
