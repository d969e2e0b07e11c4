"""Where DeepSpeed keeps the fp32 master of each high-precision parameter, the same question answered for every ZeRO stage.

    stage 0, fp32    the parameter itself
    stage 0, bf16    an fp32 copy of each parameter
    stage 1 and 2    all parameters of a group, flattened one after the other, cut into D equal pieces: a rank owns one
    stage 3          each parameter, flattened, cut into D equal pieces; a rank's pieces of a group lie one after the other

A `MasterShard` says which elements of a parameter a rank owns and where in which tensor they lie. Everything that needs a
master, its moments or a place for its gradient (update, checkpoint, norm) goes through it, so that DeepSpeed's inner names stand
in this file only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dqt_dist.layers.parameters import Parameter
from dqt_dist.parallel.groups import Group
from dqt_dist.parallel.row_sharding import Bounds


@dataclass
class MasterShard:
    """The fp32 values of one parameter that this rank updates."""

    parameter: Parameter
    bounds: Bounds
    """Elements of the flattened parameter that each data-parallel rank owns; all of them in stage 0."""
    start: int
    """First element that this rank owns."""
    numel: int
    """How many it owns, possibly none."""
    master: Tensor | None
    """The tensor that torch's optimizer updates, of this parameter or of several; None when nothing is owned."""
    offset: int
    """Where the owned elements begin in the flattened master."""

    def view(self, like_master: Tensor) -> Tensor:
        """The owned elements, flat, of a tensor shaped like the master (itself, a moment, a gradient)."""
        return like_master.view(-1).narrow(0, self.offset, self.numel)


def master_shards(high_precision: Any, parameters: list[Parameter], stage: int, group: Group) -> list[MasterShard]:
    """One shard a parameter, in the order of `parameters`; a collective call over `group`, the data-parallel ranks."""
    if stage == 0:
        shards = list(_unsharded(high_precision, parameters))
    elif stage == 3:
        shards = list(_stage_3(high_precision, parameters, group))
    else:
        shards = list(_stage_1_and_2(high_precision, parameters))
    _share_bounds(shards, group)
    return shards


def _unsharded(high_precision: Any, parameters: list[Parameter]) -> Iterator[MasterShard]:
    low, high = (getattr(high_precision, name, []) for name in ("fp16_groups", "fp32_groups"))
    copies = zip([p for group in low for p in group], [p for group in high for p in group], strict=True)
    masters = {id(parameter): master for parameter, master in copies}
    for parameter in parameters:
        numel = parameter.tensor.numel()
        yield MasterShard(parameter, [], 0, numel, masters.get(id(parameter.tensor), parameter.tensor), 0)


def _stage_1_and_2(high_precision: Any, parameters: list[Parameter]) -> Iterator[MasterShard]:
    for parameter in parameters:
        mapping = parameter.tensor._hp_mapping
        if mapping is None:
            yield MasterShard(parameter, [], 0, 0, None, 0)
            continue
        master = high_precision.single_partition_of_fp32_groups[mapping.param_group_index]
        owned, place = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield MasterShard(parameter, [], owned.start, owned.numel, master, place.start)


def _stage_3(high_precision: Any, parameters: list[Parameter], group: Group) -> Iterator[MasterShard]:
    for parameter in parameters:
        tensor: Any = parameter.tensor
        sub_group, offset, share = high_precision.grad_position[high_precision.get_param_id(tensor)]
        start = min(tensor.ds_numel, group.rank() * share)
        numel = min(tensor.ds_numel, start + share) - start
        yield MasterShard(parameter, [], start, numel, high_precision.fp32_partitioned_groups_flat[sub_group], offset)


def _share_bounds(shards: list[MasterShard], group: Group) -> None:
    """Tells every rank what each one owns. Ranks that own nothing get an empty piece where the one before them ends."""
    mine = torch.tensor([[shard.start, shard.numel] for shard in shards])
    everybody: list[Any] = [None] * group.size()
    dist.all_gather_object(everybody, mine, group=group)
    for index, shard in enumerate(shards):
        stop = 0
        for start, numel in (owned[index].tolist() for owned in everybody):
            first = start if numel else stop
            stop = first + numel
            shard.bounds.append((first, stop))


def create_moments(optimizer: torch.optim.AdamW, shards: list[MasterShard]) -> None:
    """Makes AdamW's state now instead of at its first step, so that a checkpoint can be loaded into it.

    DeepSpeed's bf16 optimizer without ZeRO has made a step on zero gradients when it was built: that does not count.
    """
    for master in {id(shard.master): shard.master for shard in shards if shard.master is not None}.values():
        optimizer.state[master] = {
            "step": torch.zeros((), device=master.device if optimizer.defaults["fused"] else None),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }


class GradientFeed:
    """Puts reduced gradients where the torch optimizer inside DeepSpeed's will look for them."""

    def __init__(
        self, high_precision: Any, torch_optimizer: torch.optim.AdamW, shards: list[MasterShard], stage: int
    ) -> None:
        self.high_precision, self.shards, self.stage = high_precision, shards, stage
        self._waiting: dict[int, Tensor] = {}
        if stage == 0:
            torch_optimizer.register_step_pre_hook(self._set_gradients)
        else:
            _switch_off_reduction(high_precision, stage)

    def put(self, gradients: list[Tensor], clip: Tensor) -> None:
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
        if self.stage == 0:
            self._waiting = flat
            return
        for index, master in enumerate(self._held_masters()):
            gradient = flat.get(id(master))
            if gradient is None:  # nothing but padding
                gradient = torch.zeros(master.numel(), device=gradients[0].device)
            if master.grad is not None:  # with offload_optimizer DeepSpeed holds a buffer on the host
                master.grad.copy_(gradient)
            else:
                self.high_precision.averaged_gradients[index] = [gradient]

    def _held_masters(self) -> list[Tensor]:
        if self.stage == 3:
            return self.high_precision.fp32_partitioned_groups_flat
        return self.high_precision.single_partition_of_fp32_groups

    def _set_gradients(self, torch_optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Pre-step hook of the torch optimizer. Before the first step DeepSpeed's bf16 optimizer makes one of its own."""
        for group in torch_optimizer.param_groups:
            for parameter in group["params"]:
                gradient = self._waiting.pop(id(parameter), None)
                if gradient is not None:
                    parameter.grad = gradient.view_as(parameter)


@torch.no_grad()
def refresh_parameters(high_precision: Any, shards: list[MasterShard], stage: int) -> None:
    """Copies masters into the parameters the model computes with, after masters were loaded. A collective call."""
    if stage == 0:
        for shard in shards:
            assert shard.master is not None
            shard.parameter.tensor.copy_(shard.master)
    elif stage == 3:
        high_precision._partition_all_parameters()
        for sub_group in range(len(high_precision.fp16_groups)):
            high_precision._reassign_or_swap_out_partitioned_parameters(sub_group)
        if high_precision.persistent_parameters:
            high_precision.persistent_parameters[0].all_gather(high_precision.persistent_parameters)
    else:
        high_precision.update_lp_params()


def _switch_off_reduction(high_precision: Any, stage: int) -> None:
    """Gradients are ours (gradients.py): DeepSpeed's hooks and buffers for them go."""
    for hook in high_precision._grad_acc_hooks:
        hook.remove()
    high_precision._grad_acc_hooks.clear()
    if stage == 3:
        high_precision.grad_partitions_flat_buffer = None
        high_precision._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.clear()
        # Its own norm is a pass over all gradients, and a wait for the device, for a number nobody reads.
        high_precision._get_norm_groups = lambda: [0.0]
