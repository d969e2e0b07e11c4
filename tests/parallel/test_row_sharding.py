"""Rows over ranks: the bounds, means in rank order bit for bit, and the gather of packed rows."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dqt_dist.parallel.collectives import BYTES_SENT
from dqt_dist.parallel.row_sharding import row_bounds, start_gather, start_sum
from tests.distributed import run_distributed

# (rows, ranks): even, uneven, a last rank with fewer, ranks with none, one row.
SHAPES = [(8, 4), (5, 3), (7, 2), (2, 4), (1, 3), (6, 1)]


def part(rank: int, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The gradient of `rank`: numbers whose sum depends on the order of the sum."""
    generator = torch.Generator().manual_seed(100 + rank)
    exponents = torch.randint(-12, 13, (rows, 3), generator=generator)
    return (torch.randn(rows, 3, generator=generator) * 2.0**exponents).to(dtype)


def mean_in_rank_order(rows: int, ranks: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """In fp32, rounded once at the end."""
    total = part(0, rows, dtype).float()
    for rank in range(1, ranks):
        total = total + part(rank, rows, dtype).float()
    return (total / ranks).to(dtype)


@pytest.mark.parametrize(("rows", "ranks"), SHAPES)
def test_bounds_cut_the_rows_without_gap_or_overlap(rows: int, ranks: int) -> None:
    bounds = row_bounds(rows, ranks)
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(rows))
    assert len(bounds) == ranks and all(stop - start <= -(-rows // ranks) for start, stop in bounds)


def reduce(rank: int, world_size: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """This rank's mean, and the bytes that were counted for the exchange."""
    group = dist.group.WORLD
    assert group is not None
    BYTES_SENT.clear()
    bounds = [(3 * start, 3 * stop) for start, stop in row_bounds(rows, world_size)]
    own_mean = start_sum(part(rank, rows, dtype).view(-1), bounds, group).finish()
    return own_mean.view(-1, 3), BYTES_SENT["gradients"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "ranks"), SHAPES)
def test_the_owner_gets_the_mean_in_rank_order_bit_for_bit(rows: int, ranks: int, dtype: torch.dtype) -> None:
    wanted = mean_in_rank_order(rows, ranks, dtype)
    results = run_distributed(reduce, ranks, rows, dtype)
    for (start, stop), (own_mean, sent) in zip(row_bounds(rows, ranks), results, strict=True):
        assert torch.equal(own_mean, wanted[start:stop]) and own_mean.dtype == dtype
        assert sent == rows * 3 * dtype.itemsize * (ranks - 1) // ranks


def test_the_order_of_the_sum_matters_here() -> None:
    """Negative control: summed from the last rank to the first, the same parts give other bits."""
    backwards = part(2, 5) + part(1, 5) + part(0, 5)
    assert not torch.equal(backwards / 3, mean_in_rank_order(5, 3))


def gather(rank: int, world_size: int, rows: int, dtype: torch.dtype) -> Tensor:
    group = dist.group.WORLD
    assert group is not None
    start, stop = row_bounds(rows, world_size)[rank]
    owned = torch.arange(rows * 5).view(rows, 5).to(dtype)[start:stop].clone()
    return start_gather(owned, rows, group, "codes").finish().clone()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float32])
@pytest.mark.parametrize(("rows", "ranks"), SHAPES)
def test_a_gather_gives_every_rank_every_row(rows: int, ranks: int, dtype: torch.dtype) -> None:
    wanted = torch.arange(rows * 5).view(rows, 5).to(dtype)
    for found in run_distributed(gather, ranks, rows, dtype):
        assert torch.equal(found, wanted)
