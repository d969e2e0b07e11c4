"""Format `hf-bitnet`: ternary codes at 2 bits, for transformers' `quant_method: bitnet`.

    weight        uint8 [out / 4, in]   row r of the matrix lies in packed row r mod (out / 4), at bits
                                        2 * (r div (out / 4)): blocks of rows, not four neighbours;
                                        stored value code + 1
    weight_scale  fp32 [1]              1 / s: the engine's BitLinear DIVIDES by it

Activations are rounded to 8 bits per token, as in training: scale 127 / max|x|, floor 1e-5 on the maximum. The engine
cannot switch that off, so a model trained without it is refused. The linear class `bitlinear` keeps the packed bytes in
memory and is what llama.cpp's converter reads too (`autobitlinear` multiplies by its scale: another file).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dqt_dist.errors import UserError
from dqt_dist.export import hf
from dqt_dist.export.safetensors_writer import Entry
from dqt_dist.export.weights import Weights

CODES_PER_BYTE = 4


def check(weights: Weights) -> None:
    """Raises UserError for a model that the format cannot hold; the message says which formats can."""
    config = weights.config
    if not weights.has_codes:
        raise UserError('--format hf-bitnet: quantization.method = "none" has no codes; use hf or gguf')
    if weights.grid.bits != "ternary":
        raise UserError(
            f"--format hf-bitnet: holds ternary codes, this model has quantization.bits = {weights.grid.bits}; use "
            "hf-compressed, hf or gguf, or --bits ternary"
        )
    if config.quantization.activation == "none":
        raise UserError(
            "--format hf-bitnet: its engine always rounds activations to 8 bits, this model was trained with "
            'quantization.activation = "none"; use hf-compressed or hf'
        )
    for name, (rows, _) in weights.linears.items():
        if rows % CODES_PER_BYTE:
            raise UserError(f"--format hf-bitnet: {name} has {rows} rows, not a multiple of 4; use hf-compressed or hf")


def pack_rows(codes: Tensor) -> Tensor:
    """int8 codes in {-1, 0, 1} [out, in] -> uint8 [out / 4, in]."""
    fields = (codes + 1).to(torch.uint8).view(CODES_PER_BYTE, -1, codes.shape[1])
    return fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6


def unpack_rows(packed: Tensor) -> Tensor:
    """Inverse of `pack_rows`: uint8 [out / 4, in] -> int8 [out, in]."""
    return torch.cat([(packed >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)])


def entries(weights: Weights) -> list[Entry]:
    """All tensors of the model."""
    found = hf.parameter_entries(weights, list(weights.parameters))
    for name, (rows, columns) in weights.linears.items():
        packed = (rows // CODES_PER_BYTE, columns)
        found += [
            Entry(hf.key(name), packed, torch.uint8, lambda name=name: pack_rows(weights.codes(name)[0])),
            Entry(hf.key(name, "weight_scale"), (1,), torch.float32, lambda name=name: 1 / weights.scale(name).view(1)),
        ]
    return found


def quantization_config() -> dict[str, Any]:
    """The entry of config.json. An explicit modules_to_not_convert would turn the head into a BitLinear: it is null."""
    return {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "use_rms_norm": False,
        "rms_norm_eps": 1e-6,
        "modules_to_not_convert": None,
    }
