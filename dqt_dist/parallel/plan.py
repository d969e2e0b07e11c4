"""What a run will look like, told before it starts: layout, batch, and the weights of one rank.

Parameters of a block of hidden size H, feed-forward size F, heads of width d, A heads and G key/value groups:

    q_proj, o_proj        2 * H * A*d
    k_proj, v_proj        2 * H * G*d
    gate, up, down        3 * H * F
    norms                 2 * H     (with sub-norms: + A*d + F)

The linears and the sub-norms are cut by tensor parallel rank, the other norms are not. The first pipeline stage adds the embedding, the last
the head and the final norm. Only stored weights are counted: gradients, moments and activations come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from dqt_dist.config import Config, layout
from dqt_dist.lowbit.grid import make_grid

COMPUTE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class RankWeights:
    """Number of weights a rank holds."""

    linear: int
    """In the linears of its blocks, which are the low-bit ones."""
    other: int
    """In embeddings, head and norms."""


def largest_rank(config: Config) -> RankWeights:
    """Weights of the pipeline stage that holds most, on one tensor-parallel rank."""
    model, parallel = config.model, config.parallel
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    key_value = hidden // model.num_attention_heads * model.num_query_groups
    num_layers = model.num_layers // parallel.pipeline
    linear = num_layers * (2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * ffn) // parallel.tensor
    norms = num_layers * (2 * hidden + ((hidden + ffn) // parallel.tensor if model.sub_norm else 0))
    vocabulary_matrix = model.vocab_size * hidden // parallel.tensor
    if parallel.pipeline == 1:
        return RankWeights(linear, norms + 2 * vocabulary_matrix + hidden)
    return RankWeights(linear, norms + vocabulary_matrix + hidden)


def describe(config: Config, world_size: int) -> str:
    """A few lines of text for people; raises `UserError` when the config does not fit `world_size` processes."""
    arrangement = layout(config, world_size)
    model, quantization, training = config.model, config.quantization, config.training
    weights = largest_rank(config)
    other_bytes = COMPUTE_BYTES[quantization.compute] * weights.other
    if quantization.method == "dqt":
        storage_bits = make_grid(quantization.bits).storage_bits
        linear_bytes, kind = weights.linear * storage_bits // 8, f"{storage_bits}-bit codes"
    else:
        linear_bytes, kind = weights.linear * COMPUTE_BYTES[quantization.compute], quantization.compute
    tokens = training.global_batch_size * model.seq_length
    interleaved = f", {arrangement.virtual_pipeline} chunks a stage" if arrangement.virtual_pipeline else ""
    return "\n".join(
        [
            f"processes       {world_size} = tensor {arrangement.tensor} * pipeline {arrangement.pipeline}{interleaved}"
            f" * data {arrangement.data}, ZeRO stage {config.zero_stage}",
            f"batch           {training.global_batch_size} samples = data {arrangement.data} * micro batch "
            f"{training.micro_batch_size} * {arrangement.num_microbatches} micro-batches; {tokens:,} tokens a step",
            f"length          {training.steps:,} steps, {training.steps * tokens:,} tokens",
            f"method          {quantization.method}, compute {quantization.compute}, "
            f"activations {quantization.activation}",
            f"largest rank    {weights.linear:,} weights in linears, {linear_bytes:,} bytes as {kind}",
            f"                {weights.other:,} in embedding, head and norms, {other_bytes:,} bytes as "
            f"{quantization.compute}",
            "                (gradients, float masters, optimizer state and activations come on top)",
            f"run folder      {config.checkpoint.dir}",
        ]
    )
