"""Describes a run before it starts: processes, batch, and the memory of one rank.

Parameters of a block of hidden size H, feed-forward size F, heads of width d, A heads and G key/value groups:

    q_proj, o_proj        2 * H * A*d
    k_proj, v_proj        2 * H * G*d
    gate, up, down        3 * H * F
    norms                 2 * H     (with sub-norms: + A*d + F)

Tensor parallelism splits the linears and the sub-norms, not the other norms. The first pipeline stage also holds the
embedding, the last one the head and the final norm. The estimate counts weights, gradients, masters and moments.
Activations and scratch memory come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from dqt_dist.config import (
    DTYPE_BYTES,
    STATE_BLOCK,
    Bits,
    Config,
    process_grid,
)
from dqt_dist.lowbit.grid import make_grid


@dataclass(frozen=True)
class RankWeights:
    """Number of weights that a rank holds."""

    linear: int
    """In the linears of the rank's blocks. With method dqt these weights are low-bit."""
    other: int
    """In embeddings, head and norms."""


def largest_rank(config: Config) -> RankWeights:
    """Weights of one tensor-parallel rank of the pipeline stage that holds the most weights."""
    model, parallel = config.model, config.parallel
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    num_layers = model.num_layers // parallel.pipeline
    linear = num_layers * model.linear_weights_per_block // parallel.tensor
    norms = num_layers * (2 * hidden + ((hidden + ffn) // parallel.tensor if model.sub_norm else 0))
    vocabulary_matrix = model.vocab_size * hidden // parallel.tensor
    if parallel.pipeline == 1:
        return RankWeights(linear, norms + 2 * vocabulary_matrix + hidden)
    return RankWeights(linear, norms + vocabulary_matrix + hidden)


@dataclass(frozen=True)
class RankBytes:
    """Memory of the largest rank, in bytes, without activations. Assumes that rows and parameters divide evenly."""

    weights: int
    """Weights that the model computes with."""
    gradients: int
    """At the largest, without the few in flight. From ZeRO 1 on the owned part, where gradients leave in every backward
    pass; else the sums over micro-batches, which are whole. With fused_backward none of the low-bit weights."""
    masters: int
    latents: int
    moments: int
    on_host: bool
    """Whether masters, latents and moments lie in the host's memory (offload_optimizer)."""


def rank_bytes(config: Config, data_parallel_size: int) -> tuple[RankBytes, RankBytes]:
    """Memory of the low-bit weights, and of all other weights. Without low-bit weights the first is all zeros."""
    counts, stage, quantization = largest_rank(config), config.zero_stage, config.quantization
    linear = counts.linear if quantization.method == "dqt" else 0
    if quantization.embeddings:
        matrices = 2 if config.parallel.pipeline == 1 else 1
        linear += matrices * config.model.vocab_size * config.model.hidden_size // config.parallel.tensor
    other = counts.linear + counts.other - linear
    compute_bytes, gradient_bytes = DTYPE_BYTES[quantization.dtype], DTYPE_BYTES[config.optimizer.gradient_dtype]

    num_micro_batches = config.training.global_batch_size // (config.training.micro_batch_size * data_parallel_size)
    whole_gradients = num_micro_batches > 1 and config.optimizer.gradient_reduction == "step"

    def share(size: int, from_stage: int) -> int:
        return size // data_parallel_size if stage >= from_stage else size

    def gradients(weights: int) -> int:
        return gradient_bytes * weights if whole_gradients else share(gradient_bytes * weights, 1)

    low_bit = RankBytes(
        share(_packed_bytes(linear, quantization.bits), 3),
        0 if config.optimizer.fused_backward else gradients(linear),
        0,
        share(0 if quantization.latent_bits is None else _packed_bytes(linear, quantization.latent_bits), 1),
        _low_bit_moments(linear, config, data_parallel_size if stage >= 1 else 1),
        config.offloads_optimizer,
    )
    # In stage 0 fp32 parameters are their own masters. DeepSpeed's stages 1 and 2 copy fp32 parameters, stage 3 does
    # not.
    own_masters = compute_bytes == 4 and stage in (0, 3)
    high_precision = RankBytes(
        share(compute_bytes * other, 3),
        gradients(other),
        0 if own_masters else share(4 * other, 1),
        0,
        share(8 * other, 1),
        config.offloads_optimizer,
    )
    return low_bit, high_precision


def _packed_bytes(weights: int, bits: Bits) -> int:
    """Bytes of `weights` codes or latents of `bits` bits."""
    return weights * make_grid(bits).storage_bits // 8


def _low_bit_moments(weights: int, config: Config, owners: int) -> int:
    """Bytes of the moments of `weights` low-bit weights whose rows are divided over `owners` ranks."""
    optimizer = config.optimizer
    num_moments = (1 if optimizer.beta1 else 0) + (optimizer.second_moment == "full")
    # With 8 bits a moment also has one exponent per block.
    per_moment = 4 * weights if optimizer.state_bits == 32 else weights + weights // STATE_BLOCK
    rows, others = _means(config) if weights and optimizer.second_moment == "factored" else (0, 0)
    return num_moments * per_moment // owners + 4 * (rows // owners + others)


def _means(config: Config) -> tuple[int, int]:
    """Numbers of a factored second moment on the largest rank: one per row, which owners divide; and one per column and
    one per matrix, which they do not."""
    model, tensor = config.model, config.parallel.tensor
    shapes = list(model.linear_shapes().items()) * (model.num_layers // config.parallel.pipeline)
    if config.quantization.embeddings:
        shapes += [("vocabulary", (model.vocab_size, model.hidden_size))] * (2 if config.parallel.pipeline == 1 else 1)
    rows = others = 0
    for name, (out_features, in_features) in shapes:
        splits_columns = name in ("self_attn.o_proj", "mlp.down_proj")
        rows += out_features // (1 if splits_columns else tensor)
        others += in_features // (tensor if splits_columns else 1) + 1
    return rows, others


def _format_bytes(size: RankBytes) -> str:
    parts = {"weights": size.weights, "gradients": size.gradients, "masters": size.masters}
    parts |= ({"latents": size.latents} if size.latents else {}) | {"moments": size.moments}
    host = " (all but weights and gradients on the host)" if size.on_host else ""
    return ", ".join(f"{name} {value / 2**30:,.2f}" for name, value in parts.items()) + f" GiB{host}"


def describe(config: Config, world_size: int) -> str:
    """The description as text. Raises `UserError` when the config does not fit `world_size` processes."""
    arrangement = process_grid(config, world_size)
    model, quantization, training = config.model, config.quantization, config.training
    weights = largest_rank(config)
    low_bit, high_precision = rank_bytes(config, arrangement.data)
    kind = f"{make_grid(quantization.bits).storage_bits}-bit codes" if low_bit.weights else quantization.compute
    kind += f" of {quantization.latent_bits}-bit latents" if low_bit.latents else ""
    tokens = training.global_batch_size * model.seq_length
    interleaved = f", {arrangement.virtual_pipeline} chunks a stage" if arrangement.virtual_pipeline else ""
    lines = [
        f"processes       {world_size} = tensor {arrangement.tensor} * pipeline {arrangement.pipeline}{interleaved}"
        f" * data {arrangement.data}, ZeRO stage {config.zero_stage}",
        f"batch           {training.global_batch_size} samples = data {arrangement.data} * micro batch "
        f"{training.micro_batch_size} * {arrangement.num_microbatches} micro-batches; {tokens:,} tokens a step",
        f"length          {training.steps:,} steps, {training.steps * tokens:,} tokens",
        f"method          {quantization.method}, compute {quantization.compute}, activations {quantization.activation}",
        f"largest rank    {weights.linear:,} weights in linears as {kind}, {weights.other:,} in embedding, head and "
        "norms",
    ]
    if low_bit.weights:
        lines.append(f"  low-bit       {_format_bytes(low_bit)}")
    lines += [
        f"  others        {_format_bytes(high_precision)}",
        "                (activations and scratch come on top)",
        f"run folder      {config.checkpoint.dir}",
    ]
    return "\n".join(lines)
