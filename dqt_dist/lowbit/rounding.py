"""Rounding a wanted weight onto the grid.

The wanted weight t is in units of one code. Stochastic rounding takes the neighbour above with a probability equal to
the fraction. The mean is then exact, E[C'] = t. Small updates are not lost: a small share of the weights takes them.

    C' = clamp(floor(t) + [u < t - floor(t)], qmin, qmax)

The form floor(t + u) is wrong in floating point: 127 + 0.99999999 is 128 in fp32, so an exact code could change. Here
an exact code has t - floor(t) = 0, so a zero update never flips the code. The difference t - floor(t) is exact
(Sterbenz), except for t in (-1/2, 0). There it is rounded by at most 2^-25, which is less than 2^-24, the step of u.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqt_dist.lowbit.grid import Grid


def round_stochastic(wanted: Tensor, uniform: Tensor, grid: Grid) -> Tensor:
    """Rounds `wanted` (fp32, in codes) with `uniform` in [0, 1), same shape; returns int8 codes on the grid.

    Direct Quantized Training, arXiv 2412.04787, equation for SR.
    """
    below = wanted.floor()
    return (below + (uniform < wanted - below)).clamp_(grid.qmin, grid.qmax).to(torch.int8)


def round_nearest(wanted: Tensor, grid: Grid) -> Tensor:
    """Rounds half to even and clamps. Returns int8 codes.

    Used at initialisation, and as the control that does not train.
    """
    return wanted.round().clamp_(grid.qmin, grid.qmax).to(torch.int8)
