"""What the Hugging Face formats share: names, config.json, generation_config.json.

A LLaMA block is transformers' LlamaForCausalLM. With sub-norms it is BitNetForCausalLM, whose activation function is a
field of its config; SwiGLU makes it the DQT authors' block. Rotary embedding and heads have Hugging Face's order in the
checkpoint already: nothing is permuted.
"""

from __future__ import annotations

from typing import Any

import torch

from dqt_dist.config import Config
from dqt_dist.export.safetensors_writer import Entry
from dqt_dist.export.weights import Weights

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def key(name: str, kind: str = "weight") -> str:
    """Hugging Face's name of a tensor: layers.0.mlp.up_proj -> model.layers.0.mlp.up_proj.weight."""
    return f"{name}.{kind}" if name == "lm_head" else f"model.{name}.{kind}"


def parameter_entries(weights: Weights, names: list[str]) -> list[Entry]:
    """Entries of embedding, norms and head, in the export's dtype."""
    return [
        Entry(key(name), weights.parameters[name], weights.dtype, lambda name=name: weights.parameter(name))
        for name in names
    ]


def config_json(
    config: Config, dtype: torch.dtype, quantization: dict[str, Any] | None, marks: dict[str, int | None]
) -> dict[str, Any]:
    """config.json; `quantization` is the format's quantization_config, none for plain floats; `marks` are ids.

    A mark that the tokenizer lacks is null: left out it would be transformers' default.
    """
    model = config.model
    architecture, model_type = ("BitNetForCausalLM", "bitnet") if model.sub_norm else ("LlamaForCausalLM", "llama")
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_length,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        # The same for readers from before rope_parameters (transformers < 5, llama.cpp's converter).
        "rope_theta": model.rope_base,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        **{f"{name}_token_id": marks.get(name) for name in ("bos", "eos", "pad")},
        "dtype": DTYPE_NAMES[dtype],
        "torch_dtype": DTYPE_NAMES[dtype],
    }
    if quantization is not None:
        values["quantization_config"] = quantization
    return values
