"""The fp8 product: the definition where it is exact, tensor cores within what they keep of a sum."""

from __future__ import annotations

import pytest
import torch

from dqt_dist.kernels.scaled_matmul import scaled_matmul
from tests.kernels.codes import E4M3, e4m3


def test_scaled_matmul_is_the_product_of_what_the_codes_stand_for() -> None:
    """Integers below 2^8 and scales that are powers of two: bf16 holds the result."""
    a, b = torch.randint(-3, 4, (5, 16)).float(), torch.randint(-1, 2, (7, 16)).float()
    a_scale, b_scale = 2.0 ** torch.arange(-2, 3)[:, None], 2.0 ** torch.arange(7.0)
    found = scaled_matmul(a.to(E4M3), b.to(E4M3), a_scale, b_scale)
    assert torch.equal(found.float(), (a * a_scale) @ (b * b_scale[:, None]).t())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(256, 512, 128), (1000, 2048, 48), (64, 16384, 256)])
def test_scaled_matmul_on_tensor_cores(shape: tuple[int, int, int]) -> None:
    """Hopper keeps about 14 bits of a sum of fp8 products. With random terms the error is below 2^-10 of its scale."""
    m, k, n = shape
    a, b = e4m3(m, k), torch.randint(-1, 2, (n, k)).to(E4M3)
    a_scale, b_scale = torch.rand(m, 1), torch.rand(n)
    found = scaled_matmul(a.cuda(), b.cuda(), a_scale.cuda(), b_scale.cuda()).cpu().double()
    exact = (a.double() @ b.double().t()) * a_scale * b_scale
    assert (found - exact).norm() / exact.norm() < 2.0**-8
