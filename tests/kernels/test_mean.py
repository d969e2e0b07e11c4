"""Sums and means over ranks: the Triton kernel against the definition, bit for bit; the definition's order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dqt_dist.kernels.mean import mean_of_parts, sum_of_parts
from tests.kernels.runners import Runner


def given_parts(ranks: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Parts 30 binary orders apart, so that another order of additions gives other bits."""
    generator = torch.Generator().manual_seed(ranks)
    exponents = torch.randint(-15, 16, (ranks, numel), generator=generator)
    return (torch.randn(ranks, numel, generator=generator) * 2.0**exponents).to(dtype)


def test_parts_are_added_in_rank_order_and_divided_once() -> None:
    parts = given_parts(3, 1000, torch.float32)
    expected = ((parts[0] + parts[1]) + parts[2]) / 3
    assert not torch.equal(expected, (parts[0] + (parts[1] + parts[2])) / 3)
    assert torch.equal(mean_of_parts(parts), expected)
    assert torch.equal(sum_of_parts(parts), (parts[0] + parts[1]) + parts[2])


def test_sums_of_integers_are_exact() -> None:
    parts = torch.tensor([[2**24, -5], [1, 2**30], [1, 7]], dtype=torch.int32)
    assert sum_of_parts(parts).tolist() == [2**24 + 2, 2**30 + 2] and sum_of_parts(parts).dtype == torch.int32


@pytest.mark.parametrize("combine", [mean_of_parts, sum_of_parts], ids=["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "numel"), [(2, 8192), (3, 4099), (8, 5)])
def test_kernel_equals_definition(
    run: Runner, ranks: int, numel: int, dtype: torch.dtype, combine: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    parts = given_parts(ranks, numel, dtype)
    parts[0, 0], parts[1, 1] = float("inf"), float("nan")
    expected = combine(parts)
    found = run(combine, parts)
    # A NaN has many forms, and a GPU writes another one than a CPU.
    assert torch.equal(found.isnan(), expected.isnan()) and int(expected.isnan().sum()) == 1
    assert torch.equal(found.nan_to_num(), expected.nan_to_num()) and found.dtype == dtype
