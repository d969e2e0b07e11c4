"""Replicas must hold the same bits: a cheap fingerprint of each weight, compared now and then.

What is replicated over which ranks:

    data parallel      codes (ZeRO stages 0 to 2) and scales; the parameters the model computes with (stages 0 to 2)
    tensor parallel    scales, and the masters of parameters that are not split (norms)

A bit that flips on one rank (faulty memory, a driver's or a network's error) or a rank that goes its own way would otherwise
spoil a run without a word: every later step mixes the two states. The fingerprint of a tensor is, over its 64-bit words w_i,

    sum of mix(w_i + i * g)  mod 2^64        mix a fixed permutation of the 64-bit words, g a constant

Mix can be inverted, so a change of a single word always shows; changes of several words cancel with probability 2^-64. It reads
each weight once, and 8 bytes a tensor travel.
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

# 2^64 divided by the golden ratio (Knuth, The Art of Computer Programming 3, 6.4): its multiples are spread evenly. As int64.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
# The first multiplier of MurmurHash3's 64-bit finaliser (Austin Appleby, public domain). As int64.
ODD = 0xFF51AFD7ED558CCD - (1 << 64)
# Words at once: two int64 temporaries of 32 MiB.
WORDS_AT_ONCE = 1 << 22


def fingerprint(tensor: Tensor) -> Tensor:
    """int64 scalar on the tensor's device; depends on every bit and its place, not on the type of the elements."""
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, content.numel(), 8 * WORDS_AT_ONCE):
        part = content[start : start + 8 * WORDS_AT_ONCE]
        if part.numel() % 8:
            part = torch.cat([part, part.new_zeros(-part.numel() % 8)])
        words = part.clone().view(torch.int64)  # a copy: a view may begin at any byte
        place = torch.arange(start // 8, start // 8 + words.numel(), device=tensor.device)
        total += _mix(words + place * GOLDEN).sum()
    return total


def _mix(words: Tensor) -> Tensor:
    """A permutation of int64 words in which every bit moves others: xor with the upper half, times an odd number, twice."""
    for _ in range(2):
        words = (words ^ ((words >> 32) & 0xFFFFFFFF)) * ODD
    return words ^ ((words >> 32) & 0xFFFFFFFF)


@dataclass(frozen=True)
class Replicated:
    """Tensors that every rank of a group holds alike, in the same order."""

    group: Group
    tensors: dict[str, Tensor]


def replicated(chunks: nn.Module, optimizer: CombinedOptimizer, groups: Groups) -> list[Replicated]:
    """What this rank shares with others."""
    over_data: dict[str, Tensor] = {}
    over_tensor: dict[str, Tensor] = {}
    for weight in low_bit_matrices(chunks):
        assert weight.layout is not None
        name = " ".join(matrix.name for matrix in weight.layout.matrices)
        if weight.gather is None:
            over_data[f"codes of {name}"] = weight.codes
        over_data[f"scales of {name}"] = over_tensor[f"scales of {name}"] = weight.scale
    for shard in optimizer.shards:
        name = shard.parameter.layout.matrices[0].name
        if optimizer.config.zero_stage < 3:
            over_data[f"parameter {name}"] = shard.parameter.tensor
        if shard.parameter.replicated and shard.master is not None:
            over_tensor[f"master of {name}"] = shard.view(shard.master)
    return [Replicated(groups.data, over_data), Replicated(groups.tensor, over_tensor)]


def check_replicas(chunks: nn.Module, optimizer: CombinedOptimizer, groups: Groups, step: int) -> None:
    """Compares all replicas. A collective call; raises RunError on every rank when any two differ, with ranks and names."""
    mine = [line for shared in replicated(chunks, optimizer, groups) for line in _differences(shared, groups.device)]
    differs = torch.tensor(len(mine), device=groups.device)
    dist.all_reduce(differs, group=groups.world)
    if not differs:
        return
    of_ranks: list[list[str]] = [[]] * groups.world.size()
    dist.all_gather_object(of_ranks, mine, group=groups.world)
    lines = sorted({line for lines in of_ranks for line in lines})
    shown = lines[:20] + ([f"... and {len(lines) - 20} more"] if len(lines) > 20 else [])
    raise RunError(
        f"replicas differ after step {step}: memory of a device or a transfer was faulty, or ranks ran different code. "
        f"Nothing was saved after it; take out the machine of the odd rank and start again with --resume auto\n"
        + "\n".join(shown)
    )


def _differences(shared: Replicated, device: torch.device) -> list[str]:
    size = shared.group.size()
    if size == 1 or not shared.tensors:
        return []
    mine = torch.stack([fingerprint(tensor).to(device) for tensor in shared.tensors.values()])
    of_ranks = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(of_ranks, mine, group=shared.group)
    table = torch.stack(of_ranks).tolist()
    ranks = dist.get_process_group_ranks(shared.group)
    lines = []
    for index, name in enumerate(shared.tensors):
        holders: dict[int, list[int]] = defaultdict(list)
        for rank, row in zip(ranks, table, strict=True):
            holders[row[index]].append(rank)
        if len(holders) > 1:
            alike = sorted(holders.values(), key=lambda some: (-len(some), some))
            lines.append(f"{name}: rank(s) {' differ from '.join(', '.join(map(str, some)) for some in alike[::-1])}")
    return lines
