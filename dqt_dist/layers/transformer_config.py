"""megatron-core's TransformerConfig for a run, with the fields that the layers of this project add."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dqt_dist.config import Config, QuantizationConfig
from dqt_dist.dtypes import TORCH_DTYPES


@dataclass
class LlamaTransformerConfig(TransformerConfig):
    """Every Megatron module gets this object, so the low-bit layers read their settings here and need no global."""

    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    sub_norm: bool = False
    rope_base: float = 10000.0
    batch_major_attention: bool = False
    """Whether attention takes queries, keys and values sample after sample in memory."""


# Megatron's fields for each value of training.recompute.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "block"},
}


def transformer_config(config: Config, on_cpu: bool) -> LlamaTransformerConfig:
    """Translates the config of a run to Megatron's fields."""
    model, parallel = config.model, config.parallel
    dtype = TORCH_DTYPES[config.quantization.dtype]
    recompute = dict(RECOMPUTE[config.training.recompute])
    if config.training.recompute == "full":
        recompute["recompute_num_layers"] = config.recompute_layers
    interleaved = parallel.virtual_pipeline is not None
    # The methods without low-bit codes use Megatron's own fused SwiGLU, which torch.compile makes.
    fused_swiglu = not on_cpu and config.quantization.method != "dqt"
    return LlamaTransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu if fused_swiglu else silu_of_half,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=on_cpu,
        # `initialize` sets the values, from the logical coordinates.
        perform_initialization=False,
        # The interleaved schedule computes while it sends. Megatron's plain 1F1B schedule cannot, and batches its
        # calls; gloo has no batched calls.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not on_cpu and not interleaved,
        # Megatron would wait for the device after each batch of calls, for the sake of an older torch.
        batch_p2p_sync=False,
        bias_activation_fusion=fused_swiglu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **recompute,
        quantization=config.quantization,
        sub_norm=model.sub_norm,
        rope_base=model.rope_base,
        batch_major_attention=config.data.document_masking and config.has_variable_length_attention and not on_cpu,
    )


def silu_of_half(gate: Tensor) -> Tensor:
    """SiLU of the gate, a strided half of gate|up, for Megatron's unfused SwiGLU.

    `_halves` in kernels/quantize.py says why the gate is copied.
    """
    return F.silu(gate.contiguous())
