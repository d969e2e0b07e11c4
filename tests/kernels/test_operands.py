"""Unpacked, transposed and multiplied operands: definitions on a CPU, kernels against them on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from dqt_dist.kernels.scaled_matmul import scaled_matmul
from dqt_dist.kernels.transpose import transpose
from dqt_dist.kernels.unpack import unpack_operand
from dqt_dist.lowbit.grid import Bits, make_grid
from dqt_dist.lowbit.packing import pack

E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.int8, E4M3]
# Rows and columns that fill no tile of 64 x 128, and ones that do.
SHAPES = [(70, 132), (64, 128), (256, 1024)]


def packed_codes(bits: Bits, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    grid = make_grid(bits)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (rows, columns), generator=torch.Generator().manual_seed(rows))
    return codes, pack(codes, grid)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", ["ternary", 2, 3, 4])
def test_every_operand_type_holds_the_codes_exactly(bits: Bits, dtype: torch.dtype) -> None:
    codes, packed = packed_codes(bits, 70, 132)
    grid = make_grid(bits)
    assert torch.equal(unpack_operand(packed, grid, 132, dtype).float(), codes.float())
    assert torch.equal(unpack_operand(packed, grid, 132, dtype, transposed=True).float(), codes.float().t())
    if dtype.is_floating_point:
        scale = torch.tensor([2.0**-6, 2.0**-4]).repeat_interleave(35)
        assert torch.equal(unpack_operand(packed, grid, 132, dtype, scale).float(), codes.float() * scale[:, None])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", ["ternary", 2, 3, 4, 8])
def test_unpack_kernel_equals_definition(bits: Bits, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if bits == 8 and dtype == E4M3:
        pytest.skip("e4m3 does not hold 8-bit codes")
    _, packed = packed_codes(bits, *shape)
    grid = make_grid(bits)
    for scale in (None, torch.rand(shape[0])) if dtype in (torch.float32, torch.bfloat16) else (None,):
        for transposed in (False, True):
            found = unpack_operand(
                packed.cuda(), grid, shape[1], dtype, None if scale is None else scale.cuda(), transposed
            )
            assert torch.equal(
                found.cpu().float(), unpack_operand(packed, grid, shape[1], dtype, scale, transposed).float()
            )


def e4m3(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)) * 50).to(E4M3)


def test_transpose_moves_codes_and_scales_tokens() -> None:
    codes = e4m3(20, 48)
    assert torch.equal(transpose(codes).view(torch.uint8), codes.view(torch.uint8).t())
    halved = transpose(codes, torch.full((20, 1), 0.5))
    assert torch.equal(halved.float(), (codes.float() * 0.5).to(E4M3).float().t())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(130, 200), (256, 384)])
def test_transpose_kernel_equals_definition(shape: tuple[int, int]) -> None:
    codes, factor = e4m3(*shape), torch.rand(shape[0], 1)
    for scale in (None, factor):
        found = transpose(codes.cuda(), None if scale is None else scale.cuda())
        assert torch.equal(found.cpu().view(torch.uint8), transpose(codes, scale).view(torch.uint8))


def test_scaled_matmul_is_the_product_of_what_the_codes_stand_for() -> None:
    """Integers below 2^8 and scales that are powers of two: bf16 holds the result."""
    a, b = torch.randint(-3, 4, (5, 16)).float(), torch.randint(-1, 2, (7, 16)).float()
    a_scale, b_scale = 2.0 ** torch.arange(-2, 3)[:, None], 2.0 ** torch.arange(7.0)
    found = scaled_matmul(a.to(E4M3), b.to(E4M3), a_scale, b_scale)
    assert torch.equal(found.float(), (a * a_scale) @ (b * b_scale[:, None]).t())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(256, 512, 128), (1000, 2048, 48), (64, 16384, 256)])
def test_scaled_matmul_on_tensor_cores(shape: tuple[int, int, int]) -> None:
    """Hopper adds fp8 products up with about 14 bits: the error of a sum of k random terms stays below 2^-10 of its scale."""
    m, k, n = shape
    a, b = e4m3(m, k), torch.randint(-1, 2, (n, k)).to(E4M3)
    a_scale, b_scale = torch.rand(m, 1), torch.rand(n)
    found = scaled_matmul(a.cuda(), b.cuda(), a_scale.cuda(), b_scale.cuda()).cpu().double()
    exact = (a.double() @ b.double().t()) * a_scale * b_scale
    assert (found - exact).norm() / exact.norm() < 2.0**-8
