"""Rows of a matrix over a process group: who owns which, summing to the owner, gathering from the owners.

The sum of a row is taken by its owner in rank order, ((g_0 + g_1) + g_2) + ..., after an all-to-all that brings the D parts
together. It moves as many bytes as a ring reduce-scatter, does not depend on the backend's algorithm, and works for any row
count; what it costs is a buffer of D parts of the owned rows, as large as the gradient itself.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from dqt_dist.layers.collectives import all_gather_single
from dqt_dist.parallel.groups import Group


def row_bounds(num_rows: int, num_ranks: int) -> list[tuple[int, int]]:
    """[start, stop) of each rank: ceil(rows / ranks) each, the last ranks fewer or none."""
    share = -(-num_rows // num_ranks)
    return [(min(num_rows, rank * share), min(num_rows, (rank + 1) * share)) for rank in range(num_ranks)]


def reduce_rows(matrix: Tensor, group: Group, to_all: bool) -> Tensor:
    """Mean over `group` of a contiguous [rows, columns]; may reuse its memory.

    Returns this rank's rows, or with `to_all` every row (summed by the owners, then gathered).
    """
    num_ranks, rank = group.size(), group.rank()
    if num_ranks == 1:
        return matrix
    rows, columns = matrix.shape
    bounds = row_bounds(rows, num_ranks)
    start, stop = bounds[rank]
    parts = matrix.new_empty(num_ranks, stop - start, columns)
    dist.all_to_all_single(
        parts.view(-1),
        matrix.view(-1),
        output_split_sizes=[(stop - start) * columns] * num_ranks,
        input_split_sizes=[(high - low) * columns for low, high in bounds],
        group=group,
    )
    total = parts[0]
    for part in parts[1:]:
        total += part
    total /= num_ranks
    if not to_all:
        return total
    matrix[start:stop] = total
    gather_rows(matrix, group)
    return matrix


def gather_rows(matrix: Tensor, group: Group) -> None:
    """Fills [rows, columns] on every rank from the rows each one owns, in place."""
    num_ranks, rank = group.size(), group.rank()
    if num_ranks == 1:
        return
    rows = matrix.shape[0]
    start, stop = row_bounds(rows, num_ranks)[rank]
    share = -(-rows // num_ranks)
    if rows == share * num_ranks:
        all_gather_single(matrix, matrix[start:stop].clone(), group=group)
        return
    # Uneven rows: pad each part to the largest, which costs at most one share of packed bytes.
    mine = matrix.new_zeros(share, *matrix.shape[1:])
    mine[: stop - start] = matrix[start:stop]
    gathered = matrix.new_empty(share * num_ranks, *matrix.shape[1:])
    all_gather_single(gathered, mine, group=group)
    matrix.copy_(gathered[:rows])
