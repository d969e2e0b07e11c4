"""Blocks of llama.cpp: integer codes and one fp16 scale d per block, W = d * code. Blocks run along the row.

    type   codes/block     bytes   codes held    layout
    TQ2_0  256             66      -1 .. 1       64 bytes of four 2-bit fields, d
    TQ1_0  256             54      -1 .. 1       48 + 4 bytes of five (four) base-3 digits, d
    Q2_0    64             18      -1 .. 1       d, 16 bytes of four 2-bit fields
    Q4_0    32             18      -8 .. 7       d, 16 bytes of two 4-bit fields
    Q5_0    32             22      -16 .. 15     d, 4 bytes of fifth bits, 16 bytes of two 4-bit fields
    Q6_K   256             210     -32 .. 31     128 bytes low 4 bits, 64 bytes high 2 bits, 16 int8 scales (all 1), d
    Q8_0    32             34      -127 .. 127   d, 32 int8 (llama.cpp reads -128 as well)

Every block of a matrix repeats its scale, so that every llama.cpp reads the file. The scale is exact when it is an fp16
number; powers of two down to 2^-24 are. The layouts are checked against the `gguf` package, which unpacks all but Q2_0.

llama.cpp has had Q2_0 since 2026, for CPUs and GPUs; its CUDA code has neither TQ2_0 nor TQ1_0. `teach_gguf` adds Q2_0
to a `gguf` package that lacks it, as 0.19.0 does, for whoever reads files in this process, transformers among them.
llama.cpp itself reads such files in `make test-gguf`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int8]
"""[blocks, codes per block]."""
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class BlockType:
    """One block layout; `pack` makes everything but the scale, split where the scale stands."""

    name: str
    size: int
    """Codes per block."""
    num_bytes: int
    qmin: int
    qmax: int
    pack: Callable[[Codes], Bytes]
    scale_first: bool
    file_type: int
    """general.file_type of a model that is mostly of this type."""


def _side_by_side(fields: Sequence[Bytes], bits: int) -> Bytes:
    """One byte of several fields, the first at the lowest `bits`."""
    total = fields[0].copy()
    for position, field in enumerate(fields[1:], start=1):
        total |= np.left_shift(field, np.uint8(position * bits))
    return total


def _tq2_0(codes: Codes) -> Bytes:
    """Element 128 h + 32 n + m lies in byte 32 h + m at bits 2 n."""
    fields = (codes + 1).astype(np.uint8).reshape(-1, 2, 4, 32)
    return _side_by_side([fields[:, :, n] for n in range(4)], 2).reshape(-1, 64)


def _base_3(digits: NDArray[np.uint8]) -> Bytes:
    """digits [blocks, 5, bytes], most significant first -> ceil(value * 256 / 243). Times 3 yields the digits."""
    value = np.zeros((digits.shape[0], digits.shape[2]), dtype=np.uint16)
    for position in range(5):
        value = value * 3 + digits[:, position]
    return ((value * 256 + 242) // 243).astype(np.uint8)


def _tq1_0(codes: Codes) -> Bytes:
    """160 codes in 32 bytes, 80 in 16, and 16 in 4 bytes whose fifth digit is 0."""
    digits = (codes + 1).astype(np.uint8)
    tail = np.pad(digits[:, 240:].reshape(-1, 4, 4), ((0, 0), (0, 1), (0, 0)))
    parts = [digits[:, :160].reshape(-1, 5, 32), digits[:, 160:240].reshape(-1, 5, 16), tail]
    return np.concatenate([_base_3(part) for part in parts], axis=1)


def _q2_0(codes: Codes) -> Bytes:
    """Element j lies in byte j / 4 at bits 2 (j mod 4)."""
    fields = (codes + 1).astype(np.uint8).reshape(-1, 16, 4)
    return _side_by_side([fields[:, :, n] for n in range(4)], 2)


def _q4_0(codes: Codes) -> Bytes:
    """Elements j and j + 16 share byte j."""
    fields = (codes + 8).astype(np.uint8)
    return _side_by_side([fields[:, :16], fields[:, 16:]], 4)


def _q5_0(codes: Codes) -> Bytes:
    fields = (codes + 16).astype(np.uint8)
    fifth = np.packbits(fields >> 4, axis=1, bitorder="little")
    low = fields & 15
    return np.concatenate([fifth, _side_by_side([low[:, :16], low[:, 16:]], 4)], axis=1)


def _q6_k(codes: Codes) -> Bytes:
    """In each half of 128: l and l + 64 share a byte of low bits; l, l + 32, l + 64 and l + 96 one of high bits."""
    fields = (codes + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = fields & 15, fields >> 4
    low_bytes = _side_by_side([low[:, :, :2], low[:, :, 2:]], 4)
    high_bytes = _side_by_side([high[:, :, n] for n in range(4)], 2)
    blocks = len(codes)
    ones = np.ones((blocks, 16), dtype=np.uint8)
    return np.concatenate([low_bytes.reshape(blocks, 128), high_bytes.reshape(blocks, 64), ones], axis=1)


def _q8_0(codes: Codes) -> Bytes:
    return codes.view(np.uint8)


TYPES = {
    block.name: block
    for block in (
        BlockType("TQ2_0", 256, 66, -1, 1, _tq2_0, False, 37),
        BlockType("TQ1_0", 256, 54, -1, 1, _tq1_0, False, 36),
        BlockType("Q2_0", 64, 18, -1, 1, _q2_0, True, 41),
        BlockType("Q4_0", 32, 18, -8, 7, _q4_0, True, 2),
        BlockType("Q5_0", 32, 22, -16, 15, _q5_0, True, 8),
        BlockType("Q6_K", 256, 210, -32, 31, _q6_k, False, 18),
        BlockType("Q8_0", 32, 34, -128, 127, _q8_0, True, 7),
    )
}
"""By llama.cpp's name, in the order of preference: what every llama.cpp reads first, then the smallest."""
Q2_0_TYPE = 42
"""Number of Q2_0 in files (enum ggml_type)."""


def teach_gguf() -> None:
    """Adds Q2_0 to the `gguf` package, if it lacks it: to write its name, and to read its blocks."""
    from gguf import quants
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if "Q2_0" in GGMLQuantizationType.__members__:
        return
    member = int.__new__(GGMLQuantizationType, Q2_0_TYPE)
    member._name_, member._value_ = "Q2_0", Q2_0_TYPE
    GGMLQuantizationType._member_map_["Q2_0"] = member
    GGMLQuantizationType._value2member_map_[Q2_0_TYPE] = member
    block = TYPES["Q2_0"]
    GGML_QUANT_SIZES[member] = (block.size, block.num_bytes)

    def dequantize_blocks(cls: type, blocks: Bytes) -> NDArray[np.float32]:
        scale, fields = blocks[:, :2].copy().view(np.float16).astype(np.float32), blocks[:, 2:, None]
        codes = (fields >> np.array([0, 2, 4, 6], dtype=np.uint8)) & np.uint8(3)
        return (codes.reshape(len(blocks), -1).astype(np.float32) - 1) * scale

    type("Q2_0", (quants.TQ2_0.__base__,), {"dequantize_blocks": classmethod(dequantize_blocks)}, qtype=member)


def pack(codes: NDArray[np.int8], scale: float, block: BlockType) -> Bytes:
    """int8 codes [rows, columns] -> bytes [rows, columns / block.size * block.num_bytes]; block.size divides them."""
    rows, columns = codes.shape
    packed = block.pack(np.ascontiguousarray(codes).reshape(-1, block.size))
    halves = np.full((len(packed), 1), scale, dtype="<f2").view(np.uint8)
    parts = [halves, packed] if block.scale_first else [packed, halves]
    return np.concatenate(parts, axis=1).reshape(rows, columns // block.size * block.num_bytes)
