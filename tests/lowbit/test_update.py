"""The update on the grid: AdamW on average, no change without a direction, equal codes for equal keys."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dqt_dist.config import Bits
from dqt_dist.kernels.low_bit_update import sum_by_matrix, update_rows
from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.update import RoundingKey
from dqt_dist.optim.adamw import adamw_direction

ALL_BITS: list[Bits] = ["ternary", 2, 3, 4, 5, 6, 7, 8]
KEY = RoundingKey(seed=1234, step=1, mode="stochastic")


def matrix(bits: Bits, rows: int, columns: int, scale: float = 1.0) -> LowBitMatrix:
    """One whole logical matrix of zeros."""
    weight = LowBitMatrix(rows, columns, make_grid(bits))
    weight.assign(ShardLayout((LogicalMatrix("m", rows, columns),), (RowBlock(0, 0, rows),), columns))
    weight.scale.fill_(scale)
    weight.set_codes(torch.zeros(rows, columns, dtype=torch.int8))
    return weight


def fused(bits: Bits = 4) -> LowBitMatrix:
    """Two matrices interleaved in six rows, with scales 1 and 1/4."""
    matrices = (LogicalMatrix("a", 6, 8), LogicalMatrix("b", 3, 8))
    blocks = (RowBlock(0, 2, 2), RowBlock(1, 1, 1), RowBlock(0, 4, 2), RowBlock(1, 2, 1))
    weight = LowBitMatrix(6, 8, make_grid(bits))
    weight.assign(ShardLayout(matrices, blocks, 8))
    weight.scale.copy_(torch.tensor([1.0, 0.25]))
    weight.set_codes(torch.zeros(6, 8, dtype=torch.int8))
    return weight


def random_codes(weight: LowBitMatrix) -> Tensor:
    return torch.randint(weight.grid.qmin, weight.grid.qmax + 1, (weight.rows, weight.columns), dtype=torch.int8)


def counted_update(weight: LowBitMatrix, direction: Tensor, start: int, *settings: Any) -> Tensor:
    """`update_rows` with the counts of each logical matrix, int64 [matrices, 3]."""
    return sum_by_matrix(weight, start, update_rows(weight, direction, start, *settings))


# ---- AdamW on a fine grid ----


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_a_fine_grid_follows_torch_adamw(weight_decay: float) -> None:
    """8 bits with a scale of 1/32, a learning rate of 3.2 codes, five steps.

    All 4096 weights of a row have the same start and the same gradients. Therefore:

    each weight is within one code per step of AdamW's weight, because a rounding changes it by less than one code;
    the mean is AdamW's within five standard errors, because the variance of a rounding is at most 1/4.

    Controls: a wrong sign, the scale left out or a missing decay are dozens of standard errors away.
    """
    rows, columns, steps, scale = 4096, 6, 5, 1 / 32
    weight = matrix(8, rows, columns, scale)
    start = torch.tensor([-64, -20, -3, 0, 17, 50], dtype=torch.int8)
    weight.set_codes(start.expand(rows, columns))
    reference = torch.nn.Parameter(start.float() * scale)
    optimizer = torch.optim.AdamW([reference], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    moments = torch.zeros(columns), torch.zeros(columns)
    for step in range(1, steps + 1):
        gradient = torch.randn(columns)
        reference.grad = gradient.clone()
        optimizer.step()
        direction = adamw_direction(gradient, *moments, step=step, beta1=0.9, beta2=0.95, epsilon=1e-8)
        update_rows(weight, direction.expand(rows, columns), 0, 0.1, weight_decay, replace(KEY, step=step))
    error = weight.dequantize().double() - reference.detach().double()
    assert float(error.abs().max()) < steps * scale
    assert float(error.mean(0).abs().max()) < 5 * scale * math.sqrt(steps / 4 / rows)
    assert float((reference.detach() - start * scale).abs().max()) > 3 * scale


@pytest.mark.parametrize("bits", ALL_BITS)
def test_one_update_is_right_on_average(bits: Bits) -> None:
    """E[C'] = C - (lr / s) direction over 8192 rows, within five standard errors; every new code is a neighbour."""
    rows, columns, scale, learning_rate = 8192, 11, 0.125, 0.05
    weight = matrix(bits, rows, columns, scale)
    direction = torch.linspace(-2, 2, columns)
    wanted = -direction.double() * learning_rate / scale
    update_rows(weight, direction.expand(rows, columns), 0, learning_rate, 0.0, KEY)
    codes = weight.unpack().double()
    assert bool(((codes == wanted.float().floor()) | (codes == wanted.float().ceil())).all())
    fraction = wanted - wanted.floor()
    standard_error = (fraction * (1 - fraction) / rows).sqrt()
    # 2^-24: learning_rate / scale is rounded to fp32.
    assert bool(((codes.mean(0) - wanted).abs() <= 5 * standard_error + 2.0**-24).all())


# ---- what must not change ----


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("mode", ["stochastic", "nearest"])
def test_zero_update_flips_nothing(bits: Bits, mode: str) -> None:
    weight = matrix(bits, 64, 52, 0.3)
    codes = random_codes(weight)
    weight.set_codes(codes)
    counts = counted_update(weight, torch.zeros(64, 52), 0, 0.1, 0.0, RoundingKey(1, 1, mode))  # type: ignore[arg-type]
    assert torch.equal(weight.unpack(), codes)
    assert counts.tolist() == [[0, int((codes == 0).sum()), 0]]


def test_a_direction_that_is_not_finite_keeps_its_code() -> None:
    """The other codes of the row change. Control: nan cast to int8 is an arbitrary code."""
    weight = matrix(4, 1, 4)
    weight.set_codes(torch.tensor([[3, -5, 7, 2]]))
    direction = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]])
    counts = counted_update(weight, direction, 0, 1.0, 0.0, KEY)
    assert weight.unpack().tolist() == [[3, -5, 7, 1]]
    assert counts.tolist() == [[1, 0, 0]]


# ---- which draws ----


def updated(weight: LowBitMatrix, direction: Tensor, key: RoundingKey = KEY) -> Tensor:
    update_rows(weight, direction, 0, 0.1, 0.0, key)
    return weight.unpack().clone()


def test_the_same_key_gives_the_same_codes() -> None:
    direction = torch.randn(64, 52)
    first = updated(matrix(8, 64, 52, 0.3), direction)
    assert torch.equal(first, updated(matrix(8, 64, 52, 0.3), direction))


@pytest.mark.parametrize("other", [replace(KEY, step=2), replace(KEY, seed=1235)])
def test_another_step_or_seed_gives_other_draws(other: RoundingKey) -> None:
    """With an update of half a code, two independent draws agree on half of the codes, within five standard errors."""
    direction = torch.full((128, 128), 5.0)
    first, second = (updated(matrix(8, 128, 128, 1.0), direction, key) for key in (KEY, other))
    agreement = float((first == second).double().mean())
    assert abs(agreement - 0.5) < 5 * 0.5 / 128


def test_blocks_of_rows_give_the_codes_of_the_whole() -> None:
    """Blocks of an update, and rows of another rank: `start` is part of the coordinates.

    Control: the second block, updated as if it were the first, takes the draws of the first.
    """
    direction = torch.randn(6, 8) * 3
    whole, parts, wrong = fused(), fused(), fused()
    codes = random_codes(whole)
    for weight in (whole, parts, wrong):
        weight.set_codes(codes)
    counts = counted_update(whole, direction, 0, 0.1, 0.0, KEY)
    part_counts = torch.zeros_like(counts)
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        part_counts += counted_update(parts, direction[start:stop], start, 0.1, 0.0, KEY)
    assert torch.equal(parts.unpack(), whole.unpack()) and torch.equal(part_counts, counts)
    assert not torch.equal(whole.unpack(), codes)


def test_scales_are_those_of_each_rows_matrix() -> None:
    """One unit of learning rate is one code of matrix a and four of matrix b."""
    weight = fused(bits=8)
    update_rows(weight, torch.full((6, 8), -1.0), 0, 1.0, 0.0, KEY)
    assert weight.unpack()[:, 0].tolist() == [1, 1, 4, 1, 1, 4]


def test_weight_decay_pulls_to_zero() -> None:
    """t = C (1 - lr wd) with nothing else: exact at lr wd = 1/2 on even codes."""
    weight = matrix(8, 1, 4)
    weight.set_codes(torch.tensor([[-100, -2, 0, 64]]))
    update_rows(weight, torch.zeros(1, 4), 0, 0.25, 2.0, KEY)
    assert weight.unpack().tolist() == [[-50, -1, 0, 32]]


# ---- counts ----


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_counts_are_per_matrix_flips_zeros_and_clamped(bits: Bits) -> None:
    """Counts by hand, with exact wanted weights.

    Codes of 8 bits are not packed, so the result of `unpack` shares the memory that is then written. Counts after the
    write would show no flip.
    """
    weight = fused(bits)
    codes = torch.zeros(6, 8, dtype=torch.int8)
    codes[0, 0], codes[0, 1], codes[2, 0] = 1, weight.grid.qmin, weight.grid.qmax
    weight.set_codes(codes)
    direction = torch.zeros(6, 8)
    direction[0, 0] = 1.0  # a: 1 -> 0, a flip
    direction[0, 1] = 1.0  # a: qmin -> qmin - 1, clamped, no flip
    direction[3, 5] = -2.0  # a: 0 -> 2, a flip
    direction[2, 0] = -0.25  # b: qmax -> qmax + 1 at scale 1/4, clamped, no flip
    direction[5, 5] = 0.5  # b: 0 -> -2, a flip
    counts = counted_update(weight, direction, 0, 1.0, 0.0, KEY)
    a = [2, 4 * 8 - 2, 1]  # all of a but qmin and 2 are zero now
    b = [1, 2 * 8 - 2, 1]  # all of b but qmax and -2
    assert counts.tolist() == [a, b] and counts.dtype == torch.int64


def test_counts_of_a_block_leave_other_matrices_at_zero() -> None:
    weight = fused()
    counts = counted_update(weight, torch.zeros(1, 8), 2, 1.0, 0.0, KEY)  # row 2 belongs to matrix b
    assert counts.tolist() == [[0, 0, 0], [0, 8, 0]]


# ---- why stochastic ----


def train_regression(mode: str, steps: int = 200) -> tuple[float, float, LowBitMatrix]:
    """Fits y = W* x, W* 16 x 32 on the 4-bit grid, by full-batch AdamW. Returns first loss, last loss and weight.

    The learning rate is a tenth of a code per step, falling to zero.
    """
    generator = torch.Generator().manual_seed(0)
    scale = 0.25
    target = torch.randint(-8, 8, (16, 32), generator=generator) * scale
    x = torch.randn(256, 32, generator=generator)
    weight = matrix(4, 16, 32, scale)
    moments = torch.zeros(16, 32), torch.zeros(16, 32)
    losses = []
    for step in range(1, steps + 1):
        error = x @ (weight.dequantize() - target).t()
        losses.append(float(error.square().mean()))
        gradient = 2 * error.t() @ x / error.numel()
        direction = adamw_direction(gradient, *moments, step=step, beta1=0.9, beta2=0.95, epsilon=1e-8)
        rate = scale / 10 * (1 - (step - 1) / steps)
        update_rows(weight, direction, 0, rate, 0.0, RoundingKey(7, step, mode))  # type: ignore[arg-type]
    return losses[0], losses[-1], weight


def test_stochastic_rounding_learns_where_nearest_stands_still() -> None:
    """At a tenth of a code per step rounding to nearest changes no code.

    Stochastic rounding from the same start brings the loss below a tenth. Measured: 1/48; other roundings in the
    gradients may change a few draws.
    """
    first, last, weight = train_regression("nearest")
    assert last == first and not bool(weight.unpack().any())
    first, last, _ = train_regression("stochastic")
    assert last < first / 10
