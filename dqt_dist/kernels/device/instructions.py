# pyright: reportMissingImports=false, reportIndexIssue=false
"""Device functions for GPU instructions that Triton's language lacks: inline PTX, and libdevice.

No other module of the kernels contains PTX or libdevice. Triton's interpreter executes neither, so the tests replace
this whole module by arithmetic on NumPy arrays: tests/kernels/interpreter_instructions.py has the same functions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def clamp_to_span(x, SPAN: tl.constexpr):
    """fp32 x between 0 and SPAN, by integer comparisons: numbers that are not negative have the order of their bits.

    ptxas turns min and max into one instruction on sm_90 and later. PTX has that instruction as min.relu, but ptxas
    refuses min.relu for sm_80.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .b32 a; min.s32 a, $1, $2; max.s32 $0, a, 0; }", "=r,r,r", [x, tl.full(x.shape, SPAN, tl.float32)],
        dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def uint32_to_float_down(words):
    """uint32 to fp32, rounded towards zero: the first 24 binary digits, counted from the highest that is set."""
    return tl.inline_asm_elementwise("cvt.rz.f32.u32 $0, $1;", "=f,r", [words], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def fma_up(a, b, c):
    """a * b + c in fp32, rounded once, towards +infinity."""
    return libdevice.fma_ru(a, b, c)


@triton.jit
def add_up(a, b):
    """a + b in fp32, rounded towards +infinity."""
    return libdevice.add_ru(a, b)


@triton.jit
def multiply_to_nearest(a, b):
    """a * b in fp32, rounded to nearest; the compiler does not contract the product with a sum that follows."""
    return libdevice.mul_rn(a, b)


@triton.jit
def population_count(x):
    """Number of bits of an int32 that are set."""
    return libdevice.popc(x)


@triton.jit
def saturated_high_bits(x):
    """int32 >> 20 to uint8; negative numbers to 0, numbers above 255 to 255.

    A shift as the high half of a product runs beside the other shifts of the AdamW kernel.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        mul.hi.s32 a, $1, 4096; mul.hi.s32 b, $2, 4096; mul.hi.s32 c, $3, 4096; mul.hi.s32 d, $4, 4096;
        cvt.pack.sat.u8.s32.b32 c, d, c, 0; cvt.pack.sat.u8.s32.b32 $0, b, a, c;
        }""",
        "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def square_root(x):
    """fp32 root to 2^-22 of itself; a denormal x counts as zero."""
    return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """1 / x in fp32 to an ulp: one instruction where a division takes six."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def store_low_bytes(pointers, values):
    """Stores the lowest byte of int32 values at uint8 pointers.

    tl.store would first move these few values between threads.
    """
    tl.inline_asm_elementwise(
        "st.global.u8 [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [pointers, values],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
