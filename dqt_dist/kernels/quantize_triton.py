# Triton may be absent. Its types know no index into a jit function, and no result of one.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportGeneralTypeIssues=false
"""Triton forms of `quantize.py`: one program per token. Only the norm's backward has several tokens per program.

A row of up to ONE_BLOCK features stays in registers between the read and the write. A wider row is read in blocks, once
for each statistic and once for the codes. With a norm these are three reads: sum of squares, maximum, codes. All reads
but the first hit the caches.

Bytes that must move per token of H features (bf16 in, 8-bit codes out), the floor of each kernel:

    quantize, rms_norm_quantize   3 H          swiglu_quantize   5 H (4 for gate|up, 1 for codes)
    rms_norm_backward             6 H          swiglu_backward   9 H with e4m3 gradients, 11 H with bf16 ones
    scaled                        4 H
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqt_dist.kernels.device.instructions import multiply_to_nearest
from dqt_dist.kernels.device.rounding import round_to_integer
from dqt_dist.kernels.launch import launch
from dqt_dist.lowbit.activation import ABSMAX_FLOOR, CODE_MAX, GRADIENT_ABSMAX_FLOOR

# Widest row that a program keeps in registers, and the block of wider rows; 32 features per thread.
ONE_BLOCK, BLOCK = 8192, 2048
FEATURES_PER_WARP = 1024
# SwiGLU's backward has three values per feature, too many registers for whole rows.
BACKWARD_BLOCK, BACKWARD_WARPS = 2048, 8
# Programs of the norm's backward on each multiprocessor; each adds up the weight's gradient over its tokens.
NORM_PROGRAMS = 4

IDENTITY, NORM, SWIGLU = (tl.constexpr(i) for i in range(3))


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)). 1/y is the square of 1/sqrt(y): two instructions where a division takes eight."""
    root = tl.rsqrt(1.0 + tl.exp(-x))
    return root * root


@triton.jit
def _load_h(
    x_row, weight, feature_scale, inverse_rms, offsets, features, PROLOGUE: tl.constexpr, FEATURE_SCALE: tl.constexpr
):
    """fp32 h at `offsets` of a row; zeros past the end."""
    inside = offsets < features
    x = tl.load(x_row + offsets, mask=inside, other=0.0).to(tl.float32)
    if PROLOGUE == NORM:
        x = x * inverse_rms * tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    if PROLOGUE == SWIGLU:
        up = tl.load(x_row + features + offsets, mask=inside, other=0.0).to(tl.float32)
        x = x * _sigmoid(x) * up
    if FEATURE_SCALE:
        x = x * tl.load(feature_scale + offsets, mask=inside, other=0.0)
    return x


@triton.jit
def _to_code(h, inverse_scale, INTEGER: tl.constexpr):
    """h / scale in fp32. For int8 the result is a whole number; for e4m3 the cast that follows rounds and saturates.

    The row's maximum times the reciprocal may be an ulp above the largest code, but never half a code.
    """
    # The definition rounds the product before `round_to_integer` adds to it, so the two must not be contracted.
    h = multiply_to_nearest(h, inverse_scale)
    if INTEGER:
        h = round_to_integer(h)
    return h


@triton.jit
def _quantize_kernel(
    x,
    weight,
    feature_scale,
    codes,
    scale,
    inverse_rms,
    features,
    x_stride,
    eps,
    floor,
    PROLOGUE: tl.constexpr,
    FEATURE_SCALE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    SCALE_KNOWN: tl.constexpr,
    WRITE_CODES: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    INTEGER: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Operand h of a product from one row of x, and its quantisation; program i has token i.

        IDENTITY   h = x                                  h = x * feature_scale where x is a gradient
        NORM       h = x * r * weight                     r = 1 / sqrt(mean(x^2) + eps)
        SWIGLU     h = gate * sigmoid(gate) * up          x is gate | up

    Steps. With ONE_BLOCK the row is read once and stays in registers. Else each step reads the row, in blocks of BLOCK:

        1. NORM only: r from the sum of squares; store r
        2. h in fp32
        3. unit = max(|h|, floor) / LARGEST_CODE, the maximum over the row; store unit. With SCALE_KNOWN: read unit
        4. code = h * (1 / unit), rounded half to even for int8 and by the cast for e4m3; store code
        5. without QUANTIZE, steps 3 and 4 are left out, and h is stored in x's type

    argument        shape                dtype             meaning
    x               [tokens, width]      bf16 or fp32      input; width is features, with SWIGLU twice that
    weight          [features]           bf16 or fp32      of the norm; None without NORM
    feature_scale   [features]           fp32              weight units per code of each feature, or None
    codes           [tokens, features]   int8, e4m3, x's   codes, or h without QUANTIZE; written with WRITE_CODES
    scale           [tokens, 1]          fp32              unit, h per code; read with SCALE_KNOWN, else written
    inverse_rms     [tokens, 1]          fp32              r, written; None without NORM
    features        scalar               int32             width of h
    x_stride        scalar               int32             elements from one row of x to the next
    eps             scalar               fp32              of the norm, in units of x^2
    floor           scalar               fp32              the least that a row's maximum counts as, in units of h
    PROLOGUE        constexpr            int               IDENTITY, NORM or SWIGLU
    FEATURE_SCALE   constexpr            bool              `feature_scale` is given
    QUANTIZE        constexpr            bool              h is stored as codes
    SCALE_KNOWN     constexpr            bool              `scale` is given
    WRITE_CODES     constexpr            bool              False where only `scale` is wanted
    LARGEST_CODE    constexpr            float             127 for int8, 448 for e4m3
    INTEGER         constexpr            bool              codes are int8
    ONE_BLOCK       constexpr            bool              a row fits in BLOCK
    BLOCK           constexpr            int               features handled at once, a power of two
    """
    token = tl.program_id(0).to(tl.int64)
    x_row = x + token * x_stride
    block = tl.arange(0, BLOCK)
    codes_row = codes + token * features
    h = tl.zeros((BLOCK,), tl.float32)
    r = 1.0
    if PROLOGUE == NORM:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, features, BLOCK):
            offsets = start + block
            h = tl.load(x_row + offsets, mask=offsets < features, other=0.0).to(tl.float32)
            squares += h * h
        r = 1.0 / tl.sqrt_rn(tl.sum(squares) / features + eps)
        tl.store(inverse_rms + token, r)
        if ONE_BLOCK:
            h = h * r * tl.load(weight + block, mask=block < features, other=0.0).to(tl.float32)
    elif ONE_BLOCK:
        h = _load_h(x_row, weight, feature_scale, r, block, features, PROLOGUE, FEATURE_SCALE)
    inverse_scale = 1.0
    if QUANTIZE:
        if SCALE_KNOWN:
            unit = tl.load(scale + token)
        else:
            largest = tl.abs(h)
            if not ONE_BLOCK:
                largest = tl.zeros((BLOCK,), tl.float32)
                for start in range(0, features, BLOCK):
                    wide = _load_h(x_row, weight, feature_scale, r, start + block, features, PROLOGUE, FEATURE_SCALE)
                    largest = tl.maximum(largest, tl.abs(wide))
            unit = tl.div_rn(tl.maximum(tl.max(largest), floor), LARGEST_CODE)
            tl.store(scale + token, unit)
        inverse_scale = tl.div_rn(1.0, unit)
    if WRITE_CODES:
        for start in range(0, features, BLOCK):
            offsets = start + block
            if not ONE_BLOCK:
                h = _load_h(x_row, weight, feature_scale, r, offsets, features, PROLOGUE, FEATURE_SCALE)
            if QUANTIZE:
                h = _to_code(h, inverse_scale, INTEGER)
            tl.store(codes_row + offsets, h.to(codes.dtype.element_ty), mask=offsets < features)


@triton.jit
def _swiglu_gradient(gate_row, dh_row, gate_scale, up_scale, offsets, features):
    """fp32 h, and dgate and dup times their scales, at `offsets`."""
    inside = offsets < features
    gate = tl.load(gate_row + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_row + features + offsets, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_row + offsets, mask=inside, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    return silu * up, dh * up * (sigmoid + silu * (1.0 - sigmoid)) * gate_scale, dh * silu * up_scale


@triton.jit
def _swiglu_backward_kernel(
    dh,
    gate_up,
    gradient_scale,
    h_scale,
    h_codes,
    gradient,
    gradient_unit,
    features,
    floor,
    QUANTIZE_H: tl.constexpr,
    QUANTIZE_GRADIENT: tl.constexpr,
    H_INTEGER: tl.constexpr,
    GRADIENT_MAX: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of gate | up, and the operand h anew; program i has token i.

    With sigma = sigmoid(gate) and silu = gate * sigma:

        h = silu * up          dgate = dh * up * (sigma + silu * (1 - sigma))          dup = dh * silu

    Steps. With ONE_BLOCK the row is read once and stays in registers. Else steps 1, 4 and 5 read the row in blocks:

        1. h, dgate * gradient_scale and dup * gradient_scale in fp32; without QUANTIZE_GRADIENT the factor is 1
        2. QUANTIZE_GRADIENT: unit = max(|dgate|, |dup|, floor) / GRADIENT_MAX, the maximum over the row; store unit
        3. QUANTIZE_H: read h_scale, which the forward has computed
        4. store h * (1 / h_scale) as the forward's code, or h itself
        5. store dgate | dup times 1 / unit as e4m3, or as they are

    argument            shape                    dtype            meaning
    dh                  [tokens, features]       bf16 or fp32     gradient of h
    gate_up             [tokens, 2 * features]   bf16 or fp32     gate | up, what the forward read
    gradient_scale      [2 * features]           fp32             weight units per code: one value for all of gate, one
                                                                  for all of up; None without QUANTIZE_GRADIENT
    h_scale             [tokens, 1]              fp32             h per code; None without QUANTIZE_H
    h_codes             [tokens, features]       int8, e4m3 or    codes of h, or h; written
                                                 gate_up's
    gradient            [tokens, 2 * features]   e4m3 or          dgate | dup, as codes or in gate_up's type; written
                                                 gate_up's
    gradient_unit       [tokens, 1]              fp32             unit, scaled gradient per code; written,
                                                                  None without QUANTIZE_GRADIENT
    features            scalar                   int32            width of h
    floor               scalar                   fp32             the least that a row's maximum counts as
    QUANTIZE_H          constexpr                bool             h is stored as codes
    QUANTIZE_GRADIENT   constexpr                bool             the gradient is stored as e4m3
    H_INTEGER           constexpr                bool             codes of h are int8
    GRADIENT_MAX        constexpr                float            448, the largest e4m3
    ONE_BLOCK           constexpr                bool             a row fits in BLOCK
    BLOCK               constexpr                int              features handled at once, a power of two
    """
    token = tl.program_id(0).to(tl.int64)
    gate_row = gate_up + token * 2 * features
    dh_row = dh + token * features
    block = tl.arange(0, BLOCK)
    gate_scale = 1.0
    up_scale = 1.0
    if QUANTIZE_GRADIENT:
        gate_scale = tl.load(gradient_scale)
        up_scale = tl.load(gradient_scale + features)
    h, d_gate, d_up = _swiglu_gradient(gate_row, dh_row, gate_scale, up_scale, block, features)
    inverse_unit = 1.0
    if QUANTIZE_GRADIENT:
        largest = tl.maximum(tl.abs(d_gate), tl.abs(d_up))
        for start in range(BLOCK, features, BLOCK):
            _, wide_gate, wide_up = _swiglu_gradient(gate_row, dh_row, gate_scale, up_scale, start + block, features)
            largest = tl.maximum(largest, tl.maximum(tl.abs(wide_gate), tl.abs(wide_up)))
        unit = tl.div_rn(tl.maximum(tl.max(largest), floor), GRADIENT_MAX)
        tl.store(gradient_unit + token, unit)
        inverse_unit = tl.div_rn(1.0, unit)
    inverse_h = 1.0
    if QUANTIZE_H:
        inverse_h = tl.div_rn(1.0, tl.load(h_scale + token))
    h_row = h_codes + token * features
    gradient_row = gradient + token * 2 * features
    for start in range(0, features, BLOCK):
        offsets = start + block
        inside = offsets < features
        if not ONE_BLOCK:
            h, d_gate, d_up = _swiglu_gradient(gate_row, dh_row, gate_scale, up_scale, offsets, features)
        if QUANTIZE_H:
            h = _to_code(h, inverse_h, H_INTEGER)
        tl.store(h_row + offsets, h.to(h_codes.dtype.element_ty), mask=inside)
        if QUANTIZE_GRADIENT:
            d_gate = _to_code(d_gate, inverse_unit, False)
            d_up = _to_code(d_up, inverse_unit, False)
        tl.store(gradient_row + offsets, d_gate.to(gradient.dtype.element_ty), mask=inside)
        tl.store(gradient_row + features + offsets, d_up.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward_kernel(
    dh, x, weight, inverse_rms, dx, weight_parts, tokens, features, programs, BLOCK: tl.constexpr
):
    """Backward of RMSNorm; program i has tokens i, i + programs, i + 2 programs, ...

    With n = x * r and d = dh * weight:

        dx = r * (d - n * mean(d * n))          dweight = sum over tokens of dh * n

    Steps:

        1. read weight once
        2. for each token of this program: read r, x and dh; add dh * n to this program's part of dweight; store dx
        3. store the part; the caller adds up the parts

    argument        shape                   dtype               meaning
    dh              [tokens, features]      bf16 or fp32        gradient of the normed x, h = n * weight
    x               [tokens, features]      bf16 or fp32        what the forward read
    weight          [features]              bf16 or fp32        of the norm
    inverse_rms     [tokens, 1]             fp32                r of the forward
    dx              [tokens, features]      x's                 written
    weight_parts    [programs, features]    fp32                dweight of each program's tokens; written
    tokens          scalar                  int32
    features        scalar                  int32
    programs        scalar                  int32               size of the launch grid
    BLOCK           constexpr               int                 features rounded up to a power of two
    """
    program = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < features
    w = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    part = tl.zeros((BLOCK,), tl.float32)
    for token in range(program, tokens, programs):
        row = (tl.zeros((), tl.int64) + token) * features
        r = tl.load(inverse_rms + token)
        normed = tl.load(x + row + offsets, mask=inside, other=0.0).to(tl.float32) * r
        d = tl.load(dh + row + offsets, mask=inside, other=0.0).to(tl.float32)
        part += d * normed
        d *= w
        mean = tl.sum(d * normed) / features
        tl.store(dx + row + offsets, ((d - normed * mean) * r).to(dx.dtype.element_ty), mask=inside)
    tl.store(weight_parts + program.to(tl.int64) * features + offsets, part, mask=inside)


@triton.jit
def _scaled_kernel(
    x,
    token_scale,
    feature_scale,
    out,
    features,
    TOKEN_SCALE: tl.constexpr,
    FEATURE_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x times the scale of its token and the scale of its feature, in fp32; program i has token i."""
    token = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if TOKEN_SCALE:
        factor = tl.load(token_scale + token)
    for start in range(0, features, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < features
        value = tl.load(x + token * features + offsets, mask=inside).to(tl.float32) * factor
        if FEATURE_SCALE:
            value *= tl.load(feature_scale + offsets, mask=inside, other=0.0)
        tl.store(out + token * features + offsets, value.to(out.dtype.element_ty), mask=inside)


def _blocks(features: int) -> dict[str, int]:
    """Block and warps for a row of `features`, as arguments of a kernel."""
    whole = int(triton.next_power_of_2(features))
    block = whole if whole <= ONE_BLOCK else BLOCK
    return {"BLOCK": block, "num_warps": min(16, max(1, block // FEATURES_PER_WARP))}


def _launch(
    x: Tensor,
    features: int,
    operand_dtype: torch.dtype | None,
    scale: Tensor | None,
    prologue: tl.constexpr,
    *,
    weight: Tensor | None = None,
    eps: float = 0.0,
    feature_scale: Tensor | None = None,
    write_codes: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes (or h itself in x's type), scale and inverse rms; a result that does not apply is None."""
    assert x.dim() == 2 and x.stride(1) == 1, (x.shape, x.stride())
    tokens, known = x.shape[0], scale is not None
    codes = torch.empty(tokens, features if write_codes else 0, dtype=operand_dtype or x.dtype, device=x.device)
    if operand_dtype is not None and not known:
        scale = torch.empty(tokens, 1, device=x.device)
    inverse_rms = torch.empty(tokens, 1, device=x.device) if prologue == NORM else None
    launch(
        _quantize_kernel,
        (tokens,),
        x,
        weight,
        feature_scale,
        codes,
        scale,
        inverse_rms,
        features,
        x.stride(0),
        eps,
        ABSMAX_FLOOR if feature_scale is None else GRADIENT_ABSMAX_FLOOR,
        PROLOGUE=prologue,
        FEATURE_SCALE=feature_scale is not None,
        QUANTIZE=operand_dtype is not None,
        SCALE_KNOWN=known,
        WRITE_CODES=write_codes,
        LARGEST_CODE=float(CODE_MAX[operand_dtype]) if operand_dtype is not None else 1.0,
        INTEGER=operand_dtype == torch.int8,
        ONE_BLOCK=features <= ONE_BLOCK,
        **_blocks(features),
    )
    return codes, scale, inverse_rms


def quantize(
    x: Tensor, operand_dtype: torch.dtype, scale: Tensor | None, feature_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """See quantize.py."""
    return _launch(x, x.shape[1], operand_dtype, scale, IDENTITY, feature_scale=feature_scale)[:2]


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, operand_dtype: torch.dtype | None, scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See quantize.py."""
    codes, scale, inverse_rms = _launch(x, x.shape[1], operand_dtype, scale, NORM, weight=weight, eps=eps)
    assert inverse_rms is not None
    return codes, scale, inverse_rms


def swiglu_quantize(
    gate_up: Tensor, operand_dtype: torch.dtype | None, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """See quantize.py."""
    return _launch(gate_up, gate_up.shape[1] // 2, operand_dtype, scale, SWIGLU)[:2]


def operand_scale(x: Tensor, operand_dtype: torch.dtype) -> Tensor:
    """See quantize.py."""
    return _scale(x, x.shape[1], operand_dtype, IDENTITY)


def swiglu_scale(gate_up: Tensor, operand_dtype: torch.dtype) -> Tensor:
    """See quantize.py."""
    return _scale(gate_up, gate_up.shape[1] // 2, operand_dtype, SWIGLU)


def _scale(x: Tensor, features: int, operand_dtype: torch.dtype, prologue: tl.constexpr) -> Tensor:
    _, scale, _ = _launch(x, features, operand_dtype, None, prologue, write_codes=False)
    assert scale is not None
    return scale


def rms_norm_backward(dh: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    """See quantize.py."""
    assert dh.is_contiguous() and x.is_contiguous() and dh.shape == x.shape
    tokens, features = x.shape
    programs = min(tokens, NORM_PROGRAMS * torch.cuda.get_device_properties(x.device).multi_processor_count)
    dx = torch.empty_like(x)
    parts = torch.empty(programs, features, device=x.device)
    block = triton.next_power_of_2(features)
    num_warps = 4 if block <= 2048 else 8 if block <= 4096 else 16
    launch(
        _norm_backward_kernel,
        (programs,),
        dh,
        x,
        weight,
        inverse_rms,
        dx,
        parts,
        tokens,
        features,
        programs,
        BLOCK=block,
        num_warps=num_warps,
    )
    return dx, parts.sum(dim=0)


def swiglu_backward(
    dh: Tensor,
    gate_up: Tensor,
    h_scale: Tensor | None,
    operand_dtype: torch.dtype | None,
    gradient_scale: Tensor | None,
) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
    """See quantize.py: (gradient, its scale), h."""
    assert dh.is_contiguous() and gate_up.is_contiguous()
    tokens, features = dh.shape
    quantized = gradient_scale is not None
    h = torch.empty(tokens, features, dtype=operand_dtype or gate_up.dtype, device=dh.device)
    gradient_dtype = torch.float8_e4m3fn if quantized else gate_up.dtype
    gradient = torch.empty(tokens, 2 * features, dtype=gradient_dtype, device=dh.device)
    unit = torch.empty(tokens, 1, device=dh.device) if quantized else None
    launch(
        _swiglu_backward_kernel,
        (tokens,),
        dh,
        gate_up,
        gradient_scale,
        h_scale,
        h,
        gradient,
        unit,
        features,
        GRADIENT_ABSMAX_FLOOR,
        QUANTIZE_H=operand_dtype is not None,
        QUANTIZE_GRADIENT=quantized,
        H_INTEGER=operand_dtype == torch.int8,
        GRADIENT_MAX=float(CODE_MAX[torch.float8_e4m3fn]),
        ONE_BLOCK=features <= BACKWARD_BLOCK,
        BLOCK=min(BACKWARD_BLOCK, triton.next_power_of_2(features)),
        num_warps=BACKWARD_WARPS,
    )
    return (gradient, unit), h


def scaled(x: Tensor, token_scale: Tensor | None, feature_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See quantize.py."""
    assert x.is_contiguous()
    out = torch.empty_like(x, dtype=dtype)
    launch(
        _scaled_kernel,
        (x.shape[0],),
        x,
        token_scale,
        feature_scale,
        out,
        x.shape[1],
        TOKEN_SCALE=token_scale is not None,
        FEATURE_SCALE=feature_scale is not None,
        **_blocks(x.shape[1]),
    )
    return out
