"""The LLaMA layer as a Megatron layer spec: which module stands where in megatron-core's TransformerLayer.

method    linears of a block
dqt       low-bit codes, no float copy           dqt_dist.layers.low_bit_linear, .low_bit_feed_forward
bitnet    float master, ternarised each forward   dqt_dist.layers.bitnet
none      Megatron's own                          megatron.core.tensor_parallel

The low-bit linears contain the norms of the block, as Megatron's fused linears do. For method dqt the norms of the spec
are identities.
"""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from dqt_dist.layers.attention import CausalAttention, RotarySelfAttention
from dqt_dist.layers.bitnet import ColumnParallelBitLinear, RowParallelBitLinear
from dqt_dist.layers.low_bit_feed_forward import LowBitFeedForward
from dqt_dist.layers.low_bit_linear import NormColumnParallelLowBitLinear, RowParallelLowBitLinear
from dqt_dist.layers.norm import ParallelRMSNorm, RMSNorm
from dqt_dist.layers.transformer_config import LlamaTransformerConfig
from dqt_dist.parallel.collectives import Group

LINEARS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "dqt": (NormColumnParallelLowBitLinear, RowParallelLowBitLinear),
    "bitnet": (ColumnParallelBitLinear, RowParallelBitLinear),
    "none": (ColumnParallelLinear, RowParallelLinear),
}


class SubNormLinear(nn.Module):
    """A row-parallel linear with an RMSNorm before it, for o_proj and down_proj (the DQT authors' architecture)."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        linear: type[nn.Module],
        config: LlamaTransformerConfig,
        tp_group: Group,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.norm = ParallelRMSNorm(config, input_size, tp_group)
        self.linear = build_module(linear, input_size, output_size, config=config, tp_group=tp_group, **kwargs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.linear(self.norm(x))


def layer_spec(config: LlamaTransformerConfig) -> ModuleSpec:
    """Spec of one LLaMA layer for the configured method."""
    low_bit = config.quantization.method == "dqt"
    column, row = LINEARS[config.quantization.method]
    norm = IdentityOp if low_bit else RMSNorm
    output = ModuleSpec(module=SubNormLinear, params={"linear": row}) if config.sub_norm else row
    attention = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=CausalAttention,
        linear_proj=output,
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    unfused = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=output))
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(RotarySelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            # With a norm between SwiGLU and down_proj the two cannot be one pass.
            mlp=LowBitFeedForward if low_bit and not config.sub_norm else unfused,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(config: LlamaTransformerConfig, virtual_stage: int | None = None) -> TransformerBlockSubmodules:
    """Spec of the layers of this pipeline stage. RMSNorm of norm.py is the final norm."""
    num_layers = get_num_layers_to_build(config, vp_stage=virtual_stage)
    return TransformerBlockSubmodules(layer_specs=[layer_spec(config)] * num_layers, layer_norm=RMSNorm)
