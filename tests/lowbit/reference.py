"""Philox4x32-10 in Python integers, from the paper (Salmon et al., SC 2011), and the words of logical coordinates.

This file has no code in common with dqt_dist/lowbit/philox.py. Products of Python integers do not wrap, so they cannot
wrap wrongly.
"""

from __future__ import annotations

Words = tuple[int, int, int, int]


def philox_4x32_10(counter: Words, key: tuple[int, int]) -> Words:
    a, b, c, d = counter
    x, y = key
    for _ in range(10):
        high_a, low_a = divmod(0xD2511F53 * a, 2**32)
        high_c, low_c = divmod(0xCD9E8D57 * c, 2**32)
        a, b, c, d = high_c ^ b ^ x, low_c, high_a ^ d ^ y, low_a
        x, y = (x + 0x9E3779B9) % 2**32, (y + 0xBB67AE85) % 2**32
    return a, b, c, d


def word_at(purpose: int, seed: int, step: int, matrix_id: int, in_features: int, row: int, column: int) -> int:
    """The word of one weight, as dqt_dist/lowbit/coordinates.py defines it, one element at a time."""
    high, low = divmod((row * in_features + column) // 4, 2**32)
    return philox_4x32_10((low, high, step, matrix_id), (seed, purpose))[(row * in_features + column) % 4]
