"""Rounding: right on average, to one of the two neighbours, and no change of an exact code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dqt_dist.config import Bits
from dqt_dist.lowbit.coordinates import LogicalMatrix, Purpose, RowBlock, ShardLayout, uniform
from dqt_dist.lowbit.grid import Grid, make_grid
from dqt_dist.lowbit.rounding import round_nearest, round_stochastic

ALL_BITS: list[Bits] = ["ternary", 2, 3, 4, 5, 6, 7, 8]
LARGEST_U = 1 - 2.0**-24


def fixed_uniforms(rows: int, columns: int, step: int = 1) -> Tensor:
    """Draws as training takes them; a function of the arguments, so no test here can flake."""
    matrix = LogicalMatrix("test_rounding", rows, columns)
    layout = ShardLayout((matrix,), (RowBlock(0, 0, rows),), columns)
    return uniform(Purpose.ROUND, 0, step, layout, 0, rows, torch.device("cpu"))


def inside(grid: Grid, count: int = 41) -> Tensor:
    """Wanted weights over the whole range of a grid, most of them between codes, in multiples of 2^-10."""
    return (torch.linspace(grid.qmin, grid.qmax, count) * 1024).round() / 1024


@pytest.mark.parametrize("bits", ALL_BITS)
def test_stochastic_rounding_is_unbiased_over_all_u_exactly(bits: Bits) -> None:
    """u takes each of 256 equal steps once, t is a multiple of 1/256: the mean of C' is t with no tolerance."""
    grid = make_grid(bits)
    wanted = torch.arange(256 * grid.qmin, 256 * grid.qmax + 1, 37).float() / 256
    every_u = torch.arange(256).float()[:, None] / 256
    shape = (256, len(wanted))
    rounded = round_stochastic(wanted.expand(shape), every_u.expand(shape), grid)
    assert torch.equal(rounded.double().mean(0), wanted.double())


@pytest.mark.parametrize("bits", ALL_BITS)
def test_stochastic_rounding_is_unbiased_over_the_draws_of_training(bits: Bits) -> None:
    """Within five standard errors of a coin of probability f. Control: rounding to nearest is 100 of them away."""
    grid = make_grid(bits)
    draws, wanted = 1 << 14, inside(grid)
    rounded = round_stochastic(wanted.expand(draws, -1), fixed_uniforms(draws, len(wanted)), grid)
    fraction = (wanted - wanted.floor()).double()
    standard_error = (fraction * (1 - fraction) / draws).sqrt()
    assert bool(((rounded.double().mean(0) - wanted.double()).abs() <= 5 * standard_error).all())
    nearest_error = (round_nearest(wanted, grid).double() - wanted.double()).abs()
    assert bool((nearest_error > 100 * standard_error).any())


@pytest.mark.parametrize("bits", ALL_BITS)
def test_result_is_one_of_the_two_neighbours(bits: Bits) -> None:
    grid = make_grid(bits)
    wanted = inside(grid, 1009).expand(64, -1)
    rounded = round_stochastic(wanted, fixed_uniforms(64, 1009), grid)
    assert rounded.dtype == torch.int8
    assert bool(((rounded == wanted.floor()) | (rounded == wanted.ceil())).all())


@pytest.mark.parametrize("bits", ALL_BITS)
def test_exact_codes_stay_for_every_u(bits: Bits) -> None:
    """A zero update flips nothing. Control: floor(t + u) moves 64 at the largest u, as the next test shows."""
    grid = make_grid(bits)
    codes = torch.arange(grid.qmin, grid.qmax + 1).float()
    for u in (0.0, 2.0**-24, 0.5, LARGEST_U):
        assert torch.equal(round_stochastic(codes, torch.full_like(codes, u), grid).float(), codes)


def test_the_form_floor_of_t_plus_u_would_leave_the_grid() -> None:
    """127 + 0.99999994 is 128 in fp32, and 64 + 0.99999994 is 65: that form flips exact codes, this one does not."""
    grid = make_grid(8)
    t, u = torch.tensor([127.0, 64.0, -64.0]), torch.full((3,), LARGEST_U)
    assert u[0] < 1
    assert (t + u).floor().tolist() == [128.0, 65.0, -63.0]
    assert round_stochastic(t, u, grid).tolist() == [127, 64, -64]


def test_u_decides_at_the_fraction() -> None:
    """Up for u < f, so with probability f; down at u == f. Control: <= would move exact codes at u = 0."""
    grid = make_grid(4)
    t = torch.full((4,), 2.25)
    u = torch.tensor([0.0, 0.25 - 2.0**-24, 0.25, LARGEST_U])
    assert round_stochastic(t, u, grid).tolist() == [3, 3, 2, 2]
    assert round_stochastic(-t, u, grid).tolist() == [-2, -2, -2, -3]


def test_a_wish_below_the_resolution_of_fp32_is_no_wish() -> None:
    """t just below zero: floor is -1 and t + 1 rounds to 1, so the code is 0 for every u. The bias is below 2^-25."""
    t = torch.tensor([-1e-10, -(2.0**-26), 1e-10])
    for u in (0.0, 0.5, LARGEST_U):
        rounded = round_stochastic(t, torch.full_like(t, u), make_grid("ternary"))
        assert rounded.tolist() == [0, 0, 1 if u == 0.0 else 0]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_what_lies_outside_is_clamped(bits: Bits) -> None:
    """Control: without the clamp 8 bits wrap, 128 becomes -128."""
    grid = make_grid(bits)
    wanted = torch.tensor([grid.qmin - 1000.0, grid.qmin - 0.5, grid.qmax + 0.5, grid.qmax + 1.0, grid.qmax + 1000.0])
    ends = [grid.qmin, grid.qmin, grid.qmax, grid.qmax, grid.qmax]
    # u = 0 takes the upper neighbour, which for qmin - 0.5 is the end itself; the largest u takes the lower one.
    for u in (0.0, LARGEST_U):
        assert round_stochastic(wanted, torch.full_like(wanted, u), grid).tolist() == ends
    assert round_nearest(wanted, grid).tolist() == ends


def test_nearest_rounds_half_to_even() -> None:
    wanted = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49, 0.51])
    assert round_nearest(wanted, make_grid(8)).tolist() == [-2, -2, 0, 0, 2, 2, 0, 1]


def test_small_wishes_add_up_only_under_stochastic_rounding() -> None:
    """100 steps of 1/100 of a code move the mean code by 1, within five standard errors; nearest never moves."""
    grid, weights = make_grid(8), 4096
    stochastic = nearest = torch.zeros(1, weights, dtype=torch.int8)
    for step in range(100):
        u = fixed_uniforms(1, weights, step + 1)
        stochastic = round_stochastic(stochastic.float() + 0.01, u, grid)
        nearest = round_nearest(nearest.float() + 0.01, grid)
    assert not bool(nearest.any())
    standard_error = math.sqrt(100 * 0.01 * 0.99 / weights)
    assert abs(float(stochastic.double().mean()) - 1.0) < 5 * standard_error
