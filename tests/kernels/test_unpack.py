"""Packed codes as operands of products: the definition against the codes, the Triton kernel against the definition."""

from __future__ import annotations

import pytest
import torch

from dqt_dist.config import Bits
from dqt_dist.kernels.unpack import unpack_operand
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.packing import pack
from tests.kernels.runners import INTERPRETED, Runner

E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.int8, E4M3]
# Rows and columns that fill no tile of 64 x 128, ones that do, and columns that fill no group of codes.
SHAPES = [(70, 132), (64, 128), (5, 131)] + ([] if INTERPRETED else [(256, 1024)])


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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", ["ternary", 2, 3, 4, 6, 8])
def test_unpack_kernel_equals_definition(run: Runner, bits: Bits, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if bits in (6, 8) and dtype == E4M3:
        pytest.skip("e4m3 holds codes of up to 4 bits")
    _, packed = packed_codes(bits, *shape)
    grid = make_grid(bits)
    for scale in (None, torch.rand(shape[0])) if dtype in (torch.float32, torch.bfloat16) else (None,):
        for transposed in (False, True):
            found = run(unpack_operand, packed, grid, shape[1], dtype, scale, transposed)
            wanted = unpack_operand(packed, grid, shape[1], dtype, scale, transposed)
            assert torch.equal(found.float(), wanted.float())
