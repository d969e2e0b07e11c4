"""Format `gguf`: one file for llama.cpp, architecture `llama`.

    model.gguf    token_embd, output_norm, output, blk.N.{attn_norm, attn_q, ..., ffn_down}.weight, metadata, tokenizer

Linears are blocks of integer codes (gguf_blocks.py), embedding and head F16 or F32, norms F32. The rotary embedding of
llama.cpp turns neighbouring pairs, that of Hugging Face turns halves: rows of q_proj and k_proj change places. A
feed-forward size that fills no whole block is padded by zero rows of gate and up and zero columns of down. The padding
does not change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqt_dist.config import Config
from dqt_dist.errors import UserError
from dqt_dist.export import verify
from dqt_dist.export.errors import VerificationError
from dqt_dist.export.gguf_blocks import TYPES, BlockType, pack, teach_gguf
from dqt_dist.export.gguf_tokenizer import add_tokenizer
from dqt_dist.export.safetensors_writer import Entry
from dqt_dist.export.tokenizer_check import check_gguf
from dqt_dist.export.tokenizer_model import TokenizerModel
from dqt_dist.export.trainer_model import trainer_model
from dqt_dist.export.weights import Weights

FILE = "model.gguf"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
# general.file_type of a model of floats.
FLOAT_FILE_TYPES = {torch.float32: 0, torch.bfloat16: 32}
Progress = Callable[[list[Entry]], Iterable[Entry]]


def key(name: str) -> str:
    """llama.cpp's name: layers.3.mlp.up_proj -> blk.3.ffn_up.weight."""
    if name in ENDS:
        return f"{ENDS[name]}.weight"
    _, layer, part = name.split(".", 2)
    return f"blk.{layer}.{NAMES[part]}.weight"


# ---- what the format can hold ----


def choose_block(weights: Weights, wanted: str | None) -> BlockType | None:
    """The block type of the linears, None for float weights. Raises UserError for a model the format cannot hold."""
    model = weights.config.model
    if model.sub_norm:
        raise UserError(
            "--format gguf: llama.cpp's LLaMA has no norms before o_proj and down_proj (model.sub_norm); use "
            "hf-bitnet, "
            "hf-compressed or hf"
        )
    if not weights.has_codes:
        if wanted is not None:
            raise UserError(f'--gguf-type {wanted}: quantization.method = "none" has no codes; leave it out for floats')
        return None
    if wanted is not None and wanted not in TYPES:
        raise UserError(f"--gguf-type {wanted}: unknown; use one of {', '.join(TYPES)}")
    grid, hidden = weights.grid, model.hidden_size
    wide_enough = [b for b in TYPES.values() if b.qmin <= grid.qmin and grid.qmax <= b.qmax]
    fitting = [b.name for b in wide_enough if hidden % b.size == 0]
    block = TYPES[wanted or (fitting or [wide_enough[0].name])[0]]
    if block not in wide_enough:
        raise UserError(
            f"--gguf-type {block.name}: holds codes from {block.qmin} to {block.qmax}, this model has {grid.qmin} to "
            f"{grid.qmax} (quantization.bits = {grid.bits}); use {' or '.join(b.name for b in wide_enough)}"
        )
    if block.name not in fitting:
        possible = f"use --gguf-type {' or '.join(fitting)}, or " if fitting else "use "
        raise UserError(
            f"--format gguf: {block.name} packs {block.size} codes of a row together, model.hidden_size is {hidden}; "
            f"{possible}another format"
        )
    return block


def padded_ffn(config: Config, block: BlockType | None) -> int:
    """ffn_hidden_size, up to a whole number of blocks."""
    size = 1 if block is None else block.size
    return -(-config.model.ffn_hidden_size // size) * size


# ---- tensors ----


def swap_rotary_rows(matrix: Tensor, heads: int) -> Tensor:
    """Rows (head, half, i) of Hugging Face's order to (head, i, half) of llama.cpp's; [out, in]."""
    rows, columns = matrix.shape
    return matrix.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def arranged(weights: Weights, name: str, matrix: Tensor, ffn: int) -> Tensor:
    """A linear's codes or values in llama.cpp's order of rows and padded to `ffn`."""
    model = weights.config.model
    if name.endswith("q_proj"):
        return swap_rotary_rows(matrix, model.num_attention_heads)
    if name.endswith("k_proj"):
        return swap_rotary_rows(matrix, model.num_query_groups)
    missing = ffn - model.ffn_hidden_size
    if missing and name.endswith(("gate_proj", "up_proj")):
        return torch.nn.functional.pad(matrix, (0, 0, 0, missing))
    if missing and name.endswith("down_proj"):
        return torch.nn.functional.pad(matrix, (0, missing))
    return matrix


def entries(weights: Weights, block: BlockType | None) -> list[Entry]:
    """All tensors; a block tensor is uint8 [rows, bytes of a row]."""
    ffn = padded_ffn(weights.config, block)
    found = [_parameter(weights, name, shape) for name, shape in weights.parameters.items()]
    for name, (rows, columns) in weights.linears.items():
        rows = ffn if name.endswith(("gate_proj", "up_proj")) else rows
        columns = ffn if name.endswith("down_proj") else columns
        if block is None:
            make = lambda name=name: arranged(weights, name, weights.parameter(name), ffn)  # noqa: E731
            found.append(Entry(key(name), (rows, columns), weights.dtype, make))
        else:
            shape = (rows, columns // block.size * block.num_bytes)
            found.append(Entry(key(name), shape, torch.uint8, lambda name=name: _blocks(weights, name, ffn, block)))
    return found


def _parameter(weights: Weights, name: str, shape: tuple[int, ...]) -> Entry:
    # llama.cpp computes norms in F32 only.
    dtype = torch.float32 if len(shape) == 1 else weights.dtype
    return Entry(key(name), shape, dtype, lambda: weights.parameter(name).to(dtype))


def _blocks(weights: Weights, name: str, ffn: int, block: BlockType) -> Tensor:
    codes, scale = weights.codes(name)
    return torch.from_numpy(pack(arranged(weights, name, codes, ffn).numpy(), float(scale), block))


# ---- the file ----


def write(path: Path, weights: Weights, tokenizer: TokenizerModel, block: BlockType | None, progress: Progress) -> None:
    """Writes the file, a tensor at a time."""
    import gguf

    teach_gguf()
    writer = gguf.GGUFWriter(None, "llama")
    _add_metadata(writer, weights, block)
    add_tokenizer(writer, tokenizer, weights.config.model.vocab_size)
    quantized = None if block is None else gguf.GGMLQuantizationType[block.name]
    numbers = {torch.float32: np.dtype(np.float32), torch.bfloat16: np.dtype(np.uint8), torch.uint8: np.dtype(np.uint8)}
    tensors = entries(weights, block)
    for entry in tensors:
        raw = quantized if entry.dtype == torch.uint8 else None
        shape = entry.shape
        if entry.dtype == torch.bfloat16:
            raw, shape = gguf.GGMLQuantizationType.BF16, (*shape[:-1], 2 * shape[-1])
        writer.add_tensor_info(entry.name, shape, numbers[entry.dtype], entry.num_bytes, raw)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in progress(tensors):
            writer.write_tensor_data(np.frombuffer(entry.raw_bytes(), dtype=np.uint8))
    finally:
        writer.close()


def _add_metadata(writer: Any, weights: Weights, block: BlockType | None) -> None:
    model = weights.config.model
    writer.add_name("dqt_dist")
    writer.add_file_type(FLOAT_FILE_TYPES[weights.dtype] if block is None else block.file_type)
    writer.add_quantization_version(2)
    writer.add_context_length(model.seq_length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(padded_ffn(weights.config, block))
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_query_groups)
    writer.add_layer_norm_rms_eps(model.norm_epsilon)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_base)
    writer.add_vocab_size(model.vocab_size)


# ---- verification ----


def verify_file(folder: Path, weights: Weights, block: BlockType | None, tokenizer: TokenizerModel) -> list[str]:
    """Compares token ids with training's, tensors with the checkpoint, size with bits, logits with the trainer's.

    The engine is transformers, which reads GGUF into floats. Raises VerificationError.
    """
    told = check_gguf(folder / FILE, tokenizer)
    _check_tensors(folder / FILE, weights, block)
    tokens = verify.sample_tokens(tokenizer, weights.config.model.seq_length)
    exact = block is None or all(float(np.float16(scale)) == scale for scale in weights.scales().values())
    with trainer_model(weights, "none") as trainer:
        wanted = trainer(tokens)
    found = verify.transformers_logits(folder, tokens, gguf_file=FILE)
    what = "transformers (GGUF as floats) against the trainer's model, activations none"
    return [told, f"{what}: {verify.compare(found, wanted, verify.FLOAT if exact else verify.ROUNDED, what)}"]


def _check_tensors(path: Path, weights: Weights, block: BlockType | None) -> None:
    """Every tensor as the `gguf` package unpacks it, against the checkpoint; and the bytes of the linears."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    ffn = padded_ffn(weights.config, block)
    names = [*weights.parameters, *weights.linears]
    if tensors.keys() != {key(name) for name in names}:
        raise VerificationError(f"{FILE}: tensors {sorted(tensors)} are not those of the model")
    for name in names:
        tensor = tensors[key(name)]
        found = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if name in weights.parameters:
            wanted = weights.parameter(name).float()
        elif block is None:
            wanted = arranged(weights, name, weights.parameter(name).float(), ffn)
        else:
            codes, scale = weights.codes(name)
            wanted = arranged(weights, name, codes, ffn) * scale.half().float()
            if tensor.n_bytes * block.size != wanted.numel() * block.num_bytes:
                raise VerificationError(
                    f"{tensor.name}: {tensor.n_bytes} bytes for {wanted.numel()} codes of {block.name}"
                )
        if not torch.equal(found.reshape(wanted.shape), wanted):
            raise VerificationError(f"{tensor.name}: differs from the checkpoint by {(found - wanted).abs().max():.3e}")


def export(
    folder: Path,
    weights: Weights,
    tokenizer: TokenizerModel,
    wanted: str | None,
    verified: bool,
    progress: Progress,
) -> list[str]:
    """Writes and verifies the file; returns what is to be told. Raises UserError and VerificationError."""
    block = choose_block(weights, wanted)
    write(folder / FILE, weights, tokenizer, block, progress)
    if not verified:
        return ["not verified (--no-verify)"]
    return verify_file(folder, weights, block, tokenizer)
