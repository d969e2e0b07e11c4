"""Which rows and columns of which logical matrix each local shard holds.

Logical names are those of Hugging Face's LLaMA: `layers.17.self_attn.q_proj`, `layers.17.mlp.up_proj`, `embed_tokens`.
`assign_layouts` gives every low-bit matrix and every parameter of a rank a `ShardLayout`. All code that depends on a
place in the model (initial values, rounding, digest, checkpoint, export) reads the place from the `ShardLayout`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from dqt_dist.config import Config
from dqt_dist.layers.bitnet import ColumnParallelBitLinear, RowParallelBitLinear
from dqt_dist.layers.parameters import Parameter
from dqt_dist.layers.spec import SubNormLinear
from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.parallel.groups import Group


def _columns_split(matrix: LogicalMatrix, group: Group) -> ShardLayout:
    """All rows of the matrix, and this rank's share of its columns."""
    columns = matrix.columns // group.size()
    return ShardLayout((matrix,), (RowBlock(0, 0, matrix.rows),), columns, group.rank() * columns)


def _rows_split(group: Group, *matrices: LogicalMatrix) -> ShardLayout:
    """This rank's share of the rows of each matrix, one matrix after the other."""
    blocks = [
        RowBlock(i, group.rank() * (m.rows // group.size()), m.rows // group.size()) for i, m in enumerate(matrices)
    ]
    return ShardLayout(matrices, tuple(blocks), matrices[0].columns)


def _linear(config: Config, layer: str, part: str) -> LogicalMatrix:
    return LogicalMatrix(f"{layer}.{part}", *config.model.linear_shapes()[part])


def _qkv_layout(config: Config, layer: str, group: Group) -> ShardLayout:
    """Megatron interleaves by query group: the query heads of the group, then its key head, then its value head."""
    model, head = config.model, config.model.head_dim
    queries = model.num_attention_heads // model.num_query_groups * head
    matrices = tuple(_linear(config, layer, f"self_attn.{part}_proj") for part in "qkv")
    local_groups = model.num_query_groups // group.size()
    blocks = []
    for query_group in range(group.rank() * local_groups, (group.rank() + 1) * local_groups):
        blocks.append(RowBlock(0, query_group * queries, queries))
        blocks.append(RowBlock(1, query_group * head, head))
        blocks.append(RowBlock(2, query_group * head, head))
    return ShardLayout(matrices, tuple(blocks), model.hidden_size)


def _linear_layouts(layer: TransformerLayer, config: Config, group: Group) -> Iterator[tuple[nn.Module, ShardLayout]]:
    """The four fused linears of a layer with their logical coordinates."""
    name = f"layers.{layer.layer_number - 1}"
    attention, mlp = layer.self_attention, layer.mlp
    yield attention.linear_qkv, _qkv_layout(config, name, group)
    yield _without_sub_norm(attention.linear_proj), _columns_split(_linear(config, name, "self_attn.o_proj"), group)
    gate, up = (_linear(config, name, f"mlp.{part}_proj") for part in ("gate", "up"))
    yield mlp.linear_fc1, _rows_split(group, gate, up)
    yield _without_sub_norm(mlp.linear_fc2), _columns_split(_linear(config, name, "mlp.down_proj"), group)


def _without_sub_norm(linear: nn.Module) -> nn.Module:
    """The linear inside a SubNormLinear, or `linear` itself."""
    inner = linear.linear if isinstance(linear, SubNormLinear) else linear
    assert isinstance(inner, nn.Module)
    return inner


def _assign(parameter: nn.Parameter | LowBitMatrix, layout: ShardLayout, replicated: bool = False) -> None:
    if isinstance(parameter, LowBitMatrix):
        parameter.assign(layout)
        return
    parameter.description = Parameter(parameter, layout, replicated)  # type: ignore[attr-defined]
    # DeepSpeed and Megatron look for this name.
    parameter.tensor_model_parallel = not replicated  # type: ignore[attr-defined]


def _assign_vector(parameter: nn.Parameter, name: str, rows: int, group: Group | None = None) -> None:
    vector = LogicalMatrix(name, rows, 1)
    if group is None:
        _assign(parameter, ShardLayout((vector,), (RowBlock(0, 0, rows),), 1), replicated=True)
    else:
        _assign(parameter, _rows_split(group, vector))


def assign_layouts(model_chunks: nn.ModuleList, config: Config, group: Group) -> None:
    """Sets the logical coordinates of every low-bit matrix and every parameter. `group` is the TP group."""
    hidden, ffn, vocabulary = config.model.hidden_size, config.model.ffn_hidden_size, config.model.vocab_size
    for chunk in cast(Iterable[GPTModel], model_chunks):
        if chunk.pre_process:
            weight = chunk.embedding.word_embeddings.weight
            _assign(weight, _rows_split(group, LogicalMatrix("embed_tokens", vocabulary, hidden)))
        for layer in cast(Iterable[TransformerLayer], chunk.decoder.layers):
            _assign_layer(layer, config, group, hidden, ffn)
        if chunk.post_process:
            final_layernorm = chunk.decoder.final_layernorm
            assert final_layernorm is not None
            _assign_vector(final_layernorm.weight, "norm", hidden)
            _assign(chunk.output_layer.weight, _rows_split(group, LogicalMatrix("lm_head", vocabulary, hidden)))


def _assign_layer(layer: TransformerLayer, config: Config, group: Group, hidden: int, ffn: int) -> None:
    name = f"layers.{layer.layer_number - 1}"
    for linear, layout in _linear_layouts(layer, config, group):
        _assign(linear.weight, layout)
        if isinstance(linear, ColumnParallelBitLinear | RowParallelBitLinear):
            linear.layout = layout
    input_norm, ffn_norm = _norm_weights(layer, config)
    _assign_vector(input_norm, f"{name}.input_layernorm", hidden)
    _assign_vector(ffn_norm, f"{name}.post_attention_layernorm", hidden)
    if config.model.sub_norm:
        attention_norm, ffn_norm = layer.self_attention.linear_proj.norm, layer.mlp.linear_fc2.norm
        _assign_vector(attention_norm.weight, f"{name}.self_attn.attn_sub_norm", hidden, group)
        _assign_vector(ffn_norm.weight, f"{name}.mlp.ffn_sub_norm", ffn, group)


def _norm_weights(layer: TransformerLayer, config: Config) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights of the norms before attention and before the feed-forward half. Low-bit modules contain these norms."""
    if config.quantization.method != "dqt":
        return layer.input_layernorm.weight, layer.pre_mlp_layernorm.weight
    feed_forward = layer.mlp.linear_fc1 if config.model.sub_norm else layer.mlp
    return layer.self_attention.linear_qkv.norm_weight, feed_forward.norm_weight
