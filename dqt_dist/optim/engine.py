"""DeepSpeed's engine over both kinds of weights: one optimizer object, one gradient norm, one clip.

    high-precision parameters   torch.optim.AdamW inside DeepSpeed's optimizer for the ZeRO stage of the config (deepspeed_adapter.py)
    low-bit codes               LowBitOptimizer, behind the same step()

DeepSpeed divides masters, moments and (stage 3) parameters over the ranks. Gradients take our way to their owners, the same for both kinds
of weights and in every stage (gradient_reducer.py). Who divides what: Megatron's schedule divides the loss by the number of micro-batches,
the reduction divides by the data-parallel size. Nobody else divides, and nobody else clips.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqt_dist.config import Config, process_grid
from dqt_dist.dtypes import TORCH_DTYPES
from dqt_dist.layers.parameters import low_bit_matrices, parameters
from dqt_dist.lowbit.gradient_buffer import GradientBuffer
from dqt_dist.optim.adamw import GRADIENT_LIMIT
from dqt_dist.optim.deepspeed_adapter import OF_STAGE, HighPrecisionOptimizer, MasterShard, initialize_engine
from dqt_dist.optim.gradient_reducer import GradientReducer, reduce_when
from dqt_dist.optim.low_bit_optimizer import LowBitOptimizer
from dqt_dist.optim.schedule import StepRates, step_rates
from dqt_dist.parallel.groups import Groups
from dqt_dist.parallel.row_sharding import row_bounds

# AdamW's default; the high-precision parameters keep AdamW when Adafactor, which may have no beta1, updates the codes.
DEFAULT_BETA1 = 0.9
# Megatron-LM's clip_grad_norm_fp32 divides by the norm plus this.
NORM_EPSILON = 1e-6


def high_precision_adamw(chunks: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW over the parameters DeepSpeed manages; vectors (norms) are not decayed.

    The block linears of a baseline have the learning rate that the low-bit ones have under method dqt, so that methods are
    compared with the same two rates. Each group keeps its own peak rate.
    """
    optimizer = config.optimizer
    everything = parameters(chunks)
    matrices = [p for p in everything if p.layout.columns > 1]
    linears = [p.tensor for p in matrices if p.layout.matrices[0].name.startswith("layers.")]
    others = [p.tensor for p in matrices if not p.layout.matrices[0].name.startswith("layers.")]
    vectors = [p.tensor for p in everything if p.layout.columns == 1]
    rate, linear_rate, decay = optimizer.learning_rate, optimizer.low_bit_learning_rate, optimizer.weight_decay
    param_groups = [
        {"params": others, "weight_decay": decay, "peak_learning_rate": rate},
        {"params": vectors, "weight_decay": 0.0, "peak_learning_rate": rate},
        {"params": linears, "weight_decay": decay, "peak_learning_rate": linear_rate},
    ]
    return torch.optim.AdamW(
        [group for group in param_groups if group["params"]],
        # Set before each step. DeepSpeed's bf16 optimizer without ZeRO makes a step on zero gradients when it is built, which
        # must not decay the weights.
        lr=0.0,
        betas=(DEFAULT_BETA1 if optimizer.beta1 is None else optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        # Masters that are offloaded to the host are updated there.
        fused=vectors[0].is_cuda and not config.offloads_optimizer,
    )


class CombinedOptimizer:
    """Both optimizers behind what DeepSpeed's engine asks of one."""

    def __init__(
        self, high_precision: HighPrecisionOptimizer, chunks: nn.Module, config: Config, groups: Groups
    ) -> None:
        self.config, self.groups, self.high_precision = config, groups, high_precision
        self.reducer = GradientReducer(groups.data, process_grid(config, groups.world.size()).num_microbatches)
        self.gradients = [self._collect(shard) for shard in high_precision.shards]
        """Of the high-precision parameters, in the order of `shards`."""
        self.low_bit = LowBitOptimizer(low_bit_matrices(chunks), config, groups, self.reducer)
        self.steps_done = 0
        self.rates: StepRates | None = None
        """Of the step under way, or of the last one."""
        self.grad_norm = torch.zeros((), device=groups.device)

    @property
    def shards(self) -> list[MasterShard]:
        """Where the master of each high-precision parameter lies, in model order."""
        return self.high_precision.shards

    def _collect(self, shard: MasterShard) -> GradientBuffer:
        """Has each backward pass add the parameter's gradient to a buffer of type `optimizer.gradient_dtype`."""
        logical, group = shard.parameter.layout, self.groups.data
        numel = logical.rows * logical.columns
        buffer = GradientBuffer(logical.matrices[0].name, numel, 1, TORCH_DTYPES[self.config.optimizer.gradient_dtype])
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
        """Before the first backward pass of a step: makes the rates of the step, once."""
        self.rates = step_rates(self.steps_done + 1, self.config)
        self.low_bit.begin_step(self.rates)
        return self.rates

    def step(self, *_: Any, **__: Any) -> None:
        """One update of everything, after the backward passes of a step."""
        rates, optimizer = self.rates, self.config.optimizer
        assert rates is not None and rates.step == self.steps_done + 1, "begin_step comes before the backward passes"
        # Phase 1 reduce: what the backward passes have not sent to its owners yet.
        self.reducer.finish()
        # Phase 2 norm and clip: one norm over everything.
        self.grad_norm = self._global_norm()
        clip = clip_factor(self.grad_norm, optimizer.max_grad_norm)
        # Phase 3 update; with fused_backward the low-bit matrices had theirs when their gradients came.
        self._update_high_precision(rates, clip)
        if not optimizer.fused_backward:
            self.low_bit.update(clip)
        # Phase 4 gather: packed codes.
        self.low_bit.gather_codes()
        self.steps_done = rates.step

    @torch.no_grad()
    def _update_high_precision(self, rates: StepRates, clip: Tensor) -> None:
        # A step that is clipped to nothing has no rate either: the first moments would still move the weights.
        self.high_precision.set_learning_rates(rates.multiplier, (clip > 0).to(self.high_precision.device))
        self.high_precision.put_gradients([gradient.take().view(-1) for gradient in self.gradients], clip)
        self.high_precision.step()

    def _global_norm(self) -> Tensor:
        """L2 norm of all gradients, fp32 scalar; each element counted by exactly one rank of the world."""
        mine = list(self.low_bit.gradients)
        for shard, gradient in zip(self.shards, self.gradients, strict=True):
            if not (shard.parameter.replicated and self.groups.tensor.rank() > 0):
                mine.append(gradient)
        total = self.reducer.square_norm(mine).to(self.groups.device)
        dist.all_reduce(total, group=self.groups.world)
        return total.sqrt().float()

    def state_was_loaded(self, step: int) -> None:
        """Brings what follows from the loaded state of step `step` into line. A collective call."""
        self.steps_done = step
        self.low_bit.codes_change()
        self.high_precision.set_step(step)
        self.high_precision.refresh_parameters()

    # ---- what DeepSpeed's engine asks of an optimizer ----

    overflow = False
    """Steps that are not finite move nothing (`clip_factor`); DeepSpeed need not know."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of the high-precision parameters."""
        return self.high_precision.torch_optimizer.param_groups

    def zero_grad(self) -> None:
        self.high_precision.zero_grad()

    def finalize_gradient_accumulation_boundary(self) -> None:
        """The engine calls this in stages 2 and 3 before `step`; its gradients are ours."""


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied with: at most 1, and 0 when the norm is not finite, or hardly (the step then moves nothing)."""
    factor = torch.clamp(max_norm / (norm + NORM_EPSILON), max=1.0) if max_norm > 0 else torch.ones_like(norm)
    return torch.where(norm < GRADIENT_LIMIT, factor, torch.zeros_like(norm))


def build_engine(chunks: nn.ModuleList, config: Config, groups: Groups) -> Any:
    """DeepSpeed's engine over the high-precision parameters; `engine.optimizer` becomes a CombinedOptimizer."""
    torch_optimizer = high_precision_adamw(chunks, config)
    # A module that is called: stage 3 hangs its gathers on the calls. Several chunks mean pipeline > 1, so stage 0 or 1.
    engine = initialize_engine(chunks[0] if len(chunks) == 1 else chunks, torch_optimizer, config, groups)
    high_precision = OF_STAGE[config.zero_stage](engine.optimizer, torch_optimizer, parameters(chunks), config, groups)
    engine.optimizer = CombinedOptimizer(high_precision, chunks, config, groups)
    return engine
