"""A model to evaluate or to generate with, of a checkpoint or an exported folder, as a model of transformers.

    checkpoint (any layout)    transformers' own LLaMA, built in memory: embedding, norms and head as they are stored;
                               each linear of a block repeats the trainer's operations
    hf, hf-bitnet,             from_pretrained, with the arithmetic of that format's engine
    hf-compressed

transformers brings the KV cache and the sampling. Megatron's own inference context would need an attention that knows
how much of a sequence is cached, and could not open an export. The tests hold the logits equal to those of the
trainer's GPTModel.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.checkpoint.run_tokenizer import check_tokenizer
from dqt_dist.data.tokenizer import TOKENIZER_FILES, Tokenizer, kept_tokenizer, load_tokenizer
from dqt_dist.dtypes import TORCH_DTYPES
from dqt_dist.errors import UserError
from dqt_dist.export import hf
from dqt_dist.export.convert import check_pieces, find_tokenizer, require_packages
from dqt_dist.export.hf_fields import COPY_AGAIN
from dqt_dist.export.hf_reader import HfFolder
from dqt_dist.export.verify import load_folder, quiet_transformers
from dqt_dist.export.weights import Weights
from dqt_dist.lowbit.activation import ACTIVATION_CODES, quantize_tokens, token_absmax
from dqt_dist.progress_line import ProgressLine


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model and what belongs to it."""

    model: Any
    """transformers' PreTrainedModel, in evaluation mode on `device`."""
    tokenizer: Tokenizer
    context_length: int
    """Tokens of the longest sequence, the one it was trained on."""
    vocab_size: int
    """Rows of the embedding; at least the tokenizer's pieces."""
    device: torch.device
    description: str
    """Where it comes from and how it computes, in one line."""


class BitNetLinear(nn.Module):
    """The forward of the BitNet b1.58 baseline, whose product is of scaled floats: x_q * s_x against C * s."""

    weight: Tensor

    def __init__(self, weight: Tensor, activation_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.activation_dtype = activation_dtype

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], of x's dtype."""
        if self.activation_dtype is not None:
            codes, scale = quantize_tokens(x, token_absmax(x), self.activation_dtype)
            x = (codes.float() * scale).to(x.dtype)
        return functional.linear(x, self.weight)


class CodeLinear(nn.Module):
    """The forward of the low-bit linear, y = (x_q @ C^T) * s_x * s.

    The codes are kept as floats in the dtype of the product, which holds codes exactly: no token waits for unpacking.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, activation_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.activation_dtype = activation_dtype

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], of x's dtype."""
        if self.activation_dtype is None:
            return (functional.linear(x, self.codes).float() * self.scale).to(x.dtype)
        x_q, x_scale = quantize_tokens(x, token_absmax(x), self.activation_dtype)
        y = functional.linear(x_q.to(self.codes.dtype), self.codes).float()
        return (y * x_scale * self.scale).to(x.dtype)


def open_model(path: Path, tokenizer: Path | None = None, device: str = "auto", dtype: str = "fp32") -> LanguageModel:
    """Opens a run, a checkpoint or an exported folder.

    device: auto (CUDA where there is one), cpu or cuda. dtype: fp32 or bf16, of the products and of the float weights.
    Raises UserError for what is none of these, is damaged, or has no tokenizer.
    """
    require_packages("hf", verified=True)
    torch_device = _device(device)
    if any(path.glob("*.gguf")):
        raise UserError(
            f"{path}: a GGUF export, which llama.cpp opens; give the checkpoint, or an export of another format"
        )
    if any(path.glob("*.safetensors")):
        return _open_export(path, tokenizer, torch_device, dtype)
    return _open_checkpoint(path, tokenizer, torch_device, dtype)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


# ---- from a checkpoint ----


def _open_checkpoint(path: Path, tokenizer: Path | None, device: torch.device, dtype: str) -> LanguageModel:
    reader = CheckpointReader(path)
    loaded_tokenizer = find_tokenizer(tokenizer, reader)
    weights, config = Weights(reader), reader.config
    model = from_weights(weights, device, TORCH_DTYPES[dtype])
    bits = config.quantization.bits if weights.has_codes else "float weights"
    how = f"{bits if isinstance(bits, str) else f'{bits} bits'}, activations {config.quantization.activation}, {dtype}"
    description = f"{reader.path} (step {reader.progress.step}, {how} on {device.type})"
    model_config = config.model
    return LanguageModel(model, loaded_tokenizer, model_config.seq_length, model_config.vocab_size, device, description)


def from_weights(weights: Weights, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' LLaMA with these weights, loaded one matrix at a time."""
    model = _empty_model(weights)
    activation_dtype = ACTIVATION_CODES[weights.config.quantization.activation]
    coded = set(weights.linears) if weights.has_codes else set()
    if weights.config.quantization.embeddings:
        coded.add("lm_head")  # in training a low-bit linear as well; the embedding is only looked up
    for name in ProgressLine([*weights.parameters, *weights.linears], "weights", unit=" tensors"):
        module = hf.key(name, "").removesuffix(".")
        if name in coded:
            codes, scale = weights.codes(name)
            if weights.method == "bitnet":
                linear = BitNetLinear((codes * scale).to(device, dtype), activation_dtype)
            else:
                linear = CodeLinear(codes.to(device, dtype), scale.to(device), activation_dtype)
            model.set_submodule(module, linear)
        else:
            value = weights.parameter(name).to(device, dtype)
            model.get_submodule(module).weight = nn.Parameter(value, requires_grad=False)
    return model.to(device).eval()


def _empty_model(weights: Weights) -> Any:
    """The modules without memory for their weights; only the rotary frequencies have values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = hf.config_json(weights.config, torch.float32, None, {})
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with quiet_transformers(), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model


# ---- from an exported folder ----


def _open_export(path: Path, tokenizer: Path | None, device: torch.device, dtype: str) -> LanguageModel:
    folder = HfFolder(path)
    folder.check_sizes()
    quantization = folder.config.quantization_config
    compressed = quantization is not None and quantization.quant_method == "compressed-tensors"
    require_packages("hf-compressed" if compressed else "hf", verified=True)
    tokenizer_file = tokenizer or kept_tokenizer(path)
    if tokenizer_file is None:
        raise UserError(f"{path}: no file {' or '.join(TOKENIZER_FILES)} there; give the tokenizer by --tokenizer")
    loaded_tokenizer = load_tokenizer(tokenizer_file)
    facts = {} if folder.record is None else folder.record.model_dump()
    check_tokenizer(loaded_tokenizer, facts, path, path, where="--tokenizer" if tokenizer else "tokenizer")
    vocab_size, context_length = folder.config.vocab_size, folder.config.max_position_embeddings
    check_pieces(loaded_tokenizer, vocab_size)
    try:
        with quiet_transformers():
            model = load_folder(path, dtype=TORCH_DTYPES[dtype], own_generation_config=False)
    except Exception as error:  # of any type, for fields that only transformers reads
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path}: transformers cannot open it ({first_line}); {COPY_AGAIN}") from error
    made_by = "Hugging Face folder" if folder.record is None else folder.record.format
    description = f"{path} ({made_by}, as transformers computes it, {dtype} on {device.type})"
    return LanguageModel(model.to(device), loaded_tokenizer, context_length, vocab_size, device, description)
