"""Builds this rank's part of the model.

build_model     megatron-core's GPTModel from the layer spec of spec.py, one per virtual pipeline stage
placement.py    which rows and columns of which logical matrix each local shard holds
initialize.py   the same initial values in every layout
"""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import nn

from dqt_dist.config import Config
from dqt_dist.layers.initialize import initialize
from dqt_dist.layers.language_model import LlamaModel
from dqt_dist.layers.low_bit_embedding import LowBitEmbedding, LowBitHead
from dqt_dist.layers.placement import assign_layouts
from dqt_dist.layers.spec import block_spec
from dqt_dist.layers.transformer_config import LlamaTransformerConfig, transformer_config
from dqt_dist.parallel import megatron_device
from dqt_dist.parallel.groups import Groups


def build_model(config: Config, groups: Groups) -> nn.ModuleList:
    """The model chunks of this rank, in pipeline order, on `groups.device`, with initial values."""
    on_cpu = groups.device.type == "cpu"
    megatron_config = transformer_config(config, on_cpu)
    model_chunks = nn.ModuleList()
    with megatron_device.cuda_or_cpu():
        for stage in range(config.parallel.virtual_pipeline or 1):
            virtual_stage = stage if config.parallel.virtual_pipeline else None
            chunk = LlamaModel(
                config=megatron_config,
                transformer_layer_spec=block_spec(megatron_config, virtual_stage),
                vocab_size=config.model.vocab_size,
                max_sequence_length=config.model.seq_length,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage),
                share_embeddings_and_output_weights=False,
                position_embedding_type="none",  # attention applies the rotary embedding
                vp_stage=virtual_stage,
            )
            # Megatron's own number of recomputed blocks works for "full" only.
            for layer in chunk.decoder.layers[config.recompute_layers :]:
                layer.recompute_mlp = False
            if config.quantization.embeddings:
                _quantize_embeddings(chunk, megatron_config, config, groups)
            model_chunks.append(chunk.to(groups.device))
    assign_layouts(model_chunks, config, groups.tensor)
    initialize(model_chunks, config, groups.tensor)
    return model_chunks


def _quantize_embeddings(
    chunk: GPTModel, megatron_config: LlamaTransformerConfig, config: Config, groups: Groups
) -> None:
    """Replaces embedding and head by low-bit modules."""
    vocabulary = config.model.vocab_size
    if chunk.pre_process:
        embedding = LowBitEmbedding(megatron_config, vocabulary, groups.tensor, groups.device)
        chunk.embedding.word_embeddings = embedding  # pyright: ignore[reportAttributeAccessIssue]
    if chunk.post_process:
        hidden = config.model.hidden_size
        head = LowBitHead(hidden, vocabulary, config=megatron_config, tp_group=groups.tensor)
        chunk.output_layer = head  # pyright: ignore[reportAttributeAccessIssue]
