"""The second moment of a logical matrix as means of its rows and of its columns: V = r c^T / mean.

Source: Shazeer and Stern, arXiv 1804.04235, section 3. r, c and mean are moving averages of the means of g^2 over the
columns, over the rows and over the whole logical matrix, of which a rank holds a part:

    row_mean      fp32 [owned rows]          r
    column_mean   fp32 [matrices, columns]   c, the same on all ranks that own rows of the matrix
    matrix_mean   fp32 [matrices]            the mean of r, the same on all ranks

The sums are exact. With n the norm of all clipped gradients of the step, every g^2 is counted in units of

    unit = 2^(2 k), with n < 2^(k + 30)        so that (n / 2^k)^2 < 2^60: no sum of squares overflows

as an integer (`kernels/exact_square_sums.py`). Integer sums have the same bits in every order, so every ZeRO stage and
layout gives the same means from the same gradients. A unit is the square of 0.9e-9 to 1.9e-9 of n. What is below a unit
counts as 0.

The ranks' parts are added in two all-reduces per step for all matrices together: over the owners of rows, and over TP
where TP has split a row or a column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dqt_dist.kernels.exact_square_sums import exact_square_sums
from dqt_dist.optim.owned_rows import OwnedRows
from dqt_dist.parallel.groups import Group, Groups

MEANS = ("row_mean", "column_mean", "matrix_mean")
"""Names of the means in the state of owned rows."""

# The root of the largest sum of squares in units, 2^60, and one bit for the rounding of norm and gradients.
_NORM_BITS = 31
# Smallest exponent of a norm. Below it 2^-k would not be an fp32 number.
_EXPONENT_MIN = -90


def new_means(rows: OwnedRows) -> dict[str, Tensor]:
    """Zeros."""
    weight, device = rows.weight, rows.weight.codes.device
    num_matrices = len(weight.scale)
    return {
        "row_mean": torch.zeros(rows.stop - rows.start, device=device),
        "column_mean": torch.zeros(num_matrices, weight.columns, device=device),
        "matrix_mean": torch.zeros(num_matrices, device=device),
    }


def update_means(
    shards: list[OwnedRows],
    gradients: list[Tensor],
    norm: Tensor,
    clip: Tensor,
    new_share: float,
    square_epsilon: float,
    groups: Groups,
    rows_sharded: bool,
) -> None:
    """Moves the means of all shards towards those of this step's squares by `new_share`. A collective call.

    gradients: of the owned rows of each shard, before clipping. norm: of all gradients, before clipping. clip: their
    factor, 0 for a step whose gradients are not looked at. `square_epsilon` is added to every square.
    """
    scale, unit = units(norm, clip)
    sums = [_Sums.of(rows, gradient, scale) for rows, gradient in zip(shards, gradients, strict=True)]
    if rows_sharded:
        _all_reduce([part for each in sums for part in each.over_owners()], groups.data)
    for each in sums:
        each.sum_matrices()
    _all_reduce([part for each in sums for part in each.over_tensor_ranks()], groups.tensor)
    for rows, each in zip(shards, sums, strict=True):
        for name, (total, count) in each.means(rows).items():
            mean = (total.double() * unit / count + square_epsilon).float()
            # Not lerp_, whose vectorised form rounds in another way than its form for the last elements of a tensor.
            rows.state[name].mul_(1 - new_share).add_(mean * new_share)


def units(norm: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
    """The factor of a gradient whose square is then in units, fp32, and the unit, fp64; scalars on the device."""
    bound = torch.where(clip > 0, norm * clip, 0.0)
    exponent = torch.frexp(bound).exponent.clamp(min=_EXPONENT_MIN) + 1 - _NORM_BITS
    # Powers of two from their bits, because a device's power function need not be exact.
    factor = ((127 - exponent) << 23).to(torch.int32).view(torch.float32)
    unit = ((1023 + 2 * exponent.long()) << 52).view(torch.float64)
    return torch.where(clip > 0, clip * factor, 0.0), unit


def row_factors(rows: OwnedRows) -> Tensor:
    """r / mean of each owned row, fp32; V is its product with `column_mean`. 0 for a matrix without gradients yet."""
    mean = rows.state["matrix_mean"][rows.row_matrix]
    return torch.where(mean > 0, rows.state["row_mean"] / mean, 0.0)


@dataclass
class _Sums:
    """Sums of squares of one shard in units, int64: this rank's part, later complete."""

    rows: Tensor
    columns: Tensor
    matrices: Tensor
    columns_are_split: bool
    """Whether TP has split the columns of the shard; else it has split the rows."""

    @classmethod
    def of(cls, rows: OwnedRows, gradient: Tensor, scale: Tensor) -> _Sums:
        weight = rows.weight
        layout, num_matrices = weight.layout, len(weight.scale)
        assert layout is not None
        row_sums, column_sums = exact_square_sums(
            gradient, scale, weight.row_matrix[rows.start : rows.stop], num_matrices
        )
        return cls(row_sums, column_sums, column_sums[:, 0], layout.columns != layout.in_features)

    def over_owners(self) -> list[Tensor]:
        """What the owners of rows have parts of."""
        return [self.columns]

    def sum_matrices(self) -> None:
        """Sums over whole matrices, once the columns are complete over the owners."""
        self.matrices = self.columns.sum(dim=1)

    def over_tensor_ranks(self) -> list[Tensor]:
        """What TP ranks have parts of."""
        return [self.matrices, self.rows if self.columns_are_split else self.columns]

    def means(self, rows: OwnedRows) -> dict[str, tuple[Tensor, Tensor | int]]:
        """The complete sums by the names of their means, with the number of squares in each."""
        layout = rows.weight.layout
        assert layout is not None
        return {
            "row_mean": (self.rows, layout.in_features),
            "column_mean": (self.columns, rows.matrix_rows[:, None]),
            "matrix_mean": (self.matrices, rows.matrix_rows * layout.in_features),
        }


def _all_reduce(parts: list[Tensor], group: Group) -> None:
    """Sums tensors over `group` in one call, in place."""
    if group.size() == 1:
        return
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat, group=group)
    for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(total.view_as(part))
