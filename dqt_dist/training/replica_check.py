"""Checks that replicas hold the same bits, by comparing a cheap fingerprint of each weight at intervals.

What is replicated over which ranks:

    data parallel      codes (ZeRO stages 0 to 2) and scales; latents (stage 0); the parameters the model computes with
                       (stages 0 to 2); the losses that a spike is measured against
    tensor parallel    scales, and the masters of parameters that are not split (norms)

When a bit flips on one rank (faulty memory, an error of a driver or a network), or a rank runs different code, every
later step mixes the two states. Without the check the run would be spoiled silently. The fingerprint of a tensor is,
over its 64-bit words w_i,

    sum of mix(w_i + i * g)  mod 2^64        mix a fixed permutation of the 64-bit words, g a constant

Mix can be inverted, so a change of a single word always shows. Changes of several words cancel with probability 2^-64.
The check reads each weight once and sends 8 bytes per tensor.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqt_dist.errors import RunError
from dqt_dist.layers.parameters import low_bit_matrices
from dqt_dist.optim.engine import CombinedOptimizer
from dqt_dist.parallel.groups import Group, Groups

# 2^64 divided by the golden ratio (Knuth, The Art of Computer Programming 3, 6.4), whose multiples are spread evenly.
# As int64.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
# The first multiplier of MurmurHash3's 64-bit finaliser (Austin Appleby, public domain). As int64.
ODD = 0xFF51AFD7ED558CCD - (1 << 64)
# Words processed at once, with two int64 temporaries of 32 MiB.
WORDS_AT_ONCE = 1 << 22


def fingerprint(tensor: Tensor) -> Tensor:
    """int64 scalar on the tensor's device. Depends on every bit and its position, not on the type of the elements."""
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, content.numel(), 8 * WORDS_AT_ONCE):
        part = content[start : start + 8 * WORDS_AT_ONCE]
        if part.numel() % 8:
            part = torch.cat([part, part.new_zeros(-part.numel() % 8)])
        words = part.clone().view(torch.int64)  # a copy, because a view may begin at any byte
        place = torch.arange(start // 8, start // 8 + words.numel(), device=tensor.device)
        total += _mix(words + place * GOLDEN).sum()
    return total


def _mix(words: Tensor) -> Tensor:
    """A permutation of int64 words: twice, xor with the upper half and a product with an odd number.

    Every input bit changes several output bits.
    """
    for _ in range(2):
        words = (words ^ ((words >> 32) & 0xFFFFFFFF)) * ODD
    return words ^ ((words >> 32) & 0xFFFFFFFF)


@dataclass(frozen=True)
class ReplicatedTensors:
    """Tensors that must be equal on every rank of a group, by name, in the same order on every rank."""

    group: Group
    tensors: dict[str, Tensor]


def replicated_tensors(
    model_chunks: nn.Module, optimizer: CombinedOptimizer, groups: Groups
) -> list[ReplicatedTensors]:
    """What this rank holds in common with the ranks of its data-parallel and its tensor-parallel group."""
    over_data: dict[str, Tensor] = {"losses of training.spike_window": optimizer.loss_window}
    over_tensor: dict[str, Tensor] = {}
    for weight in low_bit_matrices(model_chunks):
        assert weight.layout is not None
        name = " ".join(matrix.name for matrix in weight.layout.matrices)
        if weight.gather is None:
            over_data[f"codes of {name}"] = weight.codes
        scales = {"scales": weight.scale}
        if weight.latent_grid is not None:
            scales["latent scales"] = weight.latent_scale
        for kind, tensor in scales.items():
            over_data[f"{kind} of {name}"] = over_tensor[f"{kind} of {name}"] = tensor
    for rows in optimizer.low_bit.rows:
        if "latent" in rows.state and not optimizer.low_bit.sharded:
            assert rows.weight.layout is not None
            name = " ".join(matrix.name for matrix in rows.weight.layout.matrices)
            over_data[f"latents of {name}"] = rows.state["latent"]
    for shard in optimizer.shards:
        name = shard.parameter.layout.matrices[0].name
        if optimizer.config.zero_stage < 3:
            over_data[f"parameter {name}"] = shard.parameter.tensor
        if shard.parameter.replicated and shard.master is not None:
            over_tensor[f"master of {name}"] = shard.view(shard.master)
    return [ReplicatedTensors(groups.data, over_data), ReplicatedTensors(groups.tensor, over_tensor)]


def check_replicas(model_chunks: nn.Module, optimizer: CombinedOptimizer, groups: Groups, step: int) -> None:
    """Compares all replicas. A collective call.

    Raises RunError on every rank when any two replicas differ. The message names the tensors and the ranks.
    """
    local_lines = [
        line
        for shared in replicated_tensors(model_chunks, optimizer, groups)
        for line in _differences(shared, groups.device)
    ]
    num_lines = torch.tensor(len(local_lines), device=groups.device)
    dist.all_reduce(num_lines, group=groups.world)
    if not num_lines:
        return
    lines_per_rank: list[list[str]] = [[]] * groups.world.size()
    dist.all_gather_object(lines_per_rank, local_lines, group=groups.world)
    lines = sorted({line for lines in lines_per_rank for line in lines})
    shown = lines[:20] + ([f"... and {len(lines) - 20} more"] if len(lines) > 20 else [])
    raise RunError(
        f"replicas differ after step {step}: memory of a device or a transfer was faulty, or ranks ran different code. "
        f"Nothing was saved after it; take out the machine of the odd rank and start again with --resume auto\n"
        + "\n".join(shown)
    )


def _differences(replicated: ReplicatedTensors, device: torch.device) -> list[str]:
    """A line per tensor whose fingerprints differ, with the ranks. A collective call of the group."""
    size = replicated.group.size()
    if size == 1 or not replicated.tensors:
        return []
    own_fingerprints = torch.stack([fingerprint(tensor).to(device) for tensor in replicated.tensors.values()])
    fingerprints_per_rank = [torch.empty_like(own_fingerprints) for _ in range(size)]
    dist.all_gather(fingerprints_per_rank, own_fingerprints, group=replicated.group)
    table = torch.stack(fingerprints_per_rank).tolist()
    ranks = dist.get_process_group_ranks(replicated.group)
    lines = []
    for index, name in enumerate(replicated.tensors):
        holders: dict[int, list[int]] = defaultdict(list)
        for rank, row in zip(ranks, table, strict=True):
            holders[row[index]].append(rank)
        if len(holders) > 1:
            largest_first = sorted(holders.values(), key=lambda equal_ranks: (-len(equal_ranks), equal_ranks))
            shown = (", ".join(map(str, equal_ranks)) for equal_ranks in reversed(largest_first))
            lines.append(f"{name}: rank(s) {' differ from '.join(shown)}")
    return lines
