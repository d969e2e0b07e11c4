"""Philox4x32-10 against the published vectors, against Python integers, and as a source of uniform numbers."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from dqt_dist.lowbit.philox import philox4x32, to_unit_interval
from tests.lowbit.reference import Words, philox_4x32_10

ONES = 0xFFFFFFFF

# Random123, tests/kat_vectors, the lines "philox4x32 10".
VECTORS: list[tuple[Words, tuple[int, int], Words]] = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(counter: Words, key: tuple[int, int]) -> Words:
    a, b, c, d = philox4x32([torch.tensor(word) for word in counter], key)
    return int(a), int(b), int(c), int(d)


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter: Words, key: tuple[int, int], expected: Words) -> None:
    assert words(counter, key) == expected
    assert philox_4x32_10(counter, key) == expected  # the reference of this folder is held to them too


def test_equals_python_integers_on_random_counters() -> None:
    """Words with the top bit set make int64 products wrap; about 15 in 16 of these counters have one."""
    source = random.Random(0)
    counters = [tuple(source.getrandbits(32) for _ in range(4)) for _ in range(500)]
    key = (source.getrandbits(32), source.getrandbits(32))
    columns = [torch.tensor([counter[i] for counter in counters]) for i in range(4)]
    found = torch.stack(philox4x32(columns, key), dim=1)
    assert found.tolist() == [list(philox_4x32_10(counter, key)) for counter in counters]


def test_counter_words_broadcast() -> None:
    """A row of column groups against a column of matrix ids, as coordinates.py calls it."""
    group, matrix = torch.arange(5), torch.arange(3)[:, None] + 100
    lanes = philox4x32((group, torch.tensor(0), torch.tensor(7), matrix), (1, 2))
    assert lanes[2].shape == (3, 5)
    assert int(lanes[2][1, 4]) == philox_4x32_10((4, 0, 7, 101), (1, 2))[2]


def test_unit_interval_has_24_bits_and_never_reaches_1() -> None:
    """Control: all 32 bits times 2^-32 round to 1.0 in fp32, and u = 1 would never take the upper neighbour of t."""
    ends = torch.tensor([0, 255, 256, ONES - 255, ONES])
    assert to_unit_interval(ends).tolist() == [0.0, 0.0, 2.0**-24, 1 - 2.0**-24, 1 - 2.0**-24]
    assert float((ends.float() * 2.0**-32).max()) == 1.0
    u = to_unit_interval(stream(1 << 16))
    assert u.dtype == torch.float32 and bool(((u >= 0) & (u < 1)).all())
    scaled = u.double() * 2**24
    assert torch.equal(scaled, scaled.round())


def stream(count: int) -> Tensor:
    """Words of consecutive counters, lane by lane: fixed, so the statistics below cannot flake."""
    lanes = philox4x32((torch.arange(count // 4), *torch.zeros(3, 1, dtype=torch.int64)), (2024, 1))
    return torch.stack(lanes, dim=-1).flatten()


def test_words_are_uniform() -> None:
    """Chi-square over 256 bins of the top byte and of the byte to_unit_interval reads last; each bit is set half the
    time.

    A chi-square of 255 degrees of freedom has mean 255 and variance 510.
    """
    numbers = stream(1 << 18)
    for shift in (24, 8):
        observed = torch.bincount((numbers >> shift) & 255, minlength=256).double()
        expected = len(numbers) / 256
        chi_square = float(((observed - expected) ** 2 / expected).sum())
        assert abs(chi_square - 255) < 5 * math.sqrt(510)
    for bit in range(32):
        share = float(((numbers >> bit) & 1).double().mean())
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(len(numbers)), bit


def test_uniform_has_the_mean_and_variance_of_uniform_and_neighbours_do_not_correlate() -> None:
    """Five standard errors each. Lag 1 is the next lane, lag 4 the next counter."""
    u = to_unit_interval(stream(1 << 18)).double()
    count = len(u)
    assert abs(float(u.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / count)
    # The variance of (u - 1/2)^2 is 1/80 - 1/144.
    assert abs(float((u - 0.5).square().mean()) - 1 / 12) < 5 * math.sqrt((1 / 80 - 1 / 144) / count)
    for lag in (1, 2, 3, 4):
        correlation = float(((u[lag:] - 0.5) * (u[:-lag] - 0.5)).mean()) * 12
        assert abs(correlation) < 5 / math.sqrt(count), lag
