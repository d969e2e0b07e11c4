"""LowBitMatrix: codes are stored and returned, memory is as documented, each row has the scale of its matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dqt_dist.config import Bits
from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.matrix import LowBitMatrix

ALL_BITS: list[Bits] = ["ternary", 2, 3, 4, 5, 6, 7, 8]


def fused_matrix(bits: Bits, columns: int = 12) -> LowBitMatrix:
    """Nine rows of three matrices, interleaved. Each matrix has its own scale."""
    matrices = tuple(LogicalMatrix(name, rows, columns) for name, rows in (("q", 8), ("k", 4), ("v", 4)))
    blocks = (RowBlock(0, 2, 3), RowBlock(1, 1, 1), RowBlock(2, 1, 1), RowBlock(0, 5, 2), RowBlock(1, 2, 2))
    weight = LowBitMatrix(9, columns, make_grid(bits))
    weight.assign(ShardLayout(matrices, blocks, columns))
    weight.scale.copy_(torch.tensor([0.5, 0.03125, 0.3]))
    return weight


def random_codes(weight: LowBitMatrix) -> Tensor:
    return torch.randint(weight.grid.qmin, weight.grid.qmax + 1, (weight.rows, weight.columns), dtype=torch.int8)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("columns", [12, 13])
def test_unpack_gives_the_codes_that_were_set(bits: Bits, columns: int) -> None:
    weight = fused_matrix(bits, columns)
    codes = random_codes(weight)
    weight.set_codes(codes)
    assert torch.equal(weight.unpack(), codes)
    assert torch.equal(weight.unpack(2, 5), codes[2:5])
    weight.set_codes(codes[:3], start=4)
    assert torch.equal(weight.unpack(), torch.cat([codes[:4], codes[:3], codes[7:]]))


def test_each_row_has_the_scale_of_its_logical_matrix() -> None:
    """Control: scales in shard order, or one scale per shard, give another list."""
    expected = torch.tensor([0.5, 0.5, 0.5, 0.03125, 0.3, 0.5, 0.5, 0.03125, 0.03125])
    assert torch.equal(fused_matrix("ternary").row_scale(), expected)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_dequantize_is_scale_times_code(bits: Bits) -> None:
    weight = fused_matrix(bits)
    codes = random_codes(weight)
    weight.set_codes(codes)
    for row in range(weight.rows):
        assert torch.equal(weight.dequantize()[row], codes[row].float() * weight.row_scale()[row])


@pytest.mark.parametrize("bits", ALL_BITS)
def test_quantising_the_dequantised_changes_nothing(bits: Bits) -> None:
    weight = fused_matrix(bits)
    weight.set_codes(random_codes(weight))
    before = weight.codes.clone()
    weight.set_weights(weight.dequantize())
    assert torch.equal(weight.codes, before)
    weight.set_weights(weight.dequantize()[4:7], start=4)
    assert torch.equal(weight.codes, before)


def test_set_weights_takes_the_nearest_code_of_each_row() -> None:
    weight = fused_matrix("ternary", columns=4)
    weight.set_weights(torch.tensor([[0.2, 0.3, -0.3, 9.0]]), start=3)  # scale 0.03125
    weight.set_weights(torch.tensor([[0.2, 0.3, -0.3, 9.0]]), start=5)  # scale 0.5
    assert weight.unpack()[3].tolist() == [1, 1, -1, 1]
    assert weight.unpack()[5].tolist() == [0, 1, -1, 1]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_storage_is_numel_times_storage_bits_over_8(bits: Bits) -> None:
    weight = fused_matrix(bits)
    assert weight.codes.untyped_storage().nbytes() == weight.numel * weight.grid.storage_bits // 8
    # Nothing else of the weight's size is held, only one scale per matrix and one matrix index per row.
    assert {name: tensor.numel() for name, tensor in weight.named_buffers()} == {
        "codes": weight.codes.numel(),
        "scale": 3,
        "row_matrix": 9,
    }
    assert not list(weight.parameters())


def test_codes_and_scale_are_the_state() -> None:
    assert set(fused_matrix(4).state_dict()) == {"codes", "scale"}


def test_a_layout_of_another_shape_is_refused() -> None:
    weight = LowBitMatrix(9, 12, make_grid(4))
    layout = ShardLayout((LogicalMatrix("m", 9, 16),), (RowBlock(0, 0, 9),), 16)
    with pytest.raises(ValueError, match="layout 9 x 16 for a shard of 9 x 12"):
        weight.assign(layout)
