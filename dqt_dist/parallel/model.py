"""Builds this rank's part of the model and gives every weight its logical coordinates and initial value.

    build_model     megatron-core's GPTModel from our layer spec, one a virtual pipeline stage
    assign_layouts  which rows and columns of which logical matrix each local shard is
    initialize      the same initial values in every layout: a draw is a function of the coordinates alone

Logical names are those of Hugging Face's LLaMA: `layers.17.self_attn.q_proj`, `layers.17.mlp.up_proj`, `embed_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from dqt_dist.config import Config
from dqt_dist.layers.bitnet import ColumnParallelBitLinear, RowParallelBitLinear
from dqt_dist.layers.language_model import LlamaModel
from dqt_dist.layers.low_bit_embedding import LowBitEmbedding, LowBitHead
from dqt_dist.layers.spec import SubNormLinear, block_spec
from dqt_dist.layers.transformer_config import LlamaTransformerConfig
from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout, normal
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.scale import WeightStatistics, choose_scale
from dqt_dist.parallel import megatron_cpu
from dqt_dist.parallel.groups import Group, Groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# training.recompute in Megatron's words.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "block"},
}

# Weights drawn at once at initialisation, by device: a few int64 temporaries of 32 MiB each, of 512 MiB on a GPU, where a model of
# 40 B weights would otherwise take millions of launches.
INIT_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}


@dataclass(frozen=True)
class Parameter:
    """A high-precision parameter and what it is of the model."""

    tensor: nn.Parameter
    layout: ShardLayout
    """Coordinates of its rows; a vector is a matrix with one column."""
    replicated: bool
    """The same values on every tensor-parallel rank (norms)."""


def transformer_config(config: Config, on_cpu: bool) -> LlamaTransformerConfig:
    """Megatron's view of the run."""
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.quantization.dtype]
    recompute = dict(RECOMPUTE[config.training.recompute])
    if config.training.recompute == "full":
        recompute["recompute_num_layers"] = config.recompute_layers
    # SwiGLU of the methods without low-bit codes: Megatron's own fused one, which torch.compile makes.
    fused_swiglu = not on_cpu and config.quantization.method != "dqt"
    return LlamaTransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.hidden_size // model.num_attention_heads,
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
        # Values come from `initialize`, which knows the logical coordinates.
        perform_initialization=False,
        # gloo has no batched point-to-point calls.
        batch_p2p_comm=not on_cpu,
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
    )


def silu_of_half(gate: Tensor) -> Tensor:
    """SiLU of a strided half of gate|up, for Megatron's unfused SwiGLU; see kernels/quantize.py `_halves` for why it is copied."""
    return F.silu(gate.contiguous())


def build_model(config: Config, groups: Groups) -> nn.ModuleList:
    """The model chunks of this rank, in pipeline order, on `groups.device`, with initial values."""
    on_cpu = groups.device.type == "cpu"
    megatron_config = transformer_config(config, on_cpu)
    chunks = nn.ModuleList()
    with megatron_cpu.cuda_or_cpu():
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
                position_embedding_type="none",  # it is inside attention
                vp_stage=virtual_stage,
            )
            # Megatron has a number of blocks for "full" only.
            for layer in chunk.decoder.layers[config.recompute_layers :]:
                layer.recompute_mlp = False
            if config.quantization.embeddings:
                _quantize_embeddings(chunk, megatron_config, config, groups)
            chunks.append(chunk.to(groups.device))
    assign_layouts(chunks, config, groups.tensor)
    initialize(chunks, config, groups.tensor)
    return chunks


def _quantize_embeddings(
    chunk: GPTModel, megatron_config: LlamaTransformerConfig, config: Config, groups: Groups
) -> None:
    """Puts low-bit modules in the place of embedding and head."""
    vocabulary = config.model.vocab_size
    if chunk.pre_process:
        chunk.embedding.word_embeddings = LowBitEmbedding(megatron_config, vocabulary, groups.tensor, groups.device)
    if chunk.post_process:
        hidden = config.model.hidden_size
        chunk.output_layer = LowBitHead(hidden, vocabulary, config=megatron_config, tp_group=groups.tensor)


# ---- coordinates ----


def _columns_split(matrix: LogicalMatrix, group: Group) -> ShardLayout:
    columns = matrix.columns // group.size()
    return ShardLayout((matrix,), (RowBlock(0, 0, matrix.rows),), columns, group.rank() * columns)


def _rows_split(group: Group, *matrices: LogicalMatrix) -> ShardLayout:
    """Matrices stacked one after the other, each contributing this rank's share of its rows."""
    blocks = [
        RowBlock(i, group.rank() * (m.rows // group.size()), m.rows // group.size()) for i, m in enumerate(matrices)
    ]
    return ShardLayout(matrices, tuple(blocks), matrices[0].columns)


def _qkv_layout(config: Config, name: str, group: Group) -> ShardLayout:
    """Megatron interleaves by query group: its query heads, then its key head, then its value head."""
    model = config.model
    head = model.hidden_size // model.num_attention_heads
    queries = model.num_attention_heads // model.num_query_groups * head
    matrices = (
        LogicalMatrix(f"{name}.q_proj", model.hidden_size, model.hidden_size),
        LogicalMatrix(f"{name}.k_proj", model.num_query_groups * head, model.hidden_size),
        LogicalMatrix(f"{name}.v_proj", model.num_query_groups * head, model.hidden_size),
    )
    local_groups = model.num_query_groups // group.size()
    blocks = []
    for query_group in range(group.rank() * local_groups, (group.rank() + 1) * local_groups):
        blocks.append(RowBlock(0, query_group * queries, queries))
        blocks.append(RowBlock(1, query_group * head, head))
        blocks.append(RowBlock(2, query_group * head, head))
    return ShardLayout(matrices, tuple(blocks), model.hidden_size)


def _linear_layouts(layer: TransformerLayer, config: Config, group: Group) -> Iterator[tuple[nn.Module, ShardLayout]]:
    """The four fused linears of a layer with their coordinates."""
    hidden, ffn = config.model.hidden_size, config.model.ffn_hidden_size
    name = f"layers.{layer.layer_number - 1}"
    attention, mlp = layer.self_attention, layer.mlp
    yield attention.linear_qkv, _qkv_layout(config, f"{name}.self_attn", group)
    yield (
        _inner(attention.linear_proj),
        _columns_split(LogicalMatrix(f"{name}.self_attn.o_proj", hidden, hidden), group),
    )
    gate, up = (LogicalMatrix(f"{name}.mlp.{part}_proj", ffn, hidden) for part in ("gate", "up"))
    yield mlp.linear_fc1, _rows_split(group, gate, up)
    yield _inner(mlp.linear_fc2), _columns_split(LogicalMatrix(f"{name}.mlp.down_proj", hidden, ffn), group)


def _inner(linear: nn.Module) -> nn.Module:
    inner = linear.linear if isinstance(linear, SubNormLinear) else linear
    assert isinstance(inner, nn.Module)
    return inner


def _set(parameter: nn.Parameter | LowBitMatrix, layout: ShardLayout, replicated: bool = False) -> None:
    if isinstance(parameter, LowBitMatrix):
        parameter.assign(layout)
        return
    parameter.description = Parameter(parameter, layout, replicated)  # type: ignore[attr-defined]
    # DeepSpeed and Megatron look for this name.
    parameter.tensor_model_parallel = not replicated  # type: ignore[attr-defined]


def _set_vector(parameter: nn.Parameter, name: str, rows: int, group: Group | None = None) -> None:
    vector = LogicalMatrix(name, rows, 1)
    if group is None:
        _set(parameter, ShardLayout((vector,), (RowBlock(0, 0, rows),), 1), replicated=True)
    else:
        _set(parameter, _rows_split(group, vector))


def assign_layouts(chunks: nn.ModuleList, config: Config, group: Group) -> None:
    """Tells every low-bit matrix and every parameter which part of the model it is. `group` is the TP group."""
    hidden, ffn, vocabulary = config.model.hidden_size, config.model.ffn_hidden_size, config.model.vocab_size
    for chunk in chunks:
        if chunk.pre_process:
            weight = chunk.embedding.word_embeddings.weight
            _set(weight, _rows_split(group, LogicalMatrix("embed_tokens", vocabulary, hidden)))
        for layer in cast(Iterable[TransformerLayer], chunk.decoder.layers):
            _assign_layer(layer, config, group, hidden, ffn)
        if chunk.post_process:
            _set_vector(chunk.decoder.final_layernorm.weight, "norm", hidden)
            _set(chunk.output_layer.weight, _rows_split(group, LogicalMatrix("lm_head", vocabulary, hidden)))


def _assign_layer(layer: TransformerLayer, config: Config, group: Group, hidden: int, ffn: int) -> None:
    name = f"layers.{layer.layer_number - 1}"
    for linear, layout in _linear_layouts(layer, config, group):
        _set(linear.weight, layout)
        if isinstance(linear, ColumnParallelBitLinear | RowParallelBitLinear):
            linear.layout = layout
    input_norm, ffn_norm = _norm_weights(layer, config)
    _set_vector(input_norm, f"{name}.input_layernorm", hidden)
    _set_vector(ffn_norm, f"{name}.post_attention_layernorm", hidden)
    if config.model.sub_norm:
        attention_norm, ffn_norm = layer.self_attention.linear_proj.norm, layer.mlp.linear_fc2.norm
        _set_vector(attention_norm.weight, f"{name}.self_attn.attn_sub_norm", hidden, group)
        _set_vector(ffn_norm.weight, f"{name}.mlp.ffn_sub_norm", ffn, group)


def _norm_weights(layer: TransformerLayer, config: Config) -> tuple[nn.Parameter, nn.Parameter]:
    """Of the norms before attention and before the feed-forward half; low-bit modules have them inside."""
    if config.quantization.method != "dqt":
        return layer.input_layernorm.weight, layer.pre_mlp_layernorm.weight
    feed_forward = layer.mlp.linear_fc1 if config.model.sub_norm else layer.mlp
    return layer.self_attention.linear_qkv.norm_weight, feed_forward.norm_weight


def low_bit_matrices(chunks: nn.Module) -> list[LowBitMatrix]:
    """All low-bit shards of this rank, in model order."""
    return [module for module in chunks.modules() if isinstance(module, LowBitMatrix)]


def parameters(chunks: nn.Module) -> list[Parameter]:
    """All high-precision parameters of this rank, in model order."""
    return [parameter.description for parameter in chunks.parameters()]  # type: ignore[attr-defined]


# ---- initial values ----


def _row_chunks(layout: ShardLayout, device: torch.device) -> Iterator[tuple[int, int]]:
    rows_at_once = max(1, INIT_CHUNK[device.type] // layout.columns)
    for start in range(0, layout.rows, rows_at_once):
        yield start, min(start + rows_at_once, layout.rows)


@torch.no_grad()
def initialize(chunks: nn.ModuleList, config: Config, group: Group) -> None:
    """Normal weights of standard deviation init_std, norms 1, bit-identical in every layout; low-bit ones quantised."""
    seed, std = config.training.seed, config.model.init_std
    for parameter in parameters(chunks):
        if parameter.layout.columns == 1:
            parameter.tensor.fill_(1.0)
            continue
        for start, stop in _row_chunks(parameter.layout, parameter.tensor.device):
            parameter.tensor[start:stop] = normal(seed, parameter.layout, start, stop, parameter.tensor.device) * std
    for weight in low_bit_matrices(chunks):
        _initialize_low_bit(weight, config, group)


def _initialize_low_bit(weight: LowBitMatrix, config: Config, group: Group) -> None:
    layout, device = weight.layout, weight.codes.device
    assert layout is not None
    seed, std = config.training.seed, config.model.init_std
    statistics: list[WeightStatistics | None] = [None] * len(layout.matrices)
    for start, stop in _row_chunks(layout, device):
        drawn = normal(seed, layout, start, stop, device) * std
        row_matrix = weight.row_matrix[start:stop]
        for index in range(len(layout.matrices)):
            part = WeightStatistics.of(drawn[row_matrix == index], std)
            known = statistics[index]
            statistics[index] = part if known is None else known.merge(part)
    weight.scale.copy_(_scales([s for s in statistics if s is not None], weight, config, group))
    for start, stop in _row_chunks(layout, device):
        drawn = normal(seed, layout, start, stop, device) * std
        weight.set_weights(drawn, start)


def _scales(statistics: list[WeightStatistics], weight: LowBitMatrix, config: Config, group: Group) -> Tensor:
    """The scale of each logical matrix from the parts of all TP ranks; integer sums, so the order does not matter."""
    sums = torch.stack([torch.stack([s.count, s.abs_sum, s.square_sum]) for s in statistics])
    largest = torch.stack([s.abs_max for s in statistics])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    quantization = config.quantization
    whole = [
        WeightStatistics(statistics[0].unit, row[0], row[1], row[2], abs_max)
        for row, abs_max in zip(sums, largest, strict=True)
    ]
    scales = [
        choose_scale(
            s,
            weight.grid,
            quantization.scale_rule,
            sigmas=quantization.scale_sigmas,
            power_of_two=quantization.scale_power_of_two,
        )
        for s in whole
    ]
    return torch.tensor(scales, device=weight.codes.device)
