"""Scales: the rules, and that the bits of a scale do not depend on the division of the matrix."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dqt_dist.config import Bits, ScaleRule
from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout, normal
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.scale import FIXED_POINT, WeightStatistics, choose_scale

STD = 0.02
RULES: list[ScaleRule] = ["absmean", "sigma", "absmax", "paper"]
BITS: list[Bits] = ["ternary", 2, 3, 4, 8]


def initial_weights(rows: int = 64, columns: int = 48) -> Tensor:
    """The initial weights of a run: normal draws times the standard deviation."""
    layout = ShardLayout((LogicalMatrix("m", rows, columns),), (RowBlock(0, 0, rows),), columns)
    return normal(7, layout, 0, rows, torch.device("cpu")) * STD


def direct(weights: Tensor, rule: ScaleRule, qmax: int, sigmas: float) -> float:
    """The rules as the table in scale.py writes them, in float64."""
    w = weights.double()
    mean_abs = float(w.abs().mean())
    return {
        "absmean": mean_abs,
        "sigma": sigmas * math.sqrt(float(w.square().mean())) / qmax,
        "absmax": float(w.abs().max()) / qmax,
        "paper": mean_abs / qmax,
    }[rule]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", BITS)
def test_rules_equal_their_formulas(rule: ScaleRule, bits: Bits) -> None:
    """A fixed-point step is 2^-20 units and mean|W| is 0.8 units: at most 2^-20. The fp32 result adds 2^-24."""
    weights, grid = initial_weights(), make_grid(bits)
    scale = choose_scale(WeightStatistics.of(weights, STD), grid, rule, sigmas=3.0, power_of_two=False)
    assert scale == pytest.approx(direct(weights, rule, grid.qmax, 3.0), rel=2.0**-20)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", BITS)
def test_power_of_two_is_the_nearest_one_in_the_exponent(rule: ScaleRule, bits: Bits) -> None:
    statistics, grid = WeightStatistics.of(initial_weights(), STD), make_grid(bits)
    plain = choose_scale(statistics, grid, rule, sigmas=3.0, power_of_two=False)
    rounded = choose_scale(statistics, grid, rule, sigmas=3.0, power_of_two=True)
    assert math.frexp(rounded)[0] == 0.5
    assert 2**-0.5 <= rounded / plain <= 2**0.5


def test_ternary_at_std_0_02_is_2_to_the_minus_6() -> None:
    """mean|W| = 0.02 * sqrt(2 / pi) = 0.01596 and 2^-6 = 0.015625."""
    statistics = WeightStatistics.of(initial_weights(), STD)
    assert choose_scale(statistics, make_grid("ternary"), "absmean", sigmas=3.0, power_of_two=True) == 2.0**-6


@pytest.mark.parametrize("bits", ["ternary", 2, 3, 4, 5, 6, 7, 8])
def test_a_power_of_two_scale_times_any_code_is_exact_in_bf16(bits: Bits) -> None:
    """Control: at the plain scale of the same 8-bit matrix products are rounded."""
    grid, statistics = make_grid(bits), WeightStatistics.of(initial_weights(), STD)
    codes = torch.arange(grid.qmin, grid.qmax + 1).float()
    exact = codes * choose_scale(statistics, grid, "absmax", sigmas=3.0, power_of_two=True)
    assert torch.equal(exact.bfloat16().float(), exact)
    if bits == 8:
        rounded = codes * choose_scale(statistics, grid, "absmax", sigmas=3.0, power_of_two=False)
        assert not torch.equal(rounded.bfloat16().float(), rounded)


def as_integers(statistics: WeightStatistics) -> list[int]:
    sums = (statistics.count, statistics.abs_sum, statistics.square_sum, statistics.abs_max)
    assert all(x.dtype == torch.int64 for x in sums), "float sums would depend on the order"
    return [int(x) for x in sums]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 64 * 48), max_size=8), st.randoms(use_true_random=False))
def test_statistics_of_any_partition_merge_to_those_of_the_whole(cuts: list[int], order) -> None:
    """Equality, empty parts included. Control: float sums of the same parts depend on the order, as shown below."""
    flat = initial_weights().flatten()
    edges = [0, *sorted(cuts), flat.numel()]
    parts = [WeightStatistics.of(flat[a:b], STD) for a, b in itertools.pairwise(edges)]
    order.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert as_integers(merged) == as_integers(WeightStatistics.of(flat, STD))


def test_float_sums_of_parts_depend_on_the_cut() -> None:
    """Control of the test above: float sums depend on the order of the parts, fixed-point sums do not."""
    magnitudes = initial_weights(256, 256).abs()
    by_rows = sum(float(part.sum()) for part in magnitudes.chunk(4, dim=0))
    by_columns = sum(float(part.sum()) for part in magnitudes.chunk(4, dim=1))
    assert by_rows != by_columns


def test_fixed_point_holds_the_largest_draw_of_the_largest_matrix() -> None:
    """2^37 weights at the end of the normal table (below 4.33 units) stay below 2^63; a step is 2^-20 units."""
    end = torch.tensor([4.33 * STD])
    assert int(WeightStatistics.of(end, STD).square_sum) << 37 < 1 << 63
    assert FIXED_POINT == 2**20


def test_parts_in_different_units_are_not_added() -> None:
    with pytest.raises(ValueError, match=r"units of 0\.02 and 1\.0"):
        WeightStatistics.of(torch.ones(2), STD).merge(WeightStatistics.of(torch.ones(2), 1.0))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_a_matrix_of_zeros_is_refused(rule: ScaleRule, power_of_two: bool) -> None:
    with pytest.raises(ValueError, match="a matrix of zeros has no scale"):
        choose_scale(
            WeightStatistics.of(torch.zeros(3, 4), STD),
            make_grid(4),
            rule,
            sigmas=3.0,
            power_of_two=power_of_two,
        )
