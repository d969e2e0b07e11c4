"""Sums of squares: the Triton kernel against the definition."""

from __future__ import annotations

import math

import pytest
import torch

from dqt_dist.kernels.square_sum import square_sum
from tests.kernels.runners import Runner


def test_sum_is_exact_where_fp64_holds_it() -> None:
    x = torch.randint(-100, 100, (300, 7), generator=torch.Generator().manual_seed(1)).float()
    # vector_norm takes a root, which squaring undoes to two roundings.
    assert abs(float(square_sum(x).sum()) / float(x.double().square().sum()) - 1) < 2.0**-51


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (37, 100), (4097, 333)])
def test_kernel_equals_definition(run: Runner, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Each within the rounding of its order of additions, 2^-53 per addition.

    The kernel adds 32 values after one another and then a tree. torch's norm on the CPU has fewer and longer sums.
    Values are 20 binary orders apart, so fp32 sums would fail.
    """
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-20, 1, shape, generator=generator)).to(dtype)
    exact = math.fsum(x.double().square().flatten().tolist())
    assert abs(float(run(square_sum, x).sum()) / exact - 1) < 2.0**-47
    assert abs(float(square_sum(x).sum()) / exact - 1) < 2.0**-40
    assert float(run(square_sum, x.new_full(shape, float("inf"))).sum()) == float("inf")
