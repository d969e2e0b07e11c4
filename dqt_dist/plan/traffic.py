"""Bytes that one rank sends in a step, by kind.

The kinds of parallel/collectives.py are exact: a rank counts the same in BYTES_SENT (tests/test_plan.py). Each
call is listed here as (kind, bytes of the full tensor, passes). Of n ranks each sends passes * bytes * (n - 1) / n, as
a ring would: one pass for a gather, a scatter or an all-to-all, two for an all-reduce.

    gradients           data parallel: each gradient to its owners, in stage 0 also back; sequence parallel: of norms
    codes               ZeRO 1 and 2: all rows after the update; ZeRO 3: before each use
    activation_maxima   tensor parallel: the largest magnitude of each token of a row-parallel input
    activations         tensor parallel: 8-bit inputs and gradients (sequence parallel), sums of products, the loss

Four more kinds are not counted by a run. They are computed with the same formulas:

    means               over owners and over tensor-parallel ranks: sums of squares for a factored second moment, sums
                        of |L| for a refit of the scales (in a step that has one)
    pipeline            between stages: outputs forward, gradients backward (tests/test_plan.py counts them too)
    megatron            tensor parallel: megatron-core's linears, embedding and head
    weights             ZeRO: DeepSpeed's gathers of ordinary weights
"""

from __future__ import annotations

from collections.abc import Iterator

from dqt_dist.config import DTYPE_BYTES, Config, ProcessGrid
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.plan.memory import Matrix, block_linears, last_stage, stage_weights

COUNTED = ("gradients", "codes", "activation_maxima", "activations")
"""Kinds that a run counts and logs."""
UNCOUNTED = ("means", "pipeline", "megatron", "weights")

Call = tuple[str, int, int]
"""(kind, bytes of the full tensor, passes)."""


def bytes_sent(config: Config, grid: ProcessGrid, stage: int | None = None) -> dict[str, int]:
    """Bytes by kind of a rank of pipeline stage `stage` (default: the last), first of its tensor and data ranks.

    The step is one after which ZeRO 3 knows the order of the layers: any but the first.
    """
    stage = last_stage(config) if stage is None else stage
    sent: dict[str, int] = dict.fromkeys((*COUNTED, *UNCOUNTED), 0)
    for part in (sent_to_data_ranks(config, grid, stage), sent_to_tensor_ranks(config, grid, stage)):
        for kind, count in part.items():
            sent[kind] += count
    for over_owners, over_tensor_ranks in (_sums_of_squares(config, grid, stage), _latent_sums(config, stage)):
        sent["means"] += _ring(over_owners, grid.data, 2) + _ring(over_tensor_ranks, grid.tensor, 2)
    sent["pipeline"] = _pipeline_bytes(config, grid, stage)
    return sent


def sent_to_data_ranks(config: Config, grid: ProcessGrid, stage: int) -> dict[str, int]:
    """Of `bytes_sent` what goes to data-parallel ranks, without the sums of a factored second moment."""
    sent: dict[str, int] = dict.fromkeys(("gradients", "codes", "weights"), 0)
    for kind, full, passes in _data_calls(config, grid, stage):
        sent[kind] += _ring(full, grid.data, passes)
    return sent


def sent_to_tensor_ranks(config: Config, grid: ProcessGrid, stage: int) -> dict[str, int]:
    """Of `bytes_sent` what goes to tensor-parallel ranks, without the sums of a factored second moment."""
    sent: dict[str, int] = dict.fromkeys(("gradients", "activation_maxima", "activations", "megatron"), 0)
    for times, calls in _tensor_calls(config, stage):
        for kind, full, passes in calls:
            sent[kind] += grid.num_microbatches * times * _ring(full, grid.tensor, passes)
    return sent


def _ring(full: int, num_ranks: int, passes: int = 1) -> int:
    return passes * full * (num_ranks - 1) // num_ranks


# ---- over data-parallel ranks ----


def _data_calls(config: Config, grid: ProcessGrid, stage: int) -> Iterator[Call]:
    low_bit, other = stage_weights(config, stage)
    yield from _gradient_calls(config, grid, low_bit, other)
    packed_columns = make_grid(config.quantization.bits).packed_columns
    gathered = [
        ("codes", matrix.owned_rows(grid.data) * grid.data * packed_columns(matrix.columns), 1) for matrix in low_bit
    ]
    if config.zero_stage in (1, 2):
        yield from gathered
    if config.zero_stage == 3 and low_bit:
        for index in _gathers_of_stage_3(config, grid, len(low_bit)):
            yield gathered[index]
    yield from _deepspeed_calls(config, grid, stage)


def _gradient_calls(config: Config, grid: ProcessGrid, low_bit: list[Matrix], other: list[Matrix]) -> Iterator[Call]:
    """Of ordinary weights every element may have another owner, of low-bit matrices every row."""
    element = DTYPE_BYTES[config.optimizer.gradient_dtype]
    exchanges = grid.num_microbatches if config.optimizer.gradient_reduction == "micro_batch" else 1
    for matrix in low_bit + other:
        for _ in range(exchanges):
            yield "gradients", matrix.numel * element, 1
    if config.zero_stage == 0:
        for matrix in low_bit:
            yield "gradients", matrix.owned_rows(grid.data) * grid.data * matrix.columns * element, 1
        for matrix in other:
            yield "gradients", -(-matrix.numel // grid.data) * grid.data * element, 1


def _gathers_of_stage_3(config: Config, grid: ProcessGrid, num_matrices: int) -> list[int]:
    """The matrices that parallel/code_shards.py gathers in a step, in order."""
    # stage_weights puts blocks first, then embedding and head. Stage 3 goes without a pipeline.
    per_block, num_blocks = len(block_linears(config)), config.model.num_layers
    blocks = [list(range(per_block * number, per_block * (number + 1))) for number in range(num_blocks)]
    embedding_and_head = list(range(per_block * num_blocks, num_matrices))
    forward = embedding_and_head[:1] + [index for block in blocks for index in block] + embedding_and_head[1:]
    backward = embedding_and_head[1:]  # the backward of an embedding does not read its codes
    for number in reversed(range(num_blocks)):
        again = _used_again(config, blocks[number]) if number < config.recompute_layers else []
        backward += [*again, *reversed(blocks[number])]
    return _gathers_of_uses((forward + backward) * grid.num_microbatches)


def _gathers_of_uses(uses: list[int]) -> list[int]:
    """What is gathered when matrices are used in the order `uses`, in every step after the first.

    A matrix that is used twice in a row is gathered once. The matrix that followed the last two the time before is
    gathered before it is asked for, and in vain where another follows this time: where blocks are computed again.
    """
    successor: dict[tuple[int, int], int] = {}
    gathered: list[int] = []
    for _ in range(2):
        gathered.clear()
        second_last, last, prefetched = -1, -1, None
        for index in uses:
            successor[second_last, last] = index
            if index != last:
                if prefetched != index:
                    gathered.append(index)
                prefetched = None
            second_last, last = last, index
            following = successor.get((second_last, index))
            if following is not None and following != index and prefetched is None:
                prefetched = following
                gathered.append(following)
    return gathered


def _used_again(config: Config, block: list[int]) -> list[int]:
    return {"none": [], "mlp": block[2:], "full": block}[config.training.recompute]


def _deepspeed_calls(config: Config, grid: ProcessGrid, stage: int) -> Iterator[Call]:
    if config.zero_stage == 0:
        return
    _, other = stage_weights(config, stage)
    full = DTYPE_BYTES[config.quantization.dtype] * sum(matrix.numel for matrix in other)
    # Stage 3 gathers in the forward and in the backward of each micro-batch. The small weights that it keeps whole are
    # gathered once a step; they are counted like the others.
    yield "weights", full, 1 if config.zero_stage < 3 else 2 * grid.num_microbatches


# ---- of a factored second moment ----


def _sums_of_squares(config: Config, grid: ProcessGrid, stage: int) -> tuple[int, int]:
    """Bytes of the int64 sums that owners of rows add up, and of those that tensor-parallel ranks add up."""
    optimizer, (low_bit, _) = config.optimizer, stage_weights(config, stage)
    if optimizer.second_moment == "full":
        return 0, 0
    owners = grid.data if config.zero_stage else 1
    over_owners = over_tensor_ranks = 0
    for matrix in low_bit:
        columns = matrix.logical * matrix.columns
        # Adafactor also sums the squares of each matrix's direction.
        rms = matrix.logical if optimizer.name == "adafactor" else 0
        over_owners += (columns + rms) if config.zero_stage else 0
        over_tensor_ranks += matrix.logical + rms + (matrix.owned_rows(owners) if matrix.splits_columns else columns)
    return 8 * over_owners, 8 * over_tensor_ranks


def _latent_sums(config: Config, stage: int) -> tuple[int, int]:
    """The same of the int64 sums of |L| from which scales are refitted."""
    if not config.quantization.scale_refit_interval:
        return 0, 0
    low_bit, _ = stage_weights(config, stage)
    sums = 8 * sum(matrix.logical for matrix in low_bit)
    return sums if config.zero_stage else 0, sums


# ---- over tensor-parallel ranks, for one micro-batch ----


def _tensor_calls(config: Config, stage: int) -> Iterator[tuple[int, list[Call]]]:
    """(number of times, calls)."""
    num_blocks = config.model.num_layers // config.parallel.pipeline
    num_again = config.recompute_layers * (config.parallel.virtual_pipeline or 1)
    attention, feed_forward = _HALVES[config.quantization.method](config)
    recomputed = {"none": [], "mlp": [feed_forward], "full": [attention, feed_forward]}[config.training.recompute]
    for forward, backward in (attention, feed_forward):
        yield num_blocks, forward + backward
    for forward, _ in recomputed:
        yield num_again, forward
    yield 1, list(_end_calls(config, stage))


Half = tuple[list[Call], list[Call]]
"""Calls of the forward and of the backward of one half of a block."""


def _low_bit_halves(config: Config) -> tuple[Half, Half]:
    sub_norm_sums: list[Call] = [("activations", 8 * _tokens(config), 2)] if config.model.sub_norm else []
    scale: list[Call] = []
    if config.quantization.activation != "none":
        scale = [("activation_maxima", 4 * _tokens(config), 2)]
    norm: list[Call] = [("gradients", 4 * config.model.hidden_size, 2)] if config.parallel.sequence else []
    forward = [*_operand(config), *sub_norm_sums, *scale, *_row_product(config)]
    backward = [*_row_gradient(config), *sub_norm_sums, *_operand(config), *_column_gradient(config), *norm]
    return (forward, backward), (forward, backward)


def _tokens(config: Config) -> int:
    return config.training.micro_batch_size * config.model.seq_length


def _hidden(config: Config, element: int) -> int:
    return _tokens(config) * config.model.hidden_size * element


def _operand(config: Config) -> list[Call]:
    """The input of a column-parallel linear, gathered along the sequence as codes with their scales."""
    if not config.parallel.sequence:
        return []
    if config.quantization.activation == "none":
        return [("activations", _hidden(config, DTYPE_BYTES[config.quantization.dtype]), 1)]
    return [("activations", _hidden(config, 1), 1), ("activations", 4 * _tokens(config), 1)]


def _row_product(config: Config) -> list[Call]:
    """The sum of a row-parallel product over ranks: int32 for int8 operands."""
    element = 4 if config.quantization.compute == "int8" else DTYPE_BYTES[config.quantization.dtype]
    return [("activations", _hidden(config, element), 1 if config.parallel.sequence else 2)]


def _row_gradient(config: Config) -> list[Call]:
    """The gradient of a row-parallel output, gathered along the sequence as products take it."""
    quantization = config.quantization
    if not config.parallel.sequence:
        return []
    if quantization.compute == "fp8" and quantization.weight_gradient == "fp8":
        return [("activations", _hidden(config, 1), 1), ("activations", 4 * _tokens(config), 1)]
    return [("activations", _hidden(config, DTYPE_BYTES[quantization.dtype]), 1)]


def _column_gradient(config: Config) -> list[Call]:
    element = DTYPE_BYTES[config.quantization.dtype]
    return [("activations", _hidden(config, element), 1 if config.parallel.sequence else 2)]


def _ordinary_halves(config: Config) -> tuple[Half, Half]:
    """Megatron's linears: a sum per direction or, with sequence parallelism, a gather and a scatter per direction and
    one more gather of the input."""
    model, element = config.model, DTYPE_BYTES[config.quantization.dtype]
    full = _hidden(config, element)
    norm: list[Call] = [("gradients", model.hidden_size * element, 2)] if config.parallel.sequence else []
    sub_norm_sums: list[Call] = [("activations", 8 * _tokens(config), 2)] if model.sub_norm else []
    megatron: list[Call] = [("megatron", full, 2)]
    again: list[Call] = [("megatron", full, 1)] if config.parallel.sequence else []
    forward, backward = [*sub_norm_sums, *megatron], [*sub_norm_sums, *megatron, *again, *norm]
    return (forward, backward), (forward, backward)


def _bitnet_halves(config: Config) -> tuple[Half, Half]:
    """As `_ordinary_halves`, with the sums for the scales of weights and the maxima of activations."""
    halves = []
    matrices = block_linears(config)
    maxima: list[Call] = []
    if config.quantization.activation != "none":
        maxima = [("activation_maxima", 4 * _tokens(config), 2)]
    for (forward, backward), pair in zip(_ordinary_halves(config), (matrices[:2], matrices[2:]), strict=True):
        scales: list[Call] = [("activations", 4 * matrix.logical, 2) for matrix in pair]
        halves.append(([*forward, *scales, *maxima], backward))
    return halves[0], halves[1]


_HALVES = {"dqt": _low_bit_halves, "none": _ordinary_halves, "bitnet": _bitnet_halves}


def _end_calls(config: Config, stage: int) -> Iterator[Call]:
    """Embedding, final norm, head and loss."""
    element, full = DTYPE_BYTES[config.quantization.dtype], _hidden(config, DTYPE_BYTES[config.quantization.dtype])
    sequence = config.parallel.sequence
    if stage == 0:
        # A sum of look-ups. With sequence parallelism it is scattered, and its gradient is gathered.
        yield "megatron", full, 2
    if stage != last_stage(config):
        return
    if sequence:
        yield "gradients", config.model.hidden_size * element, 2
    if config.quantization.embeddings:
        yield from [*_operand(config), *_operand(config), *_column_gradient(config)]
    else:
        # The gradient of the head's input; with sequence parallelism the input is gathered twice beside.
        yield "megatron", full, 3 if sequence else 2
    # The largest logit of each token, then the sum of exponentials and the label's logit.
    yield "activations", 4 * _tokens(config), 2
    yield "activations", 8 * _tokens(config), 2


# ---- between pipeline stages ----


def _pipeline_bytes(config: Config, grid: ProcessGrid, stage: int) -> int:
    chunks = config.parallel.virtual_pipeline or 1
    if grid.pipeline == 1:
        return 0
    own = _hidden(config, DTYPE_BYTES[config.quantization.dtype]) // (grid.tensor if config.parallel.sequence else 1)
    forward = chunks - (stage == last_stage(config))
    backward = chunks - (stage == 0)
    return grid.num_microbatches * own * (forward + backward)
