"""The only file that uses internals of DeepSpeed; the rest of the project uses the class `HighPrecisionOptimizer`.

DeepSpeed keeps fp32 masters and AdamW's moments of the high-precision parameters, and divides masters and moments over
the data-parallel ranks. The rest of this project calls the public methods of the class, the same in every ZeRO stage:

    shards                 which elements of which parameter this rank updates, and where their masters lie
    moments                the optimizer state of a shard
    put_gradients          takes the reduced gradients
    step                   one AdamW step of all masters; the parameters are set from the new masters
    set_rates              the rates of a step
    set_step               AdamW's count of steps, after moments were loaded
    refresh_parameters     sets the parameters from masters that were loaded

Where DeepSpeed keeps the fp32 master of a parameter:

    stage 0, fp32    the parameter itself
    stage 0, bf16    an fp32 copy of each parameter
    stage 1 and 2    all parameters of a group, flattened one after the other, cut into D equal pieces, one per rank
    stage 3          each parameter, flattened, cut into D equal pieces; the pieces of a rank follow each other

DeepSpeed reduces no gradient here (`gradient_reducer.py` does). `INTERNALS` names each internal attribute that is used.
A DeepSpeed that lacks one of the attributes is refused with a message. A test compares the list with this file.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from dqt_dist.config import Config, process_grid
from dqt_dist.errors import RunError, UserError
from dqt_dist.layers.parameters import Parameter
from dqt_dist.optim.schedule import StepRates
from dqt_dist.parallel.groups import Group, Groups
from dqt_dist.parallel.row_sharding import Bounds

_STAGE_1_AND_2 = ("single_partition_of_fp32_groups", "averaged_gradients", "update_lp_params", "_grad_acc_hooks")
_STAGE_3 = (
    "grad_position",
    "get_param_id",
    "fp32_partitioned_groups_flat",
    "averaged_gradients",
    "fp16_groups",
    "persistent_parameters",
    "_partition_all_parameters",
    "_reassign_or_swap_out_partitioned_parameters",
    "_grad_acc_hooks",
    "grad_partitions_flat_buffer",
    "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
    "_get_norm_groups",
)
INTERNALS: dict[int, tuple[str, ...]] = {0: (), 1: _STAGE_1_AND_2, 2: _STAGE_1_AND_2, 3: _STAGE_3}
"""Internal attributes of DeepSpeed's optimizer that each ZeRO stage needs."""

PARAMETER_INTERNALS: dict[int, tuple[str, ...]] = {0: (), 1: ("_hp_mapping",), 2: ("_hp_mapping",), 3: ("ds_numel",)}
"""Attributes that DeepSpeed sets on each parameter."""

BF16_STAGE_0_INTERNALS = ("fp16_groups", "fp32_groups")
"""Internal attributes of the optimizer of stage 0 in bf16. In fp32 this optimizer is torch's own."""

ENGINE_INTERNALS = ("enable_backward_allreduce", "optimizer")
"""Attributes of the engine that this file writes to."""


def require_internals(holder: Any, names: tuple[str, ...]) -> None:
    """Raises RunError when `holder`, an object of DeepSpeed, lacks one of the attributes `names`."""
    missing = [name for name in names if not hasattr(holder, name)]
    if missing:
        raise RunError(
            f"DeepSpeed {version('deepspeed')}: {type(holder).__name__} has no {', '.join(missing)}, which "
            f"dqt_dist/optim/deepspeed_adapter.py needs; install a version that pyproject.toml allows"
        )


# ---- where masters lie ----


@dataclass
class MasterShard:
    """The part of one parameter's fp32 master that this rank updates."""

    parameter: Parameter
    bounds: Bounds
    """[start, stop) of the elements of the flattened parameter that each data-parallel rank owns."""
    start: int
    """First element that this rank owns."""
    numel: int
    """Number of elements that this rank owns, possibly 0."""
    master: Tensor | None
    """The tensor that torch's optimizer updates. It may hold several parameters. None when the rank owns nothing."""
    offset: int
    """Where the owned elements begin in the flattened master."""

    def view(self, like_master: Tensor) -> Tensor:
        """The owned elements, flat, of a tensor of the master's shape (the master itself, a moment, a gradient)."""
        return like_master.view(-1).narrow(0, self.offset, self.numel)


class HighPrecisionOptimizer:
    """DeepSpeed's optimizer of the high-precision parameters. A subclass per way of keeping masters."""

    def __init__(
        self,
        inner: Any,
        torch_optimizer: torch.optim.AdamW,
        parameters: list[Parameter],
        config: Config,
        groups: Groups,
    ) -> None:
        """A collective call over the data-parallel ranks.

        `inner` is DeepSpeed's optimizer, which deepspeed.initialize has made of `torch_optimizer`.
        """
        self.inner, self.torch_optimizer, self.group = inner, torch_optimizer, groups.data
        require_internals(inner, INTERNALS[config.zero_stage])
        for parameter in parameters:
            require_internals(parameter.tensor, PARAMETER_INTERNALS[config.zero_stage])
        self.shards = list(self._locate(parameters))
        """One per parameter, in the order of `parameters`."""
        _exchange_bounds(self.shards, self.group)
        self._create_moments()
        masters = self.masters
        self.device = masters[0].device if masters else groups.device
        """Where masters lie: in the host's memory with offload_optimizer."""
        self._take_over_gradients()

    @property
    def masters(self) -> list[Tensor]:
        """The distinct tensors that hold this rank's masters."""
        return list({id(shard.master): shard.master for shard in self.shards if shard.master is not None}.values())

    def moments(self, shard: MasterShard) -> dict[str, Tensor]:
        """AdamW's state of the tensor that holds the master of `shard`. The shard must own at least one element."""
        return {name: value for name, value in self.torch_optimizer.state[shard.master].items() if name != "step"}

    def set_step(self, step: int) -> None:
        """Sets AdamW's step count, after moments were loaded."""
        for value in self.torch_optimizer.state.values():
            value["step"].fill_(float(step))

    def set_rates(self, rates: StepRates, step_enabled: Tensor) -> None:
        """Sets each group's learning rate to the field of `rates` that the group names, times `step_enabled`, and the
        decay of the groups that decay.

        `step_enabled` is 0-dim on `device`: 1, or 0 for a step that must change nothing.
        """
        for group in self.torch_optimizer.param_groups:
            group["lr"] = getattr(rates, group["rate_name"]) * step_enabled
            group["weight_decay"] = rates.weight_decay if group["decays"] else 0.0

    def put_gradients(self, gradients: list[Tensor], clip: Tensor) -> None:
        """Gives gradients, multiplied by `clip` in fp32, to the torch optimizer.

        `gradients` has one flat tensor per shard, in the order of `shards`: the gradient of the owned elements.
        """
        flat: dict[int, Tensor] = {}
        for shard, gradient in zip(self.shards, gradients, strict=True):
            if shard.master is None:
                continue
            if id(shard.master) not in flat:
                flat[id(shard.master)] = gradient.new_zeros(shard.master.numel(), dtype=torch.float32)
            shard.view(flat[id(shard.master)]).copy_(gradient)
        for gradient in flat.values():
            # clip is 0 for a step whose norm is not finite. 0 * inf is nan, which becomes 0.
            gradient.mul_(clip).nan_to_num_(nan=0.0)
        self._put(flat, gradients[0].device)

    def step(self) -> None:
        """One AdamW step of all masters with the gradients of `put_gradients`. Sets parameters from masters."""
        self.inner.step()

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def refresh_parameters(self) -> None:
        """Copies masters, after a load, into the parameters that the model computes with. A collective call."""
        raise NotImplementedError

    def _locate(self, parameters: list[Parameter]) -> Iterator[MasterShard]:
        """Finds the master of each parameter. `bounds` are filled later."""
        raise NotImplementedError

    def _take_over_gradients(self) -> None:
        """Makes sure that gradients come from `put_gradients` only."""
        raise NotImplementedError

    def _put(self, flat: dict[int, Tensor], device: torch.device) -> None:
        """Puts gradients where the torch optimizer reads them. `flat` has a flat gradient per id of a master."""
        raise NotImplementedError

    def _create_moments(self) -> None:
        """Makes AdamW's state before its first step, so that a checkpoint can be loaded into the state.

        DeepSpeed's bf16 optimizer without ZeRO makes a step on zero gradients when it is built. The new state here has
        step count 0, so the step on zero gradients leaves no trace.
        """
        for master in self.masters:
            self.torch_optimizer.state[master] = {
                "step": torch.zeros((), device=master.device if self.torch_optimizer.defaults["fused"] else None),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }


class Stage0(HighPrecisionOptimizer):
    """Whole masters on every rank: the parameters themselves, or fp32 copies of bf16 ones."""

    def _locate(self, parameters: list[Parameter]) -> Iterator[MasterShard]:
        masters: dict[int, Tensor] = {}
        if self.inner is not self.torch_optimizer:
            require_internals(self.inner, BF16_STAGE_0_INTERNALS)
            low = [parameter for group in self.inner.fp16_groups for parameter in group]
            high = [master for group in self.inner.fp32_groups for master in group]
            masters = {id(parameter): master for parameter, master in zip(low, high, strict=True)}
        for parameter in parameters:
            numel = parameter.tensor.numel()
            yield MasterShard(parameter, [], 0, numel, masters.get(id(parameter.tensor), parameter.tensor), 0)

    def _take_over_gradients(self) -> None:
        self._gradients: dict[int, Tensor] = {}
        self.torch_optimizer.register_step_pre_hook(self._set_gradients)

    def _put(self, flat: dict[int, Tensor], device: torch.device) -> None:
        self._gradients = flat

    def _set_gradients(self, torch_optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Pre-step hook of the torch optimizer. It overwrites the gradients that DeepSpeed's bf16 optimizer has set."""
        for group in torch_optimizer.param_groups:
            for parameter in group["params"]:
                gradient = self._gradients.pop(id(parameter), None)
                if gradient is not None:
                    parameter.grad = gradient.view_as(parameter)

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        for shard in self.shards:
            assert shard.master is not None
            shard.parameter.tensor.copy_(shard.master)


class _Partitioned(HighPrecisionOptimizer):
    """What stages 1 to 3 have in common: one flat master per group."""

    def _held_masters(self) -> list[Tensor]:
        """Flat masters in DeepSpeed's order, including masters that hold only padding."""
        raise NotImplementedError

    def _take_over_gradients(self) -> None:
        for hook in self.inner._grad_acc_hooks:
            hook.remove()
        self.inner._grad_acc_hooks.clear()

    def _put(self, flat: dict[int, Tensor], device: torch.device) -> None:
        for index, master in enumerate(self._held_masters()):
            gradient = flat.get(id(master))
            if gradient is None:  # the master holds only padding
                gradient = torch.zeros(master.numel(), device=device)
            if master.grad is not None:  # with offload_optimizer DeepSpeed holds a buffer on the host
                master.grad.copy_(gradient)
            else:
                self.inner.averaged_gradients[index] = [gradient]


class Stage1And2(_Partitioned):
    """All parameters of a group flattened together. Each rank owns an equal piece of the whole."""

    def _locate(self, parameters: list[Parameter]) -> Iterator[MasterShard]:
        for parameter in parameters:
            mapping = parameter.tensor._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
            if mapping is None:
                yield MasterShard(parameter, [], 0, 0, None, 0)
                continue
            master = self.inner.single_partition_of_fp32_groups[mapping.param_group_index]
            in_parameter, in_master = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield MasterShard(parameter, [], in_parameter.start, in_parameter.numel, master, in_master.start)

    def _held_masters(self) -> list[Tensor]:
        return self.inner.single_partition_of_fp32_groups

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        self.inner.update_lp_params()


class Stage3(_Partitioned):
    """Each parameter flattened by itself. Each rank owns an equal piece of each parameter."""

    def _locate(self, parameters: list[Parameter]) -> Iterator[MasterShard]:
        for parameter in parameters:
            tensor: Any = parameter.tensor
            sub_group, offset, share = self.inner.grad_position[self.inner.get_param_id(tensor)]
            start = min(tensor.ds_numel, self.group.rank() * share)
            numel = min(tensor.ds_numel, start + share) - start
            yield MasterShard(parameter, [], start, numel, self._held_masters()[sub_group], offset)

    def _held_masters(self) -> list[Tensor]:
        return self.inner.fp32_partitioned_groups_flat

    def _take_over_gradients(self) -> None:
        super()._take_over_gradients()
        # Memory for gradients that DeepSpeed does not get.
        self.inner.grad_partitions_flat_buffer = None
        self.inner._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.clear()
        # DeepSpeed's own norm costs a pass over all gradients and a wait for the device, and is not used.
        self.inner._get_norm_groups = lambda: [0.0]

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        inner = self.inner
        inner._partition_all_parameters()
        for sub_group in range(len(inner.fp16_groups)):
            inner._reassign_or_swap_out_partitioned_parameters(sub_group)
        if inner.persistent_parameters:
            inner.persistent_parameters[0].all_gather(inner.persistent_parameters)


HIGH_PRECISION_OPTIMIZERS: dict[int, type[HighPrecisionOptimizer]] = {
    0: Stage0,
    1: Stage1And2,
    2: Stage1And2,
    3: Stage3,
}


def _exchange_bounds(shards: list[MasterShard], group: Group) -> None:
    """Fills `bounds` of each shard with what every rank owns.

    A rank that owns nothing gets an empty range at the end of the range of the rank before.
    """
    own_ranges = torch.tensor([[shard.start, shard.numel] for shard in shards])
    ranges_per_rank: list[Any] = [None] * group.size()
    dist.all_gather_object(ranges_per_rank, own_ranges, group=group)
    for index, shard in enumerate(shards):
        stop = 0
        for start, numel in (ranges[index].tolist() for ranges in ranges_per_rank):
            first = start if numel else stop
            stop = first + numel
            shard.bounds.append((first, stop))


# ---- the engine ----


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The user's `deepspeed` section completed with what follows from the other sections."""
    settings = copy.deepcopy(config.deepspeed)
    training = config.training
    settings |= {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": process_grid(config, world_size).num_microbatches,
        # Megatron's schedule runs the micro-batches. engine.step() is called once per optimizer step.
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        # Gradients given to DeepSpeed are finite. DeepSpeed's own check would wait for the device in every step.
        "bf16": {"enabled": config.quantization.dtype == "bf16", "check_grad_overflow": False},
        # torch's AdamW also updates masters that are offloaded to the host.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    settings.setdefault("steps_per_print", None)
    # DeepSpeed's measurement of throughput waits for the device at the beginning and the end of each step. The training
    # loop measures throughput.
    settings.setdefault("timers", {"throughput": {"enabled": False}})
    zero = settings.setdefault("zero_optimization", {})
    zero.setdefault("stage", config.zero_stage)
    # Buffers for DeepSpeed's reduction, which is not used. In stage 3 they would take a GB.
    zero["contiguous_gradients"] = False
    if config.zero_stage in (1, 2):
        zero["overlap_comm"] = False
        zero["compute_grad_norm"] = False  # CombinedOptimizer computes the norm
        if config.offloads_optimizer:
            # With offload_optimizer DeepSpeed requires its own norm: an unused pass over the gradients.
            del zero["compute_grad_norm"]
    return settings


class ModelParallelUnit:
    """The `mpu` object that DeepSpeed asks for groups, sizes and ranks."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    def get_model_parallel_group(self) -> Group:
        return self.groups.model

    def get_model_parallel_world_size(self) -> int:
        return self.groups.model.size()

    def get_model_parallel_rank(self) -> int:
        return self.groups.model.rank()

    def get_data_parallel_group(self) -> Group:
        return self.groups.data

    def get_data_parallel_world_size(self) -> int:
        return self.groups.data.size()

    def get_data_parallel_rank(self) -> int:
        return self.groups.data.rank()

    def get_tensor_model_parallel_group(self) -> Group:
        return self.groups.tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.groups.tensor.size()

    def get_tensor_model_parallel_rank(self) -> int:
        return self.groups.tensor.rank()

    def get_pipeline_model_parallel_group(self) -> Group:
        return self.groups.pipeline

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.groups.pipeline.size()

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.groups.pipeline.rank()


def initialize_engine(module: nn.Module, torch_optimizer: torch.optim.AdamW, config: Config, groups: Groups) -> Any:
    """Calls deepspeed.initialize for the parameters in `torch_optimizer`, and turns DeepSpeed's reductions off.

    Raises UserError for a value in the `deepspeed` section that DeepSpeed does not take.
    """
    import deepspeed
    from deepspeed.utils import logger

    # DeepSpeed reports memory and choices at level INFO while building. Warnings stay.
    logger.setLevel(logging.WARNING)
    # At first use on a CPU DeepSpeed would compile a shared-memory collective with ninja. gloo does not need the
    # collective, and a build that was killed leaves a lock that hangs every later run. So the collective is marked as
    # not available.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if groups.device.type == "cuda" else "gloo", dist_init_required=False
    )
    try:
        engine, _, _, _ = deepspeed.initialize(
            model=module,
            optimizer=torch_optimizer,
            config=deepspeed_config(config, groups.world.size()),
            mpu=ModelParallelUnit(groups),
            dist_init_required=False,
        )
    except ValidationError as error:  # of a value; all ranks have the same
        problems = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
        raise UserError(f"deepspeed: DeepSpeed refuses the section: {'; '.join(problems)}") from error
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        if config.deepspeed in ({}, {"zero_optimization": {"stage": config.zero_stage}}):
            raise  # no value to blame
        raise UserError(f"deepspeed: DeepSpeed refuses the section: {error}") from error
    require_internals(engine, ENGINE_INTERNALS)
    # Stages 0 and 1 would reduce in engine.step(). gradient_reducer.py reduces instead.
    engine.enable_backward_allreduce = False
    return engine
