"""Format `hf-compressed`: n-bit codes as compressed-tensors, for transformers and vLLM.

    2..7 bits, pack-quantized   weight_packed  int32 [out, ceil(in * n / 32)]   code + 2^(n-1), a dense little-endian
                                                                                bit stream along the row
                                weight_shape   int64 [2] = (out, in)
    8 bits, int-quantized       weight         int8 [out, in]
    both                        weight_scale   fp32 [out, 1]                    W = weight_scale * code

Ternary codes take 2 bits. The scale is one number per matrix. The file repeats the number for every row, because vLLM's
packed kernels want one per channel. Each config group names its format: without that transformers infers the wrong one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqt_dist.errors import UserError
from dqt_dist.export import hf
from dqt_dist.export.safetensors_writer import Entry
from dqt_dist.export.weights import Weights
from dqt_dist.lowbit.grid import Grid

WORD_BITS = 32
# Rows whose bits are spread out at once: 8 to 64 MiB of scratch for the widest models.
ROWS_AT_ONCE = 1024


def check(weights: Weights) -> None:
    """Raises UserError for a model without codes."""
    if not weights.has_codes:
        raise UserError('--format hf-compressed: quantization.method = "none" has no codes; use hf or gguf')


def width(grid: Grid) -> int:
    """Bits a code takes in the file."""
    return 2 if grid.bits == "ternary" else grid.bits


def packed_columns(columns: int, bits: int) -> int:
    """int32 words of a row."""
    return -(-columns * bits // WORD_BITS)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [out, in] -> int32 words [out, packed_columns(in, bits)]."""
    return torch.cat([_pack_words(part, bits) for part in codes.split(ROWS_AT_ONCE)])


def _pack_words(codes: Tensor, bits: int) -> Tensor:
    fields = (codes.numpy().astype(np.int16) + (1 << bits - 1)).astype(np.uint8)
    stream = np.unpackbits(fields[..., None], axis=2, count=bits, bitorder="little").reshape(len(fields), -1)
    missing = -stream.shape[1] % WORD_BITS
    packed = np.packbits(np.pad(stream, ((0, 0), (0, missing))), axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4"))


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_words`: int32 words -> int8 codes [out, columns]."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    stream = stream[:, : columns * bits].reshape(len(words), columns, bits)
    fields = np.packbits(stream, axis=2, bitorder="little")[..., 0]
    return torch.from_numpy((fields.astype(np.int16) - (1 << bits - 1)).astype(np.int8))


def entries(weights: Weights) -> list[Entry]:
    """All tensors of the model."""
    found = hf.parameter_entries(weights, list(weights.parameters))
    for name in weights.linears:
        found += _linear_entries(weights, name)
    return found


def _linear_entries(weights: Weights, name: str) -> Iterator[Entry]:
    (rows, columns), bits = weights.linears[name], width(weights.grid)

    def scale() -> Tensor:
        return weights.scale(name).expand(rows, 1)

    if bits == 8:
        yield Entry(hf.key(name), (rows, columns), torch.int8, lambda: weights.codes(name)[0])
    else:
        words = (rows, packed_columns(columns, bits))
        yield Entry(hf.key(name, "weight_packed"), words, torch.int32, lambda: pack_words(weights.codes(name)[0], bits))
        yield Entry(hf.key(name, "weight_shape"), (2,), torch.int64, lambda: torch.tensor([rows, columns]))
    yield Entry(hf.key(name, "weight_scale"), (rows, 1), torch.float32, scale)


def round_activations(x: Tensor) -> Tensor:
    """x [..., features] as compressed-tensors rounds the input of a linear: int8, one scale of max|x| / 127.5 a token.

    The largest value of a token lies half a code outside of the range, so its error is up to half a code. Training has
    max|x| / 127 and no such error.
    """
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127.5).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / scale).round().clamp(-128, 127) * scale


def quantization_config(weights: Weights) -> dict[str, Any]:
    """The entry of config.json."""
    bits = width(weights.grid)
    layout = "int-quantized" if bits == 8 else "pack-quantized"
    common = {"type": "int", "symmetric": True}
    activations = {"num_bits": 8, **common, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "format": layout,
        "weights": {"num_bits": bits, **common, "strategy": "channel", "dynamic": False},
        "input_activations": activations if weights.config.quantization.activation != "none" else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
