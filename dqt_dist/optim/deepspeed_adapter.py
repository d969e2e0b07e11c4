"""Everything this project reads of DeepSpeed's insides, behind one small class.

DeepSpeed keeps fp32 masters and AdamW's moments of the high-precision parameters and divides them over the data-parallel ranks. The rest
of this project needs five things of that, the same five in every ZeRO stage (`HighPrecisionOptimizer`):

    shards                 which elements of which parameter this rank updates, and where their masters lie
    moments                the optimizer state of a shard
    put_gradients          where reduced gradients go
    step                   one AdamW step of all masters, and the parameters made of them
    refresh_parameters     the parameters made of masters that were loaded

Where DeepSpeed keeps the fp32 master of a parameter:

    stage 0, fp32    the parameter itself
    stage 0, bf16    an fp32 copy of each parameter
    stage 1 and 2    all parameters of a group, flattened one after the other, cut into D equal pieces: a rank owns one
    stage 3          each parameter, flattened, cut into D equal pieces; a rank's pieces of a group lie one after the other

DeepSpeed reduces no gradient here (`gradient_reducer.py`). `INTERNALS` names each inner attribute that is used; a DeepSpeed without one of
them is refused with a sentence, and a test compares the list with this file.
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
from torch import Tensor, nn

from dqt_dist.config import Config, process_grid
from dqt_dist.errors import RunError
from dqt_dist.layers.parameters import Parameter
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
"""Inner attributes of DeepSpeed's optimizer that each ZeRO stage needs."""

PARAMETER_INTERNALS: dict[int, tuple[str, ...]] = {0: (), 1: ("_hp_mapping",), 2: ("_hp_mapping",), 3: ("ds_numel",)}
"""Attributes that DeepSpeed hangs on each parameter."""

BF16_STAGE_0_INTERNALS = ("fp16_groups", "fp32_groups")
"""Of the optimizer of stage 0 under bf16; under fp32 that optimizer is torch's own."""

ENGINE_INTERNALS = ("enable_backward_allreduce", "optimizer")
"""Attributes of the engine that are written to."""


def require_internals(holder: Any, names: tuple[str, ...]) -> None:
    """Raises RunError when `holder`, an object of DeepSpeed's, lacks one of `names`."""
    missing = [name for name in names if not hasattr(holder, name)]
    if missing:
        raise RunError(
            f"DeepSpeed {version('deepspeed')}: {type(holder).__name__} has no {', '.join(missing)}, which "
            f"dqt_dist/optim/deepspeed_adapter.py needs; install a version that pyproject.toml allows"
        )


# ---- where masters lie ----


@dataclass
class MasterShard:
    """The fp32 values of one parameter that this rank updates."""

    parameter: Parameter
    bounds: Bounds
    """Elements of the flattened parameter that each data-parallel rank owns; all of them in stage 0."""
    start: int
    """First element that this rank owns."""
    numel: int
    """How many elements this rank owns, possibly none."""
    master: Tensor | None
    """The tensor that torch's optimizer updates, of this parameter or of several; None when nothing is owned."""
    offset: int
    """Where the owned elements begin in the flattened master."""

    def view(self, like_master: Tensor) -> Tensor:
        """The owned elements, flat, of a tensor shaped like the master (the master itself, a moment, a gradient)."""
        return like_master.view(-1).narrow(0, self.offset, self.numel)


class HighPrecisionOptimizer:
    """DeepSpeed's optimizer of the high-precision parameters; a subclass per way of keeping masters."""

    def __init__(
        self,
        inner: Any,
        torch_optimizer: torch.optim.AdamW,
        parameters: list[Parameter],
        config: Config,
        groups: Groups,
    ) -> None:
        """A collective call over the data-parallel ranks. `inner` is what deepspeed.initialize made of `torch_optimizer`."""
        self.inner, self.torch_optimizer, self.group = inner, torch_optimizer, groups.data
        require_internals(inner, INTERNALS[config.zero_stage])
        for parameter in parameters:
            require_internals(parameter.tensor, PARAMETER_INTERNALS[config.zero_stage])
        self.shards = list(self._locate(parameters))
        """One per parameter, in the order of `parameters`."""
        _share_bounds(self.shards, self.group)
        self._create_moments()
        masters = self.masters
        self.device = masters[0].device if masters else groups.device
        """Where masters live: the host's memory with offload_optimizer."""
        self._take_over_gradients()

    @property
    def masters(self) -> list[Tensor]:
        """The distinct tensors that hold this rank's masters."""
        return list({id(shard.master): shard.master for shard in self.shards if shard.master is not None}.values())

    def moments(self, shard: MasterShard) -> dict[str, Tensor]:
        """AdamW's state of the tensor that holds the master of `shard`, which must own something."""
        return {name: value for name, value in self.torch_optimizer.state[shard.master].items() if name != "step"}

    def set_step(self, step: int) -> None:
        """Sets AdamW's count of steps, after moments were loaded."""
        for value in self.torch_optimizer.state.values():
            value["step"].fill_(float(step))

    def set_learning_rates(self, multiplier: float, moves: Tensor) -> None:
        """Each group's peak rate times `multiplier`, and times `moves`, 0-dim on `device`: 1, or 0 for a step that must move nothing."""
        for group in self.torch_optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"] * multiplier * moves

    def put_gradients(self, gradients: list[Tensor], clip: Tensor) -> None:
        """Takes the gradient of the owned elements of each shard, flat, in the order of the shards; times `clip`, in fp32."""
        flat: dict[int, Tensor] = {}
        for shard, gradient in zip(self.shards, gradients, strict=True):
            if shard.master is None:
                continue
            if id(shard.master) not in flat:
                flat[id(shard.master)] = gradient.new_zeros(shard.master.numel(), dtype=torch.float32)
            shard.view(flat[id(shard.master)]).copy_(gradient)
        for gradient in flat.values():
            # clip is 0 for a step whose norm is not finite; 0 * inf is nan, which becomes 0.
            gradient.mul_(clip).nan_to_num_(nan=0.0)
        self._put(flat, gradients[0].device)

    def step(self) -> None:
        """One step of all masters with the gradients that were put; the parameters follow."""
        self.inner.step()

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def refresh_parameters(self) -> None:
        """Copies masters into the parameters the model computes with, after masters were loaded. A collective call."""
        raise NotImplementedError

    def _locate(self, parameters: list[Parameter]) -> Iterator[MasterShard]:
        raise NotImplementedError

    def _take_over_gradients(self) -> None:
        """Makes sure that gradients come from `put_gradients` only."""
        raise NotImplementedError

    def _put(self, flat: dict[int, Tensor], device: torch.device) -> None:
        """Puts gradients, flat by id of their master, where the torch optimizer will look for them."""
        raise NotImplementedError

    def _create_moments(self) -> None:
        """Makes AdamW's state now instead of at its first step, so that a checkpoint can be loaded into it.

        DeepSpeed's bf16 optimizer without ZeRO has made a step on zero gradients when it was built: that does not count.
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
        self._waiting: dict[int, Tensor] = {}
        self.torch_optimizer.register_step_pre_hook(self._set_gradients)

    def _put(self, flat: dict[int, Tensor], device: torch.device) -> None:
        self._waiting = flat

    def _set_gradients(self, torch_optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Pre-step hook of the torch optimizer: DeepSpeed's bf16 optimizer puts gradients of its own there before."""
        for group in torch_optimizer.param_groups:
            for parameter in group["params"]:
                gradient = self._waiting.pop(id(parameter), None)
                if gradient is not None:
                    parameter.grad = gradient.view_as(parameter)

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        for shard in self.shards:
            assert shard.master is not None
            shard.parameter.tensor.copy_(shard.master)


class _Partitioned(HighPrecisionOptimizer):
    """What stages 1 to 3 share: one flat master per group."""

    def _held_masters(self) -> list[Tensor]:
        """Flat masters in DeepSpeed's order, those that hold nothing but padding too."""
        raise NotImplementedError

    def _take_over_gradients(self) -> None:
        for hook in self.inner._grad_acc_hooks:
            hook.remove()
        self.inner._grad_acc_hooks.clear()

    def _put(self, flat: dict[int, Tensor], device: torch.device) -> None:
        for index, master in enumerate(self._held_masters()):
            gradient = flat.get(id(master))
            if gradient is None:  # nothing but padding
                gradient = torch.zeros(master.numel(), device=device)
            if master.grad is not None:  # with offload_optimizer DeepSpeed holds a buffer on the host
                master.grad.copy_(gradient)
            else:
                self.inner.averaged_gradients[index] = [gradient]


class Stage1And2(_Partitioned):
    """All parameters of a group flattened together; each rank owns an equal piece."""

    def _locate(self, parameters: list[Parameter]) -> Iterator[MasterShard]:
        for parameter in parameters:
            mapping = parameter.tensor._hp_mapping
            if mapping is None:
                yield MasterShard(parameter, [], 0, 0, None, 0)
                continue
            master = self.inner.single_partition_of_fp32_groups[mapping.param_group_index]
            owned, place = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield MasterShard(parameter, [], owned.start, owned.numel, master, place.start)

    def _held_masters(self) -> list[Tensor]:
        return self.inner.single_partition_of_fp32_groups

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        self.inner.update_lp_params()


class Stage3(_Partitioned):
    """Each parameter flattened by itself; each rank owns an equal piece of each."""

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
        # Memory for gradients that never come.
        self.inner.grad_partitions_flat_buffer = None
        self.inner._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.clear()
        # DeepSpeed's own norm is a pass over all gradients and a wait for the device, for a number nobody reads.
        self.inner._get_norm_groups = lambda: [0.0]

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        inner = self.inner
        inner._partition_all_parameters()
        for sub_group in range(len(inner.fp16_groups)):
            inner._reassign_or_swap_out_partitioned_parameters(sub_group)
        if inner.persistent_parameters:
            inner.persistent_parameters[0].all_gather(inner.persistent_parameters)


OF_STAGE: dict[int, type[HighPrecisionOptimizer]] = {0: Stage0, 1: Stage1And2, 2: Stage1And2, 3: Stage3}


def _share_bounds(shards: list[MasterShard], group: Group) -> None:
    """Tells every rank what each one owns. Ranks that own nothing get an empty piece where the piece before theirs ends."""
    mine = torch.tensor([[shard.start, shard.numel] for shard in shards])
    everybody: list[Any] = [None] * group.size()
    dist.all_gather_object(everybody, mine, group=group)
    for index, shard in enumerate(shards):
        stop = 0
        for start, numel in (owned[index].tolist() for owned in everybody):
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
        # Megatron's schedule runs the micro-batches; engine.step() is the boundary.
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        # Gradients come to DeepSpeed finite; DeepSpeed's own check would wait for the device in every step.
        "bf16": {"enabled": config.quantization.dtype == "bf16", "check_grad_overflow": False},
        # torch's AdamW also updates what is offloaded to the host.
        "zero_force_ds_cpu_optimizer": False,
    }
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings.setdefault("steps_per_print", None)
    # DeepSpeed's measurement of throughput waits for the device at the beginning and the end of each step; ours is in the training loop.
    settings.setdefault("timers", {"throughput": {"enabled": False}})
    zero = settings.setdefault("zero_optimization", {})
    zero.setdefault("stage", config.zero_stage)
    # Buffers for a reduction that is not DeepSpeed's: a GB in stage 3 if left alone.
    zero["contiguous_gradients"] = False
    if config.zero_stage in (1, 2):
        zero["overlap_comm"] = False
        zero["compute_grad_norm"] = False  # the norm is ours
        if config.offloads_optimizer:
            # DeepSpeed insists on a norm of its own there: a pass over the gradients, unused.
            del zero["compute_grad_norm"]
    return settings


class ModelParallelUnit:
    """The `mpu` DeepSpeed asks for: groups, sizes and ranks by method name."""

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
    """deepspeed.initialize over the parameters of `module` that `torch_optimizer` has, with reductions switched off."""
    import deepspeed
    from deepspeed.utils import logger

    # DeepSpeed reports memory and choices at level INFO while building; warnings stay.
    logger.setLevel(logging.WARNING)
    # DeepSpeed would compile a shared-memory collective with ninja at first use on a CPU; gloo does without, and a build
    # that was killed leaves a lock that hangs every later run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if groups.device.type == "cuda" else "gloo", dist_init_required=False
    )
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        optimizer=torch_optimizer,
        config=deepspeed_config(config, groups.world.size()),
        mpu=ModelParallelUnit(groups),
        dist_init_required=False,
    )
    require_internals(engine, ENGINE_INTERNALS)
    # Stages 0 and 1 would reduce at the boundary; see gradient_reducer.py.
    engine.enable_backward_allreduce = False
    return engine
