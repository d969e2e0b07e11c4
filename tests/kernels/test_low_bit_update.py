"""The Triton kernel of the rounding update against its definition, on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from dqt_dist.kernels.low_bit_update import update_rows
from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.update import RoundingKey, update_rows_reference

pytestmark = pytest.mark.gpu

ALL_BITS = ["ternary", 2, 3, 4, 5, 8]
# Columns below, at and above the kernel's block of 1024, and not a multiple of it; all in whole Philox groups.
COLUMNS = [4, 100, 1024, 1028, 2500]


def fused_pair(bits, columns: int, column_offset: int = 0) -> tuple[LowBitMatrix, LowBitMatrix]:
    """Two equal shards that interleave two logical matrices, as qkv does, with random codes."""
    in_features = columns + column_offset + 8
    matrices = (LogicalMatrix("a", 64, in_features), LogicalMatrix("b", 32, in_features))
    blocks = (RowBlock(0, 8, 6), RowBlock(1, 3, 5), RowBlock(0, 14, 6))
    layout = ShardLayout(matrices, blocks, columns, column_offset)
    grid = make_grid(bits)
    pair = []
    codes = torch.randint(grid.qmin, grid.qmax + 1, (layout.rows, columns), device="cuda")
    for _ in range(2):
        weight = LowBitMatrix(layout.rows, columns, grid, torch.device("cuda"))
        weight.assign(layout)
        weight.scale.copy_(torch.tensor([2.0**-6, 2.0**-5]))
        weight.set_codes(codes)
        pair.append(weight)
    return pair[0], pair[1]


@pytest.mark.parametrize("mode", ["stochastic", "nearest"])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_kernel_equals_definition_where_arithmetic_is_exact(bits, columns: int, mode) -> None:
    """Directions are multiples of 2^-10 and rate / scale a power of two, so t has no rounding error: bits must agree.

    Negative control: another seed gives other codes (asserted below for the stochastic mode).
    """
    ours, reference = fused_pair(bits, columns, column_offset=12)
    direction = torch.randint(-2048, 2049, (ours.rows, columns), device="cuda").float() / 1024
    key = RoundingKey(seed=2**31 + 7, step=1, mode=mode)
    counts = update_rows(ours, direction, 0, 2.0**-6, 0.0, key)
    expected = update_rows_reference(reference, direction, 0, 2.0**-6, 0.0, key)
    assert torch.equal(ours.codes, reference.codes)
    assert torch.equal(counts.long(), expected)
    if mode == "stochastic" and columns >= 100:
        other, _ = fused_pair(bits, columns, column_offset=12)
        other.codes.copy_(reference.codes)
        update_rows(other, direction, 0, 2.0**-6, 0.0, RoundingKey(7, 1, mode))
        update_rows(ours, direction, 0, 2.0**-6, 0.0, key)
        assert not torch.equal(other.codes, ours.codes)


@pytest.mark.parametrize("bits", ["ternary", 4, 8])
def test_kernel_differs_by_contraction_only(bits) -> None:
    """Any direction, rate and decay: t may differ by an ulp of a number below 2^8, 2^-16, so a draw decides otherwise in at
    most about one weight of 2^16; the bound is four times that."""
    ours, reference = fused_pair(bits, 2500)
    torch.manual_seed(1)
    direction = torch.randn(ours.rows, 2500, device="cuda")
    key = RoundingKey(3, 16, "stochastic")
    update_rows(ours, direction, 0, 1.7e-3, 0.1, key)
    update_rows_reference(reference, direction, 0, 1.7e-3, 0.1, key)
    differing = (ours.unpack() != reference.unpack()).double().mean()
    assert differing <= 4 * 2.0**-16


def test_rows_in_parts_equal_rows_at_once() -> None:
    whole, parts = fused_pair("ternary", 1028)
    direction = torch.randn(whole.rows, 1028, device="cuda")
    key = RoundingKey(3, 2, "stochastic")
    update_rows(whole, direction, 0, 1e-2, 0.0, key)
    for start, stop in ((0, 7), (7, 17)):
        update_rows(parts, direction[start:stop].contiguous(), start, 1e-2, 0.0, key)
    assert torch.equal(whole.codes, parts.codes)


def test_not_finite_direction_keeps_the_codes() -> None:
    ours, reference = fused_pair("ternary", 1024)
    direction = torch.full((ours.rows, 1024), float("nan"), device="cuda")
    direction[:, ::2] = float("inf")
    counts = update_rows(ours, direction, 0, 1e-2, 0.0, RoundingKey(3, 2, "stochastic"))
    assert torch.equal(ours.codes, reference.codes)
    assert int(counts[:, 0].sum()) == 0
