"""The factored second moment: units of squares, and AdamW with it against its formulas.

That all layouts and stages give the same bits is tested in test_low_bit_optimizer.py and tests/parallel/test_zero.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from dqt_dist.kernels.exact_square_sums import exact_square_sums
from dqt_dist.kernels.low_bit_update import AdamW
from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.update import RoundingKey
from dqt_dist.optim.adamw import adamw_update_rows, new_moments
from dqt_dist.optim.factored import units


@pytest.mark.parametrize("norm", [2.0**-120, 1e-8, 1.0, 3.0, 2.0**62])
@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_a_unit_is_a_power_of_two_and_no_sum_overflows(norm: float, clip: float) -> None:
    scale, unit = units(torch.tensor(norm), torch.tensor(clip))
    factor = float(scale) / float(torch.tensor(clip))
    assert math.frexp(factor)[0] == 0.5 and float(unit) == pytest.approx(factor**-2, rel=1e-15)
    # One element with the whole norm: its square is counted, below 2^60 and at most 2^-24 too small.
    total = int(exact_square_sums(torch.tensor([[norm]]), scale, torch.zeros(1, dtype=torch.int64), 1)[0])
    assert total <= 2**60
    if norm > 2.0**-90:
        assert total > 2**56
        assert total * float(unit) == pytest.approx((norm * clip) ** 2, rel=1e-6)


def test_a_step_that_is_not_taken_counts_nothing() -> None:
    for norm in (float("nan"), float("inf"), 1.0):
        scale, unit = units(torch.tensor(norm), torch.zeros(()))
        assert float(scale) == 0 and math.isfinite(unit)


def test_sums_have_fp32_accuracy_over_a_billion_weights() -> None:
    """An element of the average size among 2^30 keeps 2^-23 of its square, one of a thousandth still 2^-9."""
    average = 2.0**-15
    gradient = torch.tensor([[average, average / 1000]])
    scale, unit = units(torch.ones(()), torch.ones(()))
    columns = exact_square_sums(gradient, scale, torch.zeros(1, dtype=torch.int64), 1)[1][0] * unit
    assert float(columns[0]) == pytest.approx(average**2, rel=2.0**-23)
    assert float(columns[1]) == pytest.approx((average / 1000) ** 2, rel=2.0**-9)


@pytest.mark.parametrize("state_bits", [32, 8])
def test_a_rank_one_gradient_moves_as_with_a_full_second_moment(state_bits: int) -> None:
    """g^2 of rank one is r c^T / mean exactly, so both kinds give the same codes, but for rounding."""
    rows, columns = 8, 64
    gradient = (
        torch.outer(torch.logspace(-2, 1, rows), torch.logspace(-1, 1, columns)) * torch.randn(rows, columns).sign()
    )
    squares, share = gradient.square(), 1 - 0.95
    weights = [LowBitMatrix(rows, columns, make_grid(8)) for _ in range(2)]
    for weight in weights:
        weight.assign(ShardLayout((LogicalMatrix("m", rows, columns),), (RowBlock(0, 0, rows),), columns))
        weight.set_codes(torch.zeros(rows, columns, dtype=torch.int8))
    full, first = new_moments(rows, columns, state_bits), new_moments(rows, columns, state_bits, second=False)
    assert set(full) - set(first) == {name for name in full if "sq" in name}
    factors = {"row_factor": squares.mean(1) / squares.mean(), "column_mean": share * squares.mean(0)[None]}
    adamw, key, clip = AdamW(0.9, 0.95, 1e-8, 0.0), RoundingKey(1, 1, "nearest"), torch.ones(())
    adamw_update_rows(weights[0], gradient, full, 0, clip, 20.0, adamw, key)
    adamw_update_rows(weights[1], gradient, first | factors, 0, clip, 20.0, adamw, key)
    codes = [weight.unpack().int() for weight in weights]
    assert int((codes[0] - codes[1]).abs().max()) <= 1 and codes[0].unique().tolist() == [-20, 20]
    assert torch.equal(full["exp_avg"], first["exp_avg"])
