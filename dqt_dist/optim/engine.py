"""DeepSpeed's engine over both kinds of weights: one optimizer object, one gradient norm, one clip.

    high-precision parameters   torch.optim.AdamW inside DeepSpeed's optimizer for the ZeRO stage of the config
    low-bit codes               LowBitOptimizer, behind the same step()

DeepSpeed divides masters, moments and (stage 3) parameters over the ranks; gradients take our way to their owners, the same for
both kinds of weights and in every stage (gradients.py). Who divides what: Megatron's schedule divides the loss by the number of
micro-batches, the reduction divides by the data-parallel size. Nobody else divides, and nobody else clips.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqt_dist.config import Config, layout
from dqt_dist.dtypes import TORCH_DTYPES
from dqt_dist.layers.parameters import low_bit_matrices, parameters
from dqt_dist.optim.adamw import GRADIENT_LIMIT
from dqt_dist.optim.gradients import Gradient, GradientReducer
from dqt_dist.optim.low_bit_optimizer import LowBitOptimizer
from dqt_dist.optim.master_weights import (
    GradientFeed,
    MasterShard,
    create_moments,
    master_shards,
    refresh_parameters,
)
from dqt_dist.optim.schedule import schedule_factor
from dqt_dist.parallel.groups import Groups, MegatronUnit
from dqt_dist.parallel.row_sharding import row_bounds

# AdamW's default; the high-precision parameters keep AdamW when Adafactor, which may have no beta1, updates the codes.
DEFAULT_BETA1 = 0.9
# Megatron-LM's clip_grad_norm_fp32 divides by the norm plus this.
NORM_EPSILON = 1e-6


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The user's `deepspeed` section completed with what follows from the other sections."""
    settings = copy.deepcopy(config.deepspeed)
    training = config.training
    settings |= {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": layout(config, world_size).num_microbatches,
        # Megatron's schedule runs the micro-batches; engine.step() is the boundary.
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        # Gradients come to it finite; its own check would wait for the device in every step.
        "bf16": {"enabled": config.quantization.dtype == "bf16", "check_grad_overflow": False},
        # torch's AdamW also updates what is offloaded to the host.
        "zero_force_ds_cpu_optimizer": False,
    }
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings.setdefault("steps_per_print", None)
    # Its own measurement of throughput waits for the device at the beginning and the end of each step; ours is in recorder.py.
    settings.setdefault("timers", {"throughput": {"enabled": False}})
    zero = settings.setdefault("zero_optimization", {})
    zero.setdefault("stage", config.zero_stage)
    # Buffers for a reduction that is not DeepSpeed's: a GB in stage 3 if left alone.
    zero["contiguous_gradients"] = False
    if config.zero_stage in (1, 2):
        zero["overlap_comm"] = False
        zero["compute_grad_norm"] = False  # the norm is ours
        if zero.get("offload_optimizer", {}).get("device", "none") != "none":
            # DeepSpeed insists on a norm of its own there: a pass over the gradients, unused.
            del zero["compute_grad_norm"]
    return settings


def high_precision_optimizer(chunks: nn.Module, config: Config) -> torch.optim.AdamW:
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
    """DeepSpeed's optimizer interface over both optimizers; whatever is not here is DeepSpeed's own."""

    def __init__(
        self, high_precision: Any, torch_optimizer: torch.optim.AdamW, chunks: nn.Module, config: Config, groups: Groups
    ) -> None:
        self.high_precision, self.torch_optimizer = high_precision, torch_optimizer
        self.config, self.groups = config, groups
        self.reducer = GradientReducer(
            groups.data,
            layout(config, groups.world.size()).num_microbatches,
            in_backward=config.zero_stage >= 2,
            each_micro_batch=config.optimizer.gradient_reduction == "micro_batch",
        )
        self.shards = master_shards(high_precision, parameters(chunks), config.zero_stage, groups.data)
        create_moments(torch_optimizer, self.shards)
        masters = [shard.master for shard in self.shards if shard.master is not None]
        self.master_device = masters[0].device if masters else groups.device
        self.feed = GradientFeed(high_precision, torch_optimizer, self.shards, config.zero_stage)
        self.gradients = [self._collect(shard) for shard in self.shards]
        self.low_bit = LowBitOptimizer(low_bit_matrices(chunks), config, groups, self.reducer, self._step_under_way)
        self.steps_done = 0
        self.last_factor = 0.0
        self.grad_norm = torch.zeros((), device=groups.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["high_precision"], name)

    def _collect(self, shard: MasterShard) -> Gradient:
        """Has each backward add the parameter's gradient to a sum in `optimizer.gradient_dtype`."""
        dtype, group, stage = (
            TORCH_DTYPES[self.config.optimizer.gradient_dtype],
            self.groups.data,
            self.config.zero_stage,
        )
        logical, parameter = shard.parameter.layout, shard.parameter.tensor
        numel = logical.rows * logical.columns
        bounds = row_bounds(numel, group.size()) if stage == 0 else shard.bounds
        sums: list[Tensor] = []
        name = logical.matrices[0].name
        gradient = Gradient(name, numel, 1, bounds, stage == 0, take=lambda: sums.pop() if sums else None)
        arrived = self.reducer.add(gradient)

        @torch.no_grad()
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            new, parameter.grad = parameter.grad.reshape(-1), None
            if sums:
                sums[0].add_(new)
            else:
                sums.append(new.to(dtype))
            arrived()

        parameter.register_post_accumulate_grad_hook(add)
        return gradient

    def _step_under_way(self) -> tuple[int, float]:
        """Number and low-bit learning rate of the step that `step` completes next."""
        optimizer, step = self.config.optimizer, self.steps_done + 1
        return step, optimizer.low_bit_learning_rate * schedule_factor(step, self.config.training.steps, optimizer)

    def step(self, *_: Any, **__: Any) -> None:
        """One update of everything."""
        optimizer = self.config.optimizer
        step, low_bit_rate = self._step_under_way()
        self.last_factor = factor = schedule_factor(step, self.config.training.steps, optimizer)
        # Phase 1 reduce: what the backward passes have not sent to its owners yet.
        self.reducer.finish()
        # Phase 2 clip: one norm over everything.
        self.grad_norm = self._global_norm()
        clip = clip_factor(self.grad_norm, optimizer.max_grad_norm)
        # Phase 3 update; with fused_backward the low-bit matrices had theirs when their gradients came.
        self._update_high_precision(factor, clip)
        if not optimizer.fused_backward:
            self.low_bit.update(step, low_bit_rate, clip)
        # Phase 4 gather: packed codes.
        self.low_bit.gather_codes()
        self.steps_done = step

    @torch.no_grad()
    def _update_high_precision(self, factor: float, clip: Tensor) -> None:
        # A step that is clipped to nothing has no rate either: the first moments would still move the weights.
        moves = (clip > 0).to(self.master_device)
        for group in self.high_precision.param_groups:
            group["lr"] = group["peak_learning_rate"] * factor * moves
        means = []
        for gradient in self.gradients:
            assert gradient.mean is not None
            means.append(gradient.mean.view(-1))
            gradient.mean = None
        self.feed.put(means, clip)
        del means
        self.high_precision.step()

    def finalize_gradient_accumulation_boundary(self) -> None:
        """DeepSpeed's engine calls this in stages 2 and 3 before `step`; its gradients are ours."""

    def refresh_parameters(self) -> None:
        """Copies masters into the parameters the model computes with, after masters were loaded."""
        refresh_parameters(self.high_precision, self.shards, self.config.zero_stage)

    def _global_norm(self) -> Tensor:
        """L2 norm of all gradients, fp32 scalar; each element counted by exactly one rank of the world."""
        mine = list(self.low_bit.gradients)
        for shard, gradient in zip(self.shards, self.gradients, strict=True):
            if not (shard.parameter.replicated and self.groups.tensor.rank() > 0):
                mine.append(gradient)
        total = self.reducer.square_norm(mine).to(self.groups.device)
        dist.all_reduce(total, group=self.groups.world)
        return total.sqrt().float()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied with: at most 1, and 0 when the norm is not finite, or hardly (the step then moves nothing)."""
    factor = torch.clamp(max_norm / (norm + NORM_EPSILON), max=1.0) if max_norm > 0 else torch.ones_like(norm)
    return torch.where(norm < GRADIENT_LIMIT, factor, torch.zeros_like(norm))


def build_engine(chunks: nn.ModuleList, config: Config, groups: Groups) -> Any:
    """deepspeed.initialize over the high-precision parameters; `engine.optimizer` becomes a CombinedOptimizer."""
    import deepspeed
    from deepspeed.utils import logger

    # It reports memory and choices at level INFO while building; warnings stay.
    logger.setLevel(logging.WARNING)
    # DeepSpeed would compile a shared-memory collective with ninja at first use on a CPU; gloo does without, and a build
    # that was killed leaves a lock that hangs every later run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if groups.device.type == "cuda" else "gloo", dist_init_required=False
    )
    torch_optimizer = high_precision_optimizer(chunks, config)
    engine, _, _, _ = deepspeed.initialize(
        # A module that is called: stage 3 hangs its gathers on the calls. Several chunks mean pipeline > 1, so stage 0 or 1.
        model=chunks[0] if len(chunks) == 1 else chunks,
        optimizer=torch_optimizer,
        config=deepspeed_config(config, groups.world.size()),
        mpu=MegatronUnit(groups),
        dist_init_required=False,
    )
    # Stages 0 and 1 would reduce at the boundary; see gradients.py.
    engine.enable_backward_allreduce = False
    engine.optimizer = CombinedOptimizer(engine.optimizer, torch_optimizer, chunks, config, groups)
    return engine
