"""adamw_direction against torch.optim.AdamW; with the rounding in one step, moments of 32 and of 8 bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dqt_dist.config import Rounding
from dqt_dist.kernels.low_bit_update import AdamW, update_rows
from dqt_dist.lowbit.block_float import decode_signed, decode_unsigned
from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.update import RoundingKey
from dqt_dist.optim.adamw import Moments, adamw_direction, adamw_update_rows, new_moments
from tests.tolerances import ELEMENTWISE_FP32


@pytest.mark.parametrize(("beta1", "beta2", "epsilon"), [(0.9, 0.95, 1e-8), (0.0, 0.999, 1e-3), (0.5, 0.0, 1e-6)])
def test_equals_torch_adamw_over_several_steps(beta1: float, beta2: float, epsilon: float) -> None:
    """A weight that starts at zero is, without decay, minus the learning rate times the sum of the directions.

    Moments are compared too. Control: without the bias correction the first directions are off by (1 - beta1) and
    sqrt(1 - beta2).
    """
    weight = torch.nn.Parameter(torch.zeros(7, 5))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(beta1, beta2), eps=epsilon, weight_decay=0.0, foreach=False)
    exp_avg, exp_avg_sq, total = torch.zeros(7, 5), torch.zeros(7, 5), torch.zeros(7, 5)
    for step in range(1, 7):
        gradient = torch.randn(7, 5) * 10.0 ** (step - 3)
        weight.grad = gradient.clone()
        optimizer.step()
        kept = gradient.clone()
        total += adamw_direction(gradient, exp_avg, exp_avg_sq, step=step, beta1=beta1, beta2=beta2, epsilon=epsilon)
        assert torch.equal(gradient, kept), "the gradient is read only"
        ELEMENTWISE_FP32.assert_close(-total, weight.detach(), f"step {step}")
        state = optimizer.state[weight]
        ELEMENTWISE_FP32.assert_close(exp_avg, state["exp_avg"], "exp_avg")
        ELEMENTWISE_FP32.assert_close(exp_avg_sq, state["exp_avg_sq"], "exp_avg_sq")


def test_first_direction_is_the_sign_of_the_gradient() -> None:
    """With bias correction, m / (1 - beta1) = g and sqrt(v / (1 - beta2)) = |g|. Four roundings of u = 2^-24."""
    gradient = torch.randn(100)
    direction = adamw_direction(
        gradient, torch.zeros(100), torch.zeros(100), step=1, beta1=0.9, beta2=0.95, epsilon=1e-30
    )
    assert float((direction - gradient.sign()).abs().max()) <= 2.0**-20


def test_a_block_of_rows_gets_the_direction_it_has_in_the_whole() -> None:
    """Updates in chunks and sharding by rows rely on this."""
    gradient, settings = torch.randn(6, 33), {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
    whole = [torch.zeros(6, 33), torch.zeros(6, 33)]
    parts = [torch.zeros(6, 33), torch.zeros(6, 33)]
    for step in (1, 2, 3):
        expected = adamw_direction(gradient, *whole, step=step, **settings)
        blocks = [
            adamw_direction(gradient[a:b], *(m[a:b] for m in parts), step=step, **settings) for a, b in [(0, 1), (1, 6)]
        ]
        assert torch.equal(torch.cat(blocks), expected)
    assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])


# ---- direction and rounding in one step ----

ADAMW = AdamW(beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
ONE = torch.ones(())
KEY = RoundingKey(seed=5, step=1, mode="stochastic")


def shard(rows: int, columns: int, first_row: int = 0, column_offset: int = 0) -> LowBitMatrix:
    """Rows and columns of one 8 x 128 matrix of zeros on the 4-bit grid, scale 1."""
    weight = LowBitMatrix(rows, columns, make_grid(4))
    weight.assign(ShardLayout((LogicalMatrix("m", 8, 128),), (RowBlock(0, first_row, rows),), columns, column_offset))
    weight.set_codes(torch.zeros(rows, columns, dtype=torch.int8))
    return weight


def stepped(
    weight: LowBitMatrix,
    state_bits: int,
    gradients: list[Tensor],
    mode: Rounding = "stochastic",
    clip: Tensor | None = ONE,
) -> Moments:
    moments = new_moments(weight.rows, weight.columns, state_bits)
    for step, gradient in enumerate(gradients, start=1):
        key = RoundingKey(5, step, mode)
        adamw_update_rows(weight, gradient, moments, 0, clip, 0.5, ADAMW, key)
    return moments


def test_with_32_bits_it_is_direction_and_rounding() -> None:
    one, two = shard(8, 128), shard(8, 128)
    gradients = [torch.randn(8, 128) for _ in range(3)]
    moments = stepped(one, 32, gradients, clip=ONE / 4)
    exp_avg, exp_avg_sq = torch.zeros(8, 128), torch.zeros(8, 128)
    for step, gradient in enumerate(gradients, start=1):
        direction = adamw_direction(gradient / 4, exp_avg, exp_avg_sq, step=step, beta1=0.9, beta2=0.95, epsilon=1e-8)
        update_rows(two, direction, 0, 0.5, 0.1, RoundingKey(5, step, "stochastic"))
    assert torch.equal(one.codes, two.codes) and one.codes.unique().numel() > 3
    assert torch.equal(moments["exp_avg"], exp_avg) and torch.equal(moments["exp_avg_sq"], exp_avg_sq)


def test_with_8_bits_the_direction_comes_before_the_rounding_of_moments() -> None:
    """So the first step equals that of 32 bits. Later steps start from rounded moments."""
    gradients = [torch.randn(8, 128) for _ in range(3)]
    first, wanted = shard(8, 128), shard(8, 128)
    stepped(first, 8, gradients[:1])
    stepped(wanted, 32, gradients[:1])
    assert torch.equal(first.codes, wanted.codes)
    exact, rounded = stepped(shard(8, 128), 32, gradients), stepped(shard(8, 128), 8, gradients)
    exp_avg = decode_signed(rounded["exp_avg"], rounded["exp_avg_scale"])
    exp_avg_sq = decode_unsigned(rounded["exp_avg_sq"], rounded["exp_avg_sq_scale"])
    assert not torch.equal(exp_avg, exact["exp_avg"])
    # Three roundings of at most 1/8 each.
    assert ((exp_avg - exact["exp_avg"]).abs() <= 3 / 8 * exact["exp_avg"].abs().max()).all()
    assert ((exp_avg_sq / exact["exp_avg_sq"]).log2().abs() < 3 * math.log2(9 / 8)).all()


@pytest.mark.parametrize("mode", ["stochastic", "nearest"])
def test_a_shard_ends_with_its_part_of_the_whole(mode: Rounding) -> None:
    """Codes and moments of rows 2 to 6 and columns 32 to 127.

    Control: a shard at another place of the matrix draws other words, also for the moments when codes are
    rounded to nearest.
    """
    gradients = [torch.randn(8, 128) for _ in range(3)]
    rows, columns = slice(2, 7), slice(32, 128)
    parts = [gradient[rows, columns].contiguous() for gradient in gradients]
    whole, part, elsewhere = shard(8, 128), shard(5, 96, 2, 32), shard(5, 96, 1, 32)
    wanted, found, other = (
        stepped(whole, 8, gradients, mode),
        stepped(part, 8, parts, mode),
        stepped(elsewhere, 8, parts, mode),
    )
    assert torch.equal(part.unpack(), whole.unpack()[rows, columns])
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name][rows, slice(1, 4) if name.endswith("_scale") else columns]), name
    assert not torch.equal(other["exp_avg"], found["exp_avg"])


@pytest.mark.parametrize("state_bits", [8, 32])
def test_elements_that_are_not_finite_count_as_zero_where_nobody_has_taken_a_norm(state_bits: int) -> None:
    gradient = torch.randn(8, 128)
    zeroed = gradient.clone()
    for place, value in (((0, 3), math.nan), ((1, 5), math.inf), ((2, 7), -math.inf), ((3, 9), 1e30)):
        gradient[place], zeroed[place] = value, 0.0
    one, two = shard(8, 128), shard(8, 128)
    found = stepped(one, state_bits, [gradient] * 2, clip=None)
    wanted = stepped(two, state_bits, [zeroed] * 2, clip=None)
    assert torch.equal(one.codes, two.codes)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("state_bits", [8, 32])
def test_a_clip_of_zero_moves_no_code_and_lets_moments_decay(state_bits: int) -> None:
    """ADAMW has weight decay. Control: with a clip of one and no gradient, first moment and decay move codes."""
    weight, gradient = shard(8, 128), torch.randn(8, 128)
    moments = stepped(weight, state_bits, [gradient])
    codes = weight.codes.clone()
    assert weight.unpack().any()  # decay moves codes that are not 0
    before = {name: tensor.clone() for name, tensor in moments.items()}
    nothing = torch.full((8, 128), math.nan)
    adamw_update_rows(weight, nothing, moments, 0, ONE * 0, 0.5, ADAMW, KEY)
    assert torch.equal(weight.codes, codes)
    assert all(not torch.equal(moments[name], before[name]) for name in ("exp_avg", "exp_avg_sq"))
    adamw_update_rows(weight, torch.zeros(8, 128), moments, 0, ONE, 0.5, ADAMW, KEY)
    assert not torch.equal(weight.codes, codes)
