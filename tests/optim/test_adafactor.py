"""Adafactor on one rank, against torch.optim.Adafactor and against the formulas of the paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dqt_dist.kernels.exact_square_sums import exact_square_sums
from dqt_dist.optim.adafactor import SQUARE_EPSILON, clip_by_rms, decay_at, factored_direction
from dqt_dist.optim.factored import units
from tests.tolerances import ELEMENTWISE_FP32

ROWS, COLUMNS = 9, 14


class OneRank:
    """Means and directions without sums over ranks, because this rank holds all rows of the matrices."""

    def __init__(self, row_matrix: Tensor) -> None:
        self.row_matrix = row_matrix
        self.rows_of = torch.bincount(row_matrix).float()
        self.row, self.column = torch.zeros(len(row_matrix)), torch.zeros(len(self.rows_of), COLUMNS)
        self.matrix = torch.zeros(len(self.rows_of))

    def direction(self, gradient: Tensor, step: int, decay_rate: float, clip_threshold: float) -> Tensor:
        num_matrices, row_matrix = len(self.rows_of), self.row_matrix
        scale, unit = units(gradient.norm(), torch.ones(()))
        row_sums, column_sums = exact_square_sums(gradient, scale, row_matrix, num_matrices)
        for mean, total, count in (
            (self.row, row_sums, COLUMNS),
            (self.column, column_sums, self.rows_of[:, None]),
            (self.matrix, column_sums.sum(1), self.rows_of * COLUMNS),
        ):
            mean.lerp_((total * unit / count + SQUARE_EPSILON).float(), 1 - decay_at(step, decay_rate))
        unclipped = factored_direction(gradient, self.row / self.matrix[row_matrix], self.column, row_matrix)
        squares = torch.zeros(num_matrices).index_add_(0, row_matrix, unclipped.square().sum(1))
        return clip_by_rms(unclipped, (squares / (self.rows_of * COLUMNS)).sqrt(), row_matrix, clip_threshold)


def gradients(steps: int) -> list[Tensor]:
    """Rows and columns have different magnitudes. The fourth step is large, so that clipping acts."""
    scales = torch.logspace(-2, 1, ROWS)[:, None] * torch.logspace(0, 1, COLUMNS)
    return [torch.randn(ROWS, COLUMNS) * scales * (20.0 if step == 3 else 1.0) for step in range(steps)]


@pytest.mark.parametrize("decay_rate", [0.8, 0.5])
def test_equals_torch_adafactor_over_several_steps(decay_rate: float) -> None:
    """torch's rate is min(lr, 1/sqrt(step)) * max(eps2, RMS(weight)). With eps2 = 1 and small weights it is lr."""
    weight = torch.nn.Parameter(torch.zeros(ROWS, COLUMNS))
    learning_rate = 0.01
    optimizer = torch.optim.Adafactor(
        [weight], lr=learning_rate, beta2_decay=-decay_rate, eps=(1e-15, 1.0), d=1.0, weight_decay=0.0, foreach=False
    )
    rank = OneRank(torch.zeros(ROWS, dtype=torch.int64))
    total, clipped = torch.zeros(ROWS, COLUMNS), []
    for step, gradient in enumerate(gradients(6), start=1):
        weight.grad = gradient.clone()
        optimizer.step()
        direction = rank.direction(gradient, step, decay_rate, 1.0)
        total += direction
        clipped.append(abs(float(direction.square().mean().sqrt()) - 1) < 1e-5)
        assert float(weight.detach().square().mean()) < 1
        ELEMENTWISE_FP32.assert_close(-learning_rate * total, weight.detach(), f"step {step}")
    assert clipped[3] and not all(clipped), "both branches of the clip must have been taken"


def test_matrices_fused_in_one_shard_do_not_mix() -> None:
    """Rows of two matrices, interleaved, against each matrix alone. Control: as one matrix the directions differ."""
    row_matrix = torch.tensor([0, 0, 1, 1, 0, 0, 1, 0, 0])
    fused, alone = OneRank(row_matrix), [OneRank(torch.zeros(n, dtype=torch.int64)) for n in (6, 3)]
    mixed = OneRank(torch.zeros(ROWS, dtype=torch.int64))
    for step, gradient in enumerate(gradients(5), start=1):
        direction = fused.direction(gradient, step, 0.8, 1.0)
        for index, rank in enumerate(alone):
            rows = row_matrix == index
            ELEMENTWISE_FP32.assert_close(direction[rows], rank.direction(gradient[rows], step, 0.8, 1.0))
        assert float((direction - mixed.direction(gradient, step, 0.8, 1.0)).abs().max()) > 0.1


def test_a_rank_one_gradient_becomes_its_signs() -> None:
    """V = r c^T / mean(r) is exact when g^2 has rank one, so U = sign(g)."""
    outer = torch.logspace(-3, 2, ROWS)[:, None] * torch.logspace(-2, 3, COLUMNS)
    gradient = outer * torch.randn(ROWS, COLUMNS).sign()
    direction = OneRank(torch.zeros(ROWS, dtype=torch.int64)).direction(gradient, 1, 0.8, 1e9)
    ELEMENTWISE_FP32.assert_close(direction, gradient.sign())


def test_zero_gradients_give_a_finite_direction() -> None:
    """Control: without epsilon r and c are 0 and 0 / 0 is nan."""
    gradient = torch.zeros(ROWS, COLUMNS)
    direction = OneRank(torch.zeros(ROWS, dtype=torch.int64)).direction(gradient, 1, 0.8, 1.0)
    assert SQUARE_EPSILON > 0 and torch.equal(direction, gradient)


def test_decay_starts_at_zero_and_rises() -> None:
    assert decay_at(1, 0.8) == 0.0
    assert decay_at(10, 0.8) == pytest.approx(1 - 10**-0.8, rel=1e-12)
    assert decay_at(1000, 0.8) > decay_at(10, 0.8)
