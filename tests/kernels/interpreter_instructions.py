"""dqt_dist/kernels/device/instructions.py for Triton's interpreter, which executes neither inline PTX nor libdevice.

Each function has the name and the meaning of the function that it replaces, and computes with NumPy. All are exact but
two: `square_root` and `reciprocal` round to nearest here and are approximate on a GPU. conftest.py puts this module in
the place of the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

# Smallest normal fp32 number: instructions with .ftz take what is smaller for zero.
SMALLEST_NORMAL = np.float32(2.0**-126)


def _array(x: Any) -> np.ndarray:
    return x.handle.data


def _tensor(array: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    shape = list(array.shape)
    return tl.tensor(TensorHandle(array, dtype), tl.block_type(dtype, shape) if shape else dtype)


def _rounded_up(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smallest fp32 that is not below a + b, for fp64 a and b, whose sum is split exactly (Knuth's TwoSum)."""
    total = a + b
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)
    nearest = total.astype(np.float32)
    too_low = (nearest < total) | ((nearest == total) & (error > 0))
    return np.where(too_low, np.nextafter(nearest, np.float32(np.inf)), nearest)


def clamp_to_span(x: tl.tensor, SPAN: Any) -> tl.tensor:
    """min.s32 and max.s32 on the bits, literally."""
    largest = np.float32(getattr(SPAN, "value", SPAN)).view(np.int32)
    bits = np.ascontiguousarray(_array(x)).view(np.int32)
    return _tensor(np.maximum(np.minimum(bits, largest), 0).view(np.float32), tl.float32)


def uint32_to_float_down(words: tl.tensor) -> tl.tensor:
    """cvt.rz.f32.u32: fp64 holds a word exactly; an fp32 above it is taken one down."""
    exact = _array(words).astype(np.float64)
    nearest = exact.astype(np.float32)
    return _tensor(np.where(nearest > exact, np.nextafter(nearest, np.float32(0)), nearest), tl.float32)


def fma_up(a: tl.tensor, b: Any, c: tl.tensor) -> tl.tensor:
    """fma.rp.f32: fp64 holds the product of two fp32 exactly."""
    factor = np.float64(_array(b)) if isinstance(b, tl.tensor) else np.float64(getattr(b, "value", b))
    return _tensor(_rounded_up(_array(a).astype(np.float64) * factor, _array(c).astype(np.float64)), tl.float32)


def add_up(a: tl.tensor, b: Any) -> tl.tensor:
    """add.rp.f32."""
    return fma_up(a, 1.0, _tensor(np.full_like(_array(a), getattr(b, "value", b)), tl.float32))


def multiply_to_nearest(a: tl.tensor, b: Any) -> tl.tensor:
    """mul.rn.f32: NumPy contracts nothing."""
    factor = _array(b) if isinstance(b, tl.tensor) else np.float32(getattr(b, "value", b))
    return _tensor((_array(a) * factor).astype(np.float32), tl.float32)


def population_count(x: tl.tensor) -> tl.tensor:
    """popc.b32."""
    return _tensor(np.bitwise_count(np.ascontiguousarray(_array(x)).view(np.uint32)).astype(np.int32), tl.int32)


def saturated_high_bits(x: tl.tensor) -> tl.tensor:
    """mul.hi.s32 with 4096, which is >> 20, and cvt.pack.sat.u8.s32."""
    return _tensor(np.clip(_array(x) >> 20, 0, 255).astype(np.uint8), tl.uint8)


def square_root(x: tl.tensor) -> tl.tensor:
    """sqrt.approx.ftz.f32, but rounded to nearest."""
    array = _array(x)
    return _tensor(np.sqrt(np.where(array < SMALLEST_NORMAL, np.float32(0), array)), tl.float32)


def reciprocal(x: tl.tensor) -> tl.tensor:
    """rcp.approx.ftz.f32 of a number that is not negative, but rounded to nearest."""
    array = _array(x)
    with np.errstate(divide="ignore"):
        quotient = np.float32(1) / np.where(array < SMALLEST_NORMAL, np.float32(0), array)
    return _tensor(np.where(quotient < SMALLEST_NORMAL, np.float32(0), quotient), tl.float32)


def store_low_bytes(pointers: tl.tensor, values: tl.tensor) -> None:
    """st.global.u8."""
    tl.store(pointers, values.to(tl.uint8))


TORCH_DTYPES = {tl.float32: torch.float32, tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}
E4M3_MAX = 448.0


def convert_float(array: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
    """Conversions between fp32, bf16 and e4m3, as GPUs do them: to nearest, half to even, saturating to e4m3.

    The interpreter's own (Triton 3.6.0) cuts bf16 off, and loses the carry of a mantissa that is rounded up in e4m3.
    """
    integer = {1: np.uint8, 2: np.uint16, 4: np.float32}
    wide = torch.from_numpy(np.array(array, order="C"))
    if source != tl.float32:
        wide = wide.view(TORCH_DTYPES[source])
    wide = wide.float()
    if target == tl.float8e4nv:
        wide = wide.clamp(-E4M3_MAX, E4M3_MAX)
    narrow = wide.to(TORCH_DTYPES[target])
    bits = narrow if target == tl.float32 else narrow.view({1: torch.uint8, 2: torch.int16}[narrow.itemsize])
    return bits.numpy().view(integer[narrow.itemsize])


def create_splat(_: Any, result_type: tl.block_type, scalar: TensorHandle) -> TensorHandle:
    """A block of one scalar.

    The interpreter's own (Triton 3.6.0) makes floats of a truth value that came from comparing floats.
    """
    return TensorHandle(np.full(result_type.shape, scalar.data.item(), dtype=scalar.data.dtype), result_type.scalar)
