"""Rows over ranks: who owns which, means in rank order bit for bit, packed rows back to everybody."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dqt_dist.parallel.row_sharding import gather_rows, reduce_rows, row_bounds
from tests.distributed import run_distributed

# (rows, ranks): even, uneven, a last rank with fewer, ranks with none, one row.
SHAPES = [(8, 4), (5, 3), (7, 2), (2, 4), (1, 3), (6, 1)]


def part(rank: int, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `rank` puts in: numbers whose sum depends on its order."""
    generator = torch.Generator().manual_seed(100 + rank)
    exponents = torch.randint(-12, 13, (rows, 3), generator=generator)
    return (torch.randn(rows, 3, generator=generator) * 2.0**exponents).to(dtype)


def mean_in_rank_order(rows: int, ranks: int, dtype: torch.dtype = torch.float32) -> Tensor:
    total = part(0, rows, dtype)
    for rank in range(1, ranks):
        total = total + part(rank, rows, dtype)
    return total / ranks


@pytest.mark.parametrize(("rows", "ranks"), SHAPES)
def test_bounds_cut_the_rows_without_gap_or_overlap(rows: int, ranks: int) -> None:
    bounds = row_bounds(rows, ranks)
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(rows))
    assert len(bounds) == ranks and all(stop - start <= -(-rows // ranks) for start, stop in bounds)


def reduce(rank: int, world_size: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    group = dist.group.WORLD
    assert group is not None
    mine = reduce_rows(part(rank, rows, dtype), group, to_all=False)
    return mine.clone(), reduce_rows(part(rank, rows, dtype), group, to_all=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "ranks"), SHAPES)
def test_reduce_rows_is_the_mean_in_rank_order_bit_for_bit(rows: int, ranks: int, dtype: torch.dtype) -> None:
    wanted = mean_in_rank_order(rows, ranks, dtype)
    results = run_distributed(reduce, ranks, rows, dtype)
    for (start, stop), (mine, everything) in zip(row_bounds(rows, ranks), results, strict=True):
        assert torch.equal(mine, wanted[start:stop])
        assert torch.equal(everything, wanted)


def test_the_order_of_the_sum_matters_here() -> None:
    """Negative control: summed from the last rank on, the same parts give other bits."""
    backwards = part(2, 5) + part(1, 5) + part(0, 5)
    assert not torch.equal(backwards / 3, mean_in_rank_order(5, 3))


def gather(rank: int, world_size: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Every rank starts with its own rows right and all others wrong."""
    group = dist.group.WORLD
    assert group is not None
    whole = torch.arange(rows * 5).view(rows, 5).to(dtype)
    start, stop = row_bounds(rows, world_size)[rank]
    mine = torch.full_like(whole, 77)
    mine[start:stop] = whole[start:stop]
    gather_rows(mine, group)
    return mine


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float32])
@pytest.mark.parametrize(("rows", "ranks"), SHAPES)
def test_gather_rows_gives_every_rank_every_row(rows: int, ranks: int, dtype: torch.dtype) -> None:
    wanted = torch.arange(rows * 5).view(rows, 5).to(dtype)
    for found in run_distributed(gather, ranks, rows, dtype):
        assert torch.equal(found, wanted)
