"""Megatron's TransformerConfig with the things its layers need to know of ours."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.core.transformer.transformer_config import TransformerConfig

from dqt_dist.config import QuantizationConfig


@dataclass
class LlamaTransformerConfig(TransformerConfig):
    """Every Megatron module gets this object, so the low-bit layers find their settings without a global."""

    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    sub_norm: bool = False
    rope_base: float = 10000.0
