"""DeepSpeed's engine over both kinds of weights: one optimizer object, one gradient norm, one clip.

    high-precision parameters   DeepSpeed's optimizer (ZeRO stage of the config) around torch.optim.AdamW
    low-bit codes               LowBitOptimizer, behind the same step()

Who divides what: Megatron's schedule divides the loss by the number of micro-batches, DeepSpeed and `reduce_rows` divide by
the data-parallel size. Nobody else divides. DeepSpeed's own clipping is off; the clip factor reaches its optimizer through a
hook of the torch optimizer inside, which sees the fp32 gradients just before they are used, whichever wrapper is around it.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqt_dist.config import Config, layout
from dqt_dist.optim.schedule import schedule_factor
from dqt_dist.parallel.groups import Groups, MegatronUnit
from dqt_dist.parallel.low_bit_optimizer import LowBitOptimizer
from dqt_dist.parallel.model import Parameter, low_bit_matrices, parameters

# AdamW's default; the high-precision parameters keep AdamW when Adafactor, which may have no beta1, updates the codes.
DEFAULT_BETA1 = 0.9
# Megatron-LM's clip_grad_norm_fp32 divides by the norm plus this.
NORM_EPSILON = 1e-6


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The user's `deepspeed` section completed with what follows from the other sections."""
    settings = copy.deepcopy(config.deepspeed)
    training = config.training
    bf16 = config.quantization.compute == "bf16"
    settings |= {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": layout(config, world_size).num_microbatches,
        # Megatron's schedule runs the micro-batches; engine.step() is the boundary.
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        # With fp32 sums (below) a hook adds each micro-batch's gradient as it is made; without ZeRO the key means nothing.
        "bf16": {"enabled": bf16, "immediate_grad_update": bf16 and config.zero_stage == 1},
    }
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings.setdefault("steps_per_print", None)
    zero = settings.setdefault("zero_optimization", {})
    zero.setdefault("stage", config.zero_stage)
    if config.zero_stage == 1:
        if bf16:
            # Sum micro-batches in fp32, as Megatron does. Makes DeepSpeed choose its BF16_Optimizer.
            settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        else:
            # The norm is ours; BF16_Optimizer does not take this key, see `_leave_norm_to_us`.
            zero["compute_grad_norm"] = False
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
        fused=vectors[0].is_cuda,
    )


class CombinedOptimizer:
    """DeepSpeed's optimizer interface over both optimizers; whatever is not here is DeepSpeed's own."""

    def __init__(
        self,
        high_precision: Any,
        torch_optimizer: torch.optim.AdamW,
        low_bit: LowBitOptimizer,
        chunks: nn.Module,
        config: Config,
        groups: Groups,
    ) -> None:
        self.high_precision, self.torch_optimizer, self.low_bit = high_precision, torch_optimizer, low_bit
        self.config, self.groups = config, groups
        self.parameters = parameters(chunks)
        torch_optimizer.register_step_pre_hook(self._scale_gradients)
        _create_moments(torch_optimizer)
        _leave_norm_to_us(high_precision, groups)
        self.steps_done = 0
        self.last_factor = 0.0
        self.grad_norm = torch.zeros((), device=groups.device)
        self.clip = torch.ones((), device=groups.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["high_precision"], name)

    def step(self, *_: Any, **__: Any) -> None:
        """One update of everything. The engine has reduced the high-precision gradients already."""
        optimizer = self.config.optimizer
        step = self.steps_done + 1
        self.last_factor = factor = schedule_factor(step, self.config.training.steps, optimizer)
        # Phase 1 reduce: low-bit gradient rows go to their owners.
        self.low_bit.reduce_gradients()
        # Phase 2 clip: one norm over everything.
        self.grad_norm = self._global_norm()
        self.clip = clip_factor(self.grad_norm, optimizer.max_grad_norm)
        # Phase 3 update.
        # A step that is clipped to nothing has no rate either: the first moments would still move the weights.
        moves = self.clip > 0
        for group in self.high_precision.param_groups:
            group["lr"] = group["peak_learning_rate"] * factor * moves
        self.high_precision.step()
        self.low_bit.update(step, optimizer.low_bit_learning_rate * factor, self.clip)
        # Phase 4 gather: packed codes.
        self.low_bit.gather_codes()
        self.steps_done = step

    def _scale_gradients(self, torch_optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Pre-step hook of the torch optimizer inside DeepSpeed's."""
        for group in torch_optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.clip.to(parameter.grad.device)).nan_to_num_(nan=0.0)

    def unsharded_master(self, parameter: Tensor) -> Tensor:
        """The tensor torch's optimizer updates for a parameter that ZeRO does not partition."""
        return self._masters().get(id(parameter), parameter)

    def _masters(self) -> dict[int, Tensor]:
        """fp32 masters of DeepSpeed's bf16 optimizer without ZeRO, by the id of their parameter."""
        low, high = (getattr(self.high_precision, name, []) for name in ("fp16_groups", "fp32_groups"))
        pairs = zip([p for group in low for p in group], [p for group in high for p in group], strict=True)
        return {id(parameter): master for parameter, master in pairs}

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        """Copies masters into the parameters the model computes with, after masters were loaded."""
        if hasattr(self.high_precision, "update_lp_params"):
            self.high_precision.update_lp_params()
        masters = self._masters()
        for parameter in self.parameters:
            if id(parameter.tensor) in masters:
                parameter.tensor.copy_(masters[id(parameter.tensor)])

    def _global_norm(self) -> Tensor:
        """L2 norm of all gradients, fp32 scalar; each element counted by exactly one rank of the world."""
        total = self.low_bit.square_norm().to(self.groups.device)
        for parameter in self.parameters:
            if parameter.replicated and self.groups.tensor.rank() > 0:
                continue
            gradient = owned_gradient(parameter, self.groups)
            if gradient is not None:
                total = total + torch.linalg.vector_norm(gradient.float()).double().square().to(total.device)
        dist.all_reduce(total, group=self.groups.world)
        return total.sqrt().float()


def _create_moments(optimizer: torch.optim.AdamW) -> None:
    """Makes AdamW's state now instead of at its first step, so that a checkpoint can be loaded into it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            on_device = parameter.device if group["fused"] else None
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=on_device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _leave_norm_to_us(high_precision: Any, groups: Groups) -> None:
    """Gives BF16_Optimizer's own norm one zero to work on.

    It would spend a pass over all gradients on a number nobody reads, and fails on a stage whose only parameters are norms
    (an empty list, on tensor-parallel ranks above 0).
    """
    if hasattr(high_precision, "get_grads_for_norm"):
        zero = torch.zeros(1, device=groups.device)
        high_precision.get_grads_for_norm = lambda for_clipping=False: ([zero], {})


def owned_gradient(parameter: Parameter, groups: Groups) -> Tensor | None:
    """The part of a parameter's reduced gradient that this data-parallel rank counts; None when it counts none.

    Under ZeRO it is the fragment in this rank's partition, otherwise data-parallel rank 0 counts the whole.
    """
    tensor = parameter.tensor
    if not hasattr(tensor, "_hp_mapping"):
        return tensor.grad if groups.data.rank() == 0 else None
    mapping = tensor._hp_mapping
    if mapping is None:
        return None
    fragment = mapping.get_lp_grad_fragment(tensor._index_in_param_group).flatten()
    address = mapping.lp_fragment_address
    # BF16_Optimizer accumulates whole parameters and owns a fragment, the ZeRO optimizers keep the fragment only.
    return fragment.narrow(0, address.start, address.numel) if fragment.numel() == tensor.numel() else fragment


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied with: at most 1, and 0 when the norm is not finite (the step then moves nothing)."""
    factor = torch.clamp(max_norm / (norm + NORM_EPSILON), max=1.0) if max_norm > 0 else torch.ones_like(norm)
    return torch.where(norm.isfinite(), factor, torch.zeros_like(norm))


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
        model=chunks,
        optimizer=torch_optimizer,
        config=deepspeed_config(config, groups.world.size()),
        mpu=MegatronUnit(groups),
        dist_init_required=False,
    )
    low_bit = LowBitOptimizer(low_bit_matrices(chunks), config, groups)
    engine.optimizer = CombinedOptimizer(engine.optimizer, torch_optimizer, low_bit, chunks, config, groups)
    return engine
