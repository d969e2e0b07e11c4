"""Latents: stored integers that are finer than the codes that products see.

With codes alone, what does not suffice for a flip is forgotten. A latent remembers it. The latent L of a weight is an
integer on a grid of 3 to 8 bits. AdamW and stochastic rounding update L as they update codes without latents
(`update.py`). The code C, which is all that products see, is a function of L:

    C = clamp(sign(L) floor(|L| r + 1/2), qmin, qmax)      r codes per latent: d / s, rounded up to 8 significant bits

    d   latent scale, the weight of L = 1: fixed after initialisation
    s   scale, the weight of C = 1: fixed after initialisation, or refitted (below)

A ternary code is 0 where |L| < T and the sign of L elsewhere, with T = ceil(1 / (2 r)), about s / (2 d). |L| too has at
most 8 significant bits, so |L| r is exact in fp32: equal latents and scales give equal codes on every device.

BitNet b1.58 makes its scale anew from the master weights in every forward (arXiv 2402.17764, eq. 1 to 3). `refit_scale`
is the same rule for latents:

    s = multiple * d * mean |L| over the logical matrix, as a bf16 number

    multiple   1 for ternary codes; scale_sigmas * sqrt(pi / 2) / qmax for n bits, the sigma rule for a normal
               distribution, whose standard deviation is sqrt(pi / 2) times the mean magnitude

The sum of |L| is an integer, so it has the same bits in every layout. s is a bf16 number, so s * C is exact in bf16 for
ternary codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dqt_dist.lowbit.grid import Grid

# fp32 bits beyond the 8 significant ones of a bf16.
_DROPPED = 16


def codes_per_latent(scale: Tensor, latent_scale: Tensor, threshold: int | None) -> Tensor:
    """r of each matrix, fp32. `threshold` is the smallest |L| of a code that is not 0; None: the nearest code."""
    ratio = latent_scale / scale if threshold is None else torch.full_like(scale, 0.5 / threshold)
    return _round_up(ratio)


def codes_of_latents(latents: Tensor, ratio: Tensor, grid: Grid) -> Tensor:
    """int8 codes on `grid` of integer latents [rows, columns], with r [rows] as `ratio`."""
    magnitude = (latents.float().abs() * ratio[:, None] + 0.5).floor()
    return (magnitude * latents.sign()).clamp_(grid.qmin, grid.qmax).to(torch.int8)


def latents_of_codes(codes: Tensor, ratio: Tensor, grid: Grid) -> Tensor:
    """int8 latents on the latent grid `grid` whose weights are nearest to those of `codes` [rows, columns]."""
    return (codes.float() / ratio[:, None]).round().clamp_(grid.qmin, grid.qmax).to(torch.int8)


def scale_multiple(grid: Grid, sigmas: float) -> float:
    """Scale of the codes divided by the mean magnitude of the weights. `sigmas` is k of the sigma rule."""
    return 1.0 if grid.bits == "ternary" else sigmas * math.sqrt(math.pi / 2) / grid.qmax


def refit_scale(abs_sum: Tensor, count: Tensor, latent_scale: Tensor, scale: Tensor, multiple: float) -> Tensor:
    """s of each matrix, fp32, from the sum of |L| and the number of weights of the whole matrix, both int64.

    A matrix whose latents are all zero keeps its `scale`.
    """
    mean = abs_sum.double() / count
    fitted = (multiple * latent_scale.double() * mean).bfloat16().float()
    return torch.where(abs_sum > 0, fitted, scale)


def _round_up(x: Tensor) -> Tensor:
    """fp32 x > 0 rounded up to 8 significant bits."""
    mask = (1 << _DROPPED) - 1
    return ((x.float().view(torch.int32) + mask) & ~mask).view(torch.float32)
