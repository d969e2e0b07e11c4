"""Exact sums of squares: the Triton kernel against the definition, and parts against the whole, bit for bit."""

from __future__ import annotations

import pytest
import torch

from dqt_dist.kernels.exact_square_sums import exact_square_sums
from tests.kernels.runners import INTERPRETED, Runner

SHAPES = [(5, 132), (70, 512)] if INTERPRETED else [(5, 132), (70, 512), (300, 2500)]
SCALE = torch.tensor(2.0**24)


def given_gradient(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Elements 20 binary orders apart: the smallest squares are 0 units, the largest 2^56."""
    generator = torch.Generator().manual_seed(rows)
    exponents = torch.randint(-26, 5, (rows, columns), generator=generator)
    return (torch.rand(rows, columns, generator=generator) * 2.0**exponents).to(dtype)


def matrices_of(rows: int) -> torch.Tensor:
    """Three matrices whose rows take turns, as in a fused shard."""
    return (torch.arange(rows) // 3 % 3).to(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_definition(run: Runner, shape: tuple[int, int], dtype: torch.dtype) -> None:
    gradient, row_matrix = given_gradient(*shape, dtype), matrices_of(shape[0])
    found = run(exact_square_sums, gradient, SCALE, row_matrix, 3)
    wanted = exact_square_sums(gradient, SCALE, row_matrix, 3)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.int64 and torch.equal(one, other)
    assert int(wanted[0].max()) > 1 << 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_zero_reads_nothing(run: Runner, dtype: torch.dtype) -> None:
    gradient = torch.full((4, 128), float("nan"), dtype=dtype)
    for sums in run(exact_square_sums, gradient, torch.zeros(()), matrices_of(4), 3):
        assert not sums.any()


def test_parts_add_up_to_the_whole() -> None:
    """Rows split, then columns split. fp32 sums of the same parts differ."""
    gradient, row_matrix = given_gradient(9, 128, torch.float32), matrices_of(9)
    row_sums, column_sums = exact_square_sums(gradient, SCALE, row_matrix, 3)
    assert int(row_sums.sum()) == int(column_sums.sum())
    exact = (gradient.double() * float(SCALE)).square()
    assert torch.allclose(row_sums.double(), exact.sum(1), rtol=1e-6)
    top, bottom = (exact_square_sums(gradient[part], SCALE, row_matrix[part], 3) for part in (slice(4), slice(4, 9)))
    assert torch.equal(torch.cat([top[0], bottom[0]]), row_sums) and torch.equal(top[1] + bottom[1], column_sums)
    left, right = (exact_square_sums(gradient[:, part], SCALE, row_matrix, 3) for part in (slice(50), slice(50, 128)))
    assert torch.equal(left[0] + right[0], row_sums)
    assert torch.equal(torch.cat([left[1], right[1]], dim=1), column_sums)
