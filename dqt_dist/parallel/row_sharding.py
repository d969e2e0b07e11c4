"""Pieces of a flat tensor over a process group: who owns which, summing to the owner, gathering from the owners.

An element is summed by its owner in rank order, ((g_0 + g_1) + g_2) + ..., in fp32, after an all-to-all that brings the D parts
together. This is THE order of every sum over data-parallel ranks, in every ZeRO stage, for codes and ordinary parameters alike.
It moves as many bytes as a ring reduce-scatter, depends neither on the backend's algorithm nor on how pieces are cut, and works
for pieces of any size; what it costs is a buffer of D parts of the owned piece, as large as the gradient itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from dqt_dist.parallel.collectives import Kind, all_gather_single, count_sent
from dqt_dist.parallel.groups import Group

Bounds = list[tuple[int, int]]
"""[start, stop) of each rank of a group, in rank order, without gaps."""


def row_bounds(num_rows: int, num_ranks: int) -> Bounds:
    """[start, stop) of each rank: ceil(rows / ranks) each, the last ranks fewer or none."""
    share = -(-num_rows // num_ranks)
    return [(min(num_rows, rank * share), min(num_rows, (rank + 1) * share)) for rank in range(num_ranks)]


@dataclass
class PendingSum:
    """Parts of the owned piece on their way from all ranks."""

    parts: Tensor
    """[ranks, elements of the piece], in the type of the gradients."""
    sent: Tensor
    """What the others read from; kept alive until they have."""
    work: dist.Work | None

    def finish(self) -> Tensor:
        """The mean of the owned piece over the group, flat, in the type of the gradients; waits for the parts."""
        if self.work is not None:
            self.work.wait()
        total = self.parts[0].float()  # the parts themselves when they are fp32
        for part in self.parts[1:]:
            total += part
        total /= self.parts.shape[0]
        return total.to(self.parts.dtype)


def start_sum(flat: Tensor, bounds: Bounds, group: Group) -> PendingSum:
    """Sends each owner its piece of a contiguous 1-D `flat`, asynchronously; `finish` gives this rank's mean."""
    start, stop = bounds[group.rank()]
    parts = flat.new_empty(group.size(), stop - start)
    work = dist.all_to_all_single(
        parts.view(-1),
        flat,
        output_split_sizes=[stop - start] * group.size(),
        input_split_sizes=[high - low for low, high in bounds],
        group=group,
        async_op=True,
    )
    count_sent("gradients", flat, group)
    return PendingSum(parts, flat, work)


@dataclass
class PendingGather:
    """Rows of all ranks on their way."""

    gathered: Tensor
    """[ranks * largest share, ...]"""
    sent: Tensor
    work: dist.Work | None
    num_rows: int

    def finish(self) -> Tensor:
        """[num_rows, ...] of all ranks, a view; waits for them."""
        if self.work is not None:
            self.work.wait()
        return self.gathered[: self.num_rows]


def start_gather(mine: Tensor, num_rows: int, group: Group, kind: Kind) -> PendingGather:
    """Gathers [num_rows, ...] from the rows each rank owns by `row_bounds`, asynchronously; `mine` are this rank's."""
    share = -(-num_rows // group.size())
    gathered = mine.new_empty(share * group.size(), *mine.shape[1:])
    if mine.shape[0] < share:
        # Uneven rows: pad the part to the largest, which costs at most one share.
        padded = mine.new_zeros(share, *mine.shape[1:])
        padded[: mine.shape[0]] = mine
        mine = padded
    work = all_gather_single(gathered, mine, group=group, async_op=True)
    count_sent(kind, gathered, group)
    return PendingGather(gathered, mine, work, num_rows)
