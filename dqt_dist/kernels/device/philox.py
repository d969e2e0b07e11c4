# Triton may be absent. Its types know no index into a jit function, and no result of one.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportGeneralTypeIssues=false
"""Philox4x32-10 as device functions: the random words of lowbit/philox.py, bit for bit.

key       64-bit, purpose << 32 | seed
counter   four 32-bit words: (element >> 2, 0, step, matrix id)      lowbit/coordinates.py says what an element is
words     four 32-bit words of one call belong to four neighbouring columns
"""

from __future__ import annotations

import triton
import triton.language as tl

from dqt_dist.kernels.device.packing import interleave4


@triton.jit
def philox(key, counter, step, matrix_id):
    """The four words of `counter` uint32 [n], each uint32 [n]; key int64, step int, matrix_id uint32.

    Salmon et al., SC 2011. Constants as in lowbit/philox.py. tl.philox computes the two halves of each product by two
    instructions; here one 64-bit product gives both. The upper words of the counter are the same for all n, so two of
    the twenty products are scalars.
    """
    c0, c1, c2, c3 = counter, tl.zeros_like(counter), step.to(tl.uint32), matrix_id
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product_0 = c0.to(tl.uint64) * 0xD2511F53
        product_1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_1 >> 32).to(tl.uint32) ^ (c1 ^ k0)
        c2 = (product_0 >> 32).to(tl.uint32) ^ (c3 ^ k1)
        c1 = product_1.to(tl.uint32)
        c3 = product_0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def random_words(counter, matrix_id, key, step, BLOCK: tl.constexpr):
    """The words of BLOCK neighbouring columns, uint32 [BLOCK]; `counter` is the scalar that gives the first four."""
    # Each thread has 8 columns, so two counters: every thread makes the words that it uses.
    pair = counter.to(tl.uint32) + 2 * tl.arange(0, BLOCK // 8).to(tl.uint32)
    a0, a1, a2, a3 = philox(key, pair, step, matrix_id)
    b0, b1, b2, b3 = philox(key, pair + 1, step, matrix_id)
    return interleave4(tl.interleave(a0, b0), tl.interleave(a1, b1), tl.interleave(a2, b2), tl.interleave(a3, b3))
