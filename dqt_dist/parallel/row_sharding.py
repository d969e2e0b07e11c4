"""Pieces of a flat tensor over a process group: who owns which, summing to the owner, gathering from the owners.

An all-to-all brings the D parts of an element to its owner. The owner sums the parts in rank order, ((g_0 + g_1) + g_2)
+ ..., in fp32 (`kernels/mean.py`). This is THE order of every sum over data-parallel ranks, in every ZeRO stage, for
codes and ordinary parameters alike. The order depends neither on the backend's algorithm nor on how pieces are cut. The
all-to-all moves as many bytes as a ring reduce-scatter and takes pieces of any size. It needs a buffer for D parts of
the owned piece, which is as large as the gradient itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from dqt_dist.kernels.mean import mean_of_parts
from dqt_dist.parallel.collectives import Kind, all_gather_single, count_sent
from dqt_dist.parallel.groups import Group

Bounds = list[tuple[int, int]]
"""[start, stop) per rank of a group, in rank order, without gaps."""


def row_bounds(num_rows: int, num_ranks: int) -> Bounds:
    """[start, stop) per rank. A rank gets ceil(rows / ranks) rows; the last ranks get fewer rows or none."""
    share = -(-num_rows // num_ranks)
    return [(min(num_rows, rank * share), min(num_rows, (rank + 1) * share)) for rank in range(num_ranks)]


@dataclass
class PendingSum:
    """The parts of the owned piece, on their way from all ranks."""

    parts: Tensor
    """[ranks, elements of the piece], in the type of the gradients."""
    sent: Tensor
    """The memory that the other ranks read. It must stay allocated until the exchange has finished."""
    work: dist.Work | None

    def finish(self) -> Tensor:
        """Waits for the parts. Returns the mean of the owned piece, flat, in the type of the gradients."""
        if self.work is not None:
            self.work.wait()
        return mean_of_parts(self.parts)


def start_sum(flat: Tensor, bounds: Bounds, group: Group) -> PendingSum:
    """Sends each owner its piece of `flat` (contiguous, 1-D), asynchronously. `finish` returns this rank's mean."""
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
    """The rows of all ranks, on their way."""

    gathered: Tensor
    """[ranks * largest share, ...]"""
    sent: Tensor
    work: dist.Work | None
    num_rows: int

    def finish(self) -> Tensor:
        """Waits for the rows. Returns the rows of all ranks, [num_rows, ...], a view."""
        if self.work is not None:
            self.work.wait()
        return self.gathered[: self.num_rows]


def start_gather(owned: Tensor, num_rows: int, group: Group, kind: Kind) -> PendingGather:
    """Gathers all rows, [num_rows, ...], asynchronously. `owned` are this rank's rows, as `row_bounds` divides them."""
    share = -(-num_rows // group.size())
    gathered = owned.new_empty(share * group.size(), *owned.shape[1:])
    if owned.shape[0] < share:
        # Rows are divided unevenly. The part is padded to the largest share, which costs at most one share.
        padded = owned.new_zeros(share, *owned.shape[1:])
        padded[: owned.shape[0]] = owned
        owned = padded
    work = all_gather_single(gathered, owned, group=group, async_op=True)
    count_sent(kind, gathered, group)
    return PendingGather(gathered, owned, work, num_rows)
