"""Bytes of what one rank holds between steps, and of its gradients: exact, from the shapes of its tensors.

Matrices of a block of hidden size H, feed-forward size F, heads of width d, A heads and G key/value groups:

    q|k|v      [(A + 2 G) d, H]    3 logical matrices in one
    o          [H, A d]
    gate|up    [2 F, H]            2 logical matrices in one
    down       [H, F]
    norms      2 * H               (with sub-norms: + A d + F)

Tensor parallelism splits the matrices and the sub-norms, not the other norms. The first pipeline stage also holds the
embedding, the last one the head and the final norm. A rank owns the first ceil(rows / D) rows of a low-bit matrix;
DeepSpeed divides the other weights. The numbers are those of the first tensor- and data-parallel rank of a stage, which
holds at least as much as any other.
"""

from __future__ import annotations

from dataclasses import dataclass

from dqt_dist.config import (
    DTYPE_BYTES,
    STATE_BLOCK,
    Config,
    OptimizerConfig,
    uses_cuda_graph,
)
from dqt_dist.lowbit.grid import make_grid

# DeepSpeed 0.19.8 pads a flat group of parameters to a multiple of this and the number of ranks
# (runtime/zero/stage_1_and_2.py, nccl_start_alignment_factor).
FLAT_ALIGNMENT = 2
# Parameters of up to this number of elements stay whole in stage 3 (DeepSpeed 0.19.8, runtime/zero/config.py). The key
# of deepspeed.zero_optimization that changes it.
PERSISTENCE_KEY, PERSISTENCE_THRESHOLD = "stage3_param_persistence_threshold", 100_000


@dataclass(frozen=True)
class Matrix:
    """A weight of one rank: its shard [rows, columns]. A norm has one column."""

    rows: int
    columns: int
    logical: int = 1
    """Logical matrices in the shard, each with its own scale."""
    splits_columns: bool = False
    """Whether tensor parallelism splits the columns; else it splits the rows, or nothing."""
    in_block: bool = True
    """Whether the weight is a linear of a block, not an embedding, a head or a norm."""

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    def owned_rows(self, data_parallel_size: int) -> int:
        """Rows of the first of so many owners (`row_bounds` in parallel/row_sharding.py)."""
        return -(-self.rows // data_parallel_size)


def last_stage(config: Config) -> int:
    """Number of the last pipeline stage."""
    return config.parallel.pipeline - 1


def block_linears(config: Config) -> list[Matrix]:
    """The linears of one block: q|k|v, o, gate|up, down."""
    model, tensor = config.model, config.parallel.tensor
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    return [
        Matrix((hidden + 2 * model.kv_hidden_size) // tensor, hidden, 3),
        Matrix(hidden, hidden // tensor, splits_columns=True),
        Matrix(2 * ffn // tensor, hidden, 2),
        Matrix(hidden, ffn // tensor, splits_columns=True),
    ]


def stage_weights(config: Config, stage: int) -> tuple[list[Matrix], list[Matrix]]:
    """The low-bit matrices and the other weights of pipeline stage `stage`, in model order but for the norms."""
    model, tensor, quantization = config.model, config.parallel.tensor, config.quantization
    num_blocks = model.num_layers // config.parallel.pipeline
    linears = block_linears(config) * num_blocks
    vocabulary = [Matrix(model.vocab_size // tensor, model.hidden_size, in_block=False)]
    ends = vocabulary * ((stage == 0) + (stage == last_stage(config)))
    norms = [Matrix(model.hidden_size, 1, in_block=False)] * (2 * num_blocks + (stage == last_stage(config)))
    if model.sub_norm:
        widths = (model.hidden_size // tensor, model.ffn_hidden_size // tensor)
        norms += [Matrix(width, 1, in_block=False) for width in widths] * num_blocks
    low_bit = (linears if quantization.method == "dqt" else []) + (ends if quantization.embeddings else [])
    other = (linears if quantization.method != "dqt" else []) + ([] if quantization.embeddings else ends)
    return low_bit, other + norms


@dataclass(frozen=True)
class RankWeights:
    """Number of weights that a rank holds."""

    linear: int
    """In the linears of the rank's blocks. With method dqt these weights are low-bit."""
    other: int
    """In embeddings, head and norms."""


def largest_rank(config: Config) -> RankWeights:
    """Weights of one tensor-parallel rank of the pipeline stage that holds the most weights, the last one."""
    weights = [weight for kind in stage_weights(config, last_stage(config)) for weight in kind]
    linear = sum(weight.numel for weight in weights if weight.in_block)
    return RankWeights(linear, sum(weight.numel for weight in weights) - linear)


@dataclass(frozen=True)
class RankBytes:
    """Memory of a rank, in bytes, without activations and scratch."""

    weights: int
    """Weights that the model computes with."""
    scales: int
    """Of low-bit matrices: scales, the matrix of each row, and what is kept of each row."""
    gradients_before: int
    """Gradients that exist when the last backward pass of a step begins: the sums over earlier micro-batches."""
    gradients_after: int
    """Gradients that wait for the update: from ZeRO 1 on the owned part; in stage 0 all, and with a CUDA graph beside
    them the rank's own part, which it writes. With fused_backward none of the low-bit weights."""
    masters: int
    latents: int
    moments: int
    """A number per weight, without `means`."""
    means: int
    """Of a factored second moment: per owned row, and per column and per matrix, which owners do not divide. They stay
    on the device."""
    on_host: bool
    """Whether masters, latents and moments lie in the host's memory (offload_optimizer)."""

    @property
    def gradients(self) -> int:
        """Gradients at the largest, without the few in flight."""
        return max(self.gradients_before, self.gradients_after)

    @property
    def on_device(self) -> int:
        """What the device holds between steps, without gradients."""
        offloaded = 0 if self.on_host else self.masters + self.latents + self.moments
        return self.weights + self.scales + self.means + offloaded


def rank_bytes(config: Config, data_parallel_size: int, stage: int | None = None) -> tuple[RankBytes, RankBytes]:
    """Memory of the low-bit weights, and of all other weights, in pipeline stage `stage`, by default the last one.

    Without low-bit weights the first is all zeros.
    """
    low_bit, other = stage_weights(config, last_stage(config) if stage is None else stage)
    return _low_bit_bytes(config, low_bit, data_parallel_size), _other_bytes(config, other, data_parallel_size)


def _low_bit_bytes(config: Config, weights: list[Matrix], num_owners: int) -> RankBytes:
    quantization, optimizer = config.quantization, config.optimizer
    owners = num_owners if config.zero_stage else 1
    owned = [(weight.owned_rows(owners), weight.columns) for weight in weights]
    packed_columns = make_grid(quantization.bits).packed_columns
    latents = 0
    if quantization.latent_bits is not None:
        latent_columns = make_grid(quantization.latent_bits).packed_columns
        latents = sum(rows * latent_columns(columns) for rows, columns in owned)
    held_rows = [rows for rows, _ in owned] if config.zero_stage == 3 else [weight.rows for weight in weights]
    # Per matrix an fp32 scale, per row a byte and the row's scale in fp32 (lowbit/matrix.py). Latents have a scale of
    # their own, and each row then keeps two more numbers.
    numbers_of_row, scales_of_matrix = (1, 1) if quantization.latent_bits is None else (3, 2)
    before, after = _gradients(
        config,
        sum(weight.numel for weight in weights),
        sum(rows * columns for rows, columns in owned),
        sum(weight.owned_rows(num_owners) * weight.columns for weight in weights),
        num_owners,
    )
    return RankBytes(
        weights=sum(rows * packed_columns(weight.columns) for rows, weight in zip(held_rows, weights, strict=True)),
        scales=sum(
            weight.rows * (1 + 4 * numbers_of_row) + 4 * scales_of_matrix * weight.logical for weight in weights
        ),
        gradients_before=before,
        gradients_after=0 if optimizer.fused_backward else after,
        masters=0,
        latents=latents,
        moments=sum(_low_bit_moments(rows * columns, optimizer) for rows, columns in owned),
        means=sum(_means(weight, rows, optimizer) for weight, (rows, _) in zip(weights, owned, strict=True)),
        on_host=config.offloads_optimizer,
    )


def _low_bit_moments(weights: int, optimizer: OptimizerConfig) -> int:
    """Bytes of the moments of so many owned weights."""
    # Adafactor goes without a first moment where it has no decay.
    has_first = optimizer.name == "adamw" or bool(optimizer.low_bit_beta1)
    num_moments = has_first + (optimizer.second_moment == "full")
    # With 8 bits a moment also has one exponent per block.
    return num_moments * (4 * weights if optimizer.state_bits == 32 else weights + weights // STATE_BLOCK)


def _means(weight: Matrix, owned_rows: int, optimizer: OptimizerConfig) -> int:
    """Bytes of the fp32 means of a factored second moment (optim/factored.py)."""
    if optimizer.second_moment == "full":
        return 0
    return 4 * (owned_rows + weight.logical * (weight.columns + 1))


def _other_bytes(config: Config, weights: list[Matrix], data_parallel_size: int) -> RankBytes:
    """Of the weights that DeepSpeed manages: fp32 masters and moments."""
    stage, compute_bytes = config.zero_stage, DTYPE_BYTES[config.quantization.dtype]
    total = sum(weight.numel for weight in weights)
    # DeepSpeed's groups: matrices of blocks, other matrices, norms (optim/engine.py).
    groups = [
        sum(weight.numel for weight in weights if (weight.in_block, weight.columns == 1) == kind)
        for kind in ((True, False), (False, False), (False, True))
    ]
    if stage == 0:
        in_memory, owned, computed_with = total, total, total
    elif stage < 3:
        unit = FLAT_ALIGNMENT * data_parallel_size
        padded = [-(-numel // unit) * unit for numel in groups]
        in_memory = sum(padded) // data_parallel_size
        owned = sum(min(numel, size // data_parallel_size) for numel, size in zip(groups, padded, strict=True))
        computed_with = sum(padded)
    else:
        in_memory = owned = sum(-(-weight.numel // data_parallel_size) for weight in weights)
        threshold = config.zero.section.get(PERSISTENCE_KEY, PERSISTENCE_THRESHOLD)
        computed_with = owned + sum(weight.numel for weight in weights if weight.numel <= threshold)
    # In stage 0 fp32 parameters are their own masters. DeepSpeed's stages 1 and 2 copy fp32 parameters, stage 3 does
    # not.
    own_masters = compute_bytes == 4 and stage in (0, 3)
    summed = sum(-(-weight.numel // data_parallel_size) for weight in weights) if stage == 0 else owned
    before, after = _gradients(config, total, owned, summed, data_parallel_size)
    return RankBytes(
        weights=compute_bytes * computed_with,
        scales=0,
        gradients_before=before,
        gradients_after=after,
        masters=0 if own_masters else 4 * in_memory,
        latents=0,
        moments=8 * in_memory,
        means=0,
        on_host=config.offloads_optimizer,
    )


def _gradients(config: Config, total: int, updated: int, summed: int, data_parallel_size: int) -> tuple[int, int]:
    """Bytes of gradients before the last backward pass and after it.

    Of `total` weights this rank updates `updated`; it sums `summed` of them over the ranks.
    """
    gradient_bytes = DTYPE_BYTES[config.optimizer.gradient_dtype]
    if num_micro_batches(config, data_parallel_size) == 1:
        before = 0
    else:
        before = summed if config.optimizer.gradient_reduction == "micro_batch" else total
    # A CUDA graph keeps the sums that it has written while the gradients of all rows are gathered from them.
    gathers = config.zero_stage == 0 and data_parallel_size > 1
    after = updated + (summed if gathers and uses_cuda_graph(config) else 0)
    return gradient_bytes * before, gradient_bytes * after


def num_micro_batches(config: Config, data_parallel_size: int) -> int:
    """Forward and backward passes of one step on each data-parallel rank."""
    return config.training.global_batch_size // (config.training.micro_batch_size * data_parallel_size)
