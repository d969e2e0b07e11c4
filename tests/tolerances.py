"""Tolerances, each with its cause. Tests check for equality where they can, and use this file where results may differ.

u is the unit roundoff of a format: one rounding changes a value by at most u relative to the value. Take a sum of n
products in any order, with one rounding per product and one per addition. The sum is within n * u * sum |a_i b_i| of
the exact value (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Sums in two different orders are
within twice this bound of each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def product_bound(a: Tensor, b: Tensor) -> Tensor:
    """Bound of the difference of two fp32 evaluations of a [m, n] @ b [n, k]: about n u of the absolute product.

    The 4 added to n covers the roundings around the sum: one scale per side, applied before or after the sum.
    """
    magnitude = a.double().abs() @ b.double().abs()
    return 2 * (a.shape[-1] + 4) * UNIT_ROUNDOFF[torch.float32] * magnitude


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Asserts |actual - expected| <= bound for every element. The message names the worst element."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    excess = (actual.double() - expected.double()).abs() - bound
    assert excess.isfinite().all() and excess.max() <= 0, f"worst element is {excess.max():.3e} over its bound"


@dataclass(frozen=True)
class Tolerance:
    """Tolerance relative to the largest expected magnitude.

    In a network an element near zero carries the error of large elements.
    """

    relative: float
    reason: str

    def assert_close(self, actual: Tensor, expected: Tensor, what: str = "") -> None:
        assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
        error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error <= self.relative, f"{what}: {error:.3e} of the largest element, {self.relative:.0e} allowed"


ELEMENTWISE_FP32 = Tolerance(
    2.0**-20, "a dozen fp32 roundings of elementwise operations taken in another order, 2^-24 each"
)
NETWORK_FP32 = Tolerance(
    5e-5,
    "two layers of fp32 products of at most 64 terms, forward and backward, against float64: 7e-6 measured at worst",
)
