"""Bytes of activations: what the layers keep from the forward to the backward, counted tensor by tensor.

The tensors are those that each layer saves for its backward: `save_for_backward` of dqt_dist/layers/low_bit_linear.py,
low_bit_feed_forward.py, language_model.py and kernels/rope.py for method dqt; for the other methods those of torch's
rms_norm, attention and products and of megatron-core's SwiGLU. T tokens a micro-batch, e bytes a number, widths as in
memory.py; with sequence parallelism the tensors marked * have T / tensor tokens:

    attention half     dqt: x* H e and its scale*, q k v (H + 2 K) e, attention's output H e and A fp32 sums, a scale
                       none: x* H e and its root*, norm(x)* H e, q k v, attention's output, the sums
                       bitnet: as none, and the quantised output H e
    feed-forward half  dqt: x* H e and its scale*, gate|up 2 F e, a scale
                       none, bitnet: x* H e, its root*, norm(x)* H e, gate|up 2 F e, their product F e
    recompute mlp      of the feed-forward half stays: x*; without low-bit linears also its root* and norm(x)*
    recompute full     of a block stays: x*
    once               head and loss: x* H e, its root*, norm(x)* H e, logits V e and some numbers per token; token ids
    bitnet             the ternary copy of each weight, e bytes
    document masking   with attention for sequences of varying length, from 2 samples a micro-batch on: attention's
                       output H e once more, in the order of the next product; else once the mask, sequence e per token

tests/test_plan.py sums up the tensors that a real step saves. On a CPU torch's rms_norm and the unfused SwiGLU keep
more, which `on_gpu=False` counts. On GPUs the estimate agrees with docs/benchmarks/train_step.md
(tests/plan/test_measured.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from dqt_dist.config import DTYPE_BYTES, Config
from dqt_dist.plan.memory import block_linears, last_stage, num_micro_batches


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank."""

    kept: int
    """What exists at most when a backward pass begins, over all micro-batches under way, without `head`."""
    head: int
    """Of `head` and loss: freed before the backward of the blocks begins. 0 on stages without them."""
    block: int
    """Of one block with nothing to compute again, one micro-batch."""
    recomputed: int
    """What a backward pass computes again at once: a block's, a feed-forward half's, or nothing."""


@dataclass(frozen=True)
class _Half:
    """Bytes that one half of a block keeps for one micro-batch."""

    all: int
    checkpointed: int
    """When only the input is kept and the half is computed again."""


def _norm_bytes(config: Config, tokens: float, on_gpu: bool, width: int) -> float:
    """torch's rms_norm: its input and one root per token. On a CPU the input in fp32, and the normed input in fp32."""
    element = DTYPE_BYTES[config.quantization.dtype]
    return tokens * (width * (element if on_gpu else 8) + 4)


def _sub_norm_bytes(config: Config, tokens: int, width: int) -> int:
    """`ParallelRMSNorm`: its input in fp32 (a copy in bf16 runs), the normed input, a root; its result."""
    element = DTYPE_BYTES[config.quantization.dtype]
    copy = 4 * width if element != 4 else 0
    return tokens * (copy + 2 * width * element + 4)


def _halves(config: Config, on_gpu: bool) -> tuple[_Half, _Half]:
    model, parallel, quantization = config.model, config.parallel, config.quantization
    element, tensor = DTYPE_BYTES[quantization.dtype], parallel.tensor
    tokens = config.training.micro_batch_size * model.seq_length
    own_tokens = tokens // (tensor if parallel.sequence else 1)
    hidden, ffn = model.hidden_size, model.ffn_hidden_size // tensor
    attention_width = hidden // tensor
    heads = model.num_attention_heads // tensor
    scale = 4 if quantization.activation != "none" else 0
    low_bit, x = quantization.method == "dqt", own_tokens * hidden * element

    qkv = tokens * element * (attention_width + 2 * model.kv_hidden_size // tensor)
    attended = tokens * (attention_width * element + 4 * heads)
    if low_bit:
        norm, scale_x = 0, scale * own_tokens
        attention = x + scale_x + qkv + attended + scale * tokens
        feed_forward = x + scale_x + tokens * 2 * ffn * element + scale * tokens
        if model.sub_norm:
            # Megatron's MLP, unfused: gate, silu(gate), up, and their product, which the sub-norm keeps where it is
            # fp32 and copies elsewhere.
            feed_forward += tokens * element * ffn * (2 if element == 4 else 1)
    else:
        norm = int(_norm_bytes(config, own_tokens, on_gpu, hidden))
        attention = norm + x + qkv + attended
        # Megatron's unfused SwiGLU keeps gate, silu(gate) and up, its fused one gate|up; both are followed by a product
        # that keeps its input.
        feed_forward = norm + x + tokens * element * ffn * (3 if on_gpu else 4)
        if quantization.method == "bitnet":
            # With 8-bit activations the product keeps the rounded output of attention beside the output itself.
            attention += tokens * attention_width * element if scale else 0
            weights = [matrix.numel * element for matrix in block_linears(config)]
            attention += weights[0] + weights[1]
            feed_forward += weights[2] + weights[3]
    in_documents = config.data.document_masking and on_gpu and config.has_variable_length_attention
    if in_documents and config.training.micro_batch_size > 1:
        attention += tokens * attention_width * element
    if model.sub_norm:
        attention += _sub_norm_bytes(config, tokens, attention_width)
        feed_forward += _sub_norm_bytes(config, tokens, ffn)
    return _Half(attention, x), _Half(feed_forward, norm + x)


def _head_bytes(config: Config, on_gpu: bool) -> int:
    model, parallel, quantization = config.model, config.parallel, config.quantization
    element = DTYPE_BYTES[quantization.dtype]
    tokens = config.training.micro_batch_size * model.seq_length
    own_tokens = tokens // (parallel.tensor if parallel.sequence else 1)
    norm = _norm_bytes(config, own_tokens, on_gpu, model.hidden_size) + own_tokens * model.hidden_size * element
    # Per token: the label, the log of the sum of exponentials, the mask.
    return int(norm) + tokens * (model.vocab_size // parallel.tensor * element + 8 + 4 + 4)


def micro_batches_under_way(config: Config, data_parallel_size: int, stage: int) -> float:
    """Micro-batches whose activations a pipeline stage holds at once, in units of the stage's whole model part.

    1F1B: Narayanan et al., arXiv 2104.04473, section 2.2; the interleaved schedule as megatron-core counts its warm-up
    (core/pipeline_parallel/schedules.py).
    """
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    num = num_micro_batches(config, data_parallel_size)
    if chunks == 1:
        return min(num, stages - stage)
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages
    return min(num * chunks, warm_up + 1) / chunks


def activation_bytes(
    config: Config, data_parallel_size: int, stage: int | None = None, on_gpu: bool = True
) -> Activations:
    """The `Activations` of pipeline stage `stage`, by default the last one."""
    stage = last_stage(config) if stage is None else stage
    model, training = config.model, config.training
    attention, feed_forward = _halves(config, on_gpu)
    block = attention.all + feed_forward.all
    again = {
        "none": block,
        "mlp": attention.all + feed_forward.checkpointed,
        "full": attention.checkpointed,
    }[training.recompute]
    num_blocks = model.num_layers // config.parallel.pipeline
    num_again = config.recompute_layers * (config.parallel.virtual_pipeline or 1)
    per_micro_batch = num_again * again + (num_blocks - num_again) * block
    tokens = training.micro_batch_size * model.seq_length
    if config.data.document_masking and not (on_gpu and config.has_variable_length_attention):
        per_micro_batch += tokens * model.seq_length * DTYPE_BYTES[config.quantization.dtype]
    if stage == 0:
        per_micro_batch += tokens * 8  # token ids, for the gradient of the embedding
    if stage != last_stage(config):
        own_tokens = tokens // (config.parallel.tensor if config.parallel.sequence else 1)
        # The schedule keeps what it has sent to the next stage.
        per_micro_batch += own_tokens * model.hidden_size * DTYPE_BYTES[config.quantization.dtype]
    angles = 4 * model.seq_length * model.head_dim  # cos and sin, once
    halves = {"none": 0, "mlp": feed_forward.all - feed_forward.checkpointed, "full": block - again}
    return Activations(
        kept=int(micro_batches_under_way(config, data_parallel_size, stage) * per_micro_batch) + angles,
        head=_head_bytes(config, on_gpu) if stage == last_stage(config) else 0,
        block=block,
        recomputed=halves[training.recompute],
    )
