"""Expected time of a step, from measured efficiencies. A layout that was not measured is said to be unmeasured.

    seconds = (FLOPs / (GPUs * bf16 peak * MFU) + tensor) / pipeline factor / bubble + exchange + far

    MFU        of one GPU, by method, precision and recomputation: docs/benchmarks/train_step.md, one H200, 1.36 B
               weights, ternary also 134 M, and 6.74 B on an H100. The size nearest to the model's is taken, on a
               logarithmic scale.
    tensor     seconds per byte that tensor-parallel ranks send, measured at TP 2 with sequence parallelism, 1.36 B
               weights: docs/planning.md, with CUDA graphs docs/benchmarks/layouts.md. So a wider model, which computes
               more per byte, loses less; that more ranks send as fast as two is a guess.
    factor     what is left of the speed of single GPUs at PP 2, from the same pages. Each doubling of the size loses
               the same again, which is a guess.
    bubble     M / (M + (p - 1) / v), for M micro-batches, p stages, v chunks per rank (arXiv 2104.04473, section 2.2)
    exchange   seconds per byte that data-parallel ranks send, measured at DP 2 in one machine.
    far        bytes that a GPU sends to other machines, by the rate of its network port; nothing hides them. Nothing
               was measured between machines.
    stage 3, offload   97,803 and 73,003 tokens/s where stage 1 has 99,955: docs/benchmarks/zero_stages.md

tests/plan/test_measured.py holds the tables against the pages.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from dqt_dist.config import Config, ProcessGrid, uses_cuda_graph
from dqt_dist.plan.arithmetic import MACHINE_GPUS, NETWORK_BYTES_PER_SECOND, Device, flops_per_token
from dqt_dist.plan.memory import last_stage
from dqt_dist.plan.traffic import bytes_sent, sent_to_data_ranks, sent_to_tensor_ranks

TRAIN_STEP, PLANNING, LAYOUTS, ZERO_STAGES = (
    "docs/benchmarks/train_step.md",
    "docs/planning.md",
    "docs/benchmarks/layouts.md",
    "docs/benchmarks/zero_stages.md",
)
LARGE, SMALL, SEVEN = 1_364_297_728, 134_105_856, 6_738_415_616
"""Weights of the measured models: configs/1b_ternary.json, 130m_ternary.json and 7b_ternary.json."""

MFU: dict[str, dict[int, float]] = {
    "none-bf16": {LARGE: 0.510},
    "bitnet-bf16": {LARGE: 0.373},
    "dqt-bf16": {LARGE: 0.534, SMALL: 0.156},
    "dqt-int8": {LARGE: 0.525},
    "dqt-fp8": {LARGE: 0.794, SMALL: 0.134},
    "dqt-fp8, dW in bf16": {LARGE: 0.681},
    "dqt-bf16, CUDA graph": {LARGE: 0.529, SMALL: 0.351},
    "dqt-fp8, CUDA graph": {SEVEN: 0.871, LARGE: 0.785, SMALL: 0.432},
    "none-bf16, CUDA graph": {LARGE: 0.504},
}
"""Model FLOPs over the bf16 peak of one GPU, by the page's variant and the model's weights; SEVEN on an H100, with
micro-batches of 4 sequences."""
RECOMPUTE_MFU = {"none": 0.794, "mlp": 0.698, "full": 0.623}
"""Of dqt-fp8 at LARGE. Their ratios hold for the other methods too, as far as is known."""

PIPELINE_FACTORS = {
    "none": 76_940 / (2 * 58_272) / (8 / 9),
    "dqt-fp8": 43_682 / (2 * 88_139) / (8 / 9),
    "none, CUDA graph": 101_734 / (2 * 58_048) / (8 / 9),
    "dqt-fp8, CUDA graph": 133_390 / (2 * 88_122) / (8 / 9),
}
"""Tokens/s at PP 2 without its bubble over those of two single H100. Those with CUDA graphs are of LAYOUTS, ordinary
weights over single GPUs without a graph."""
TENSOR_SECONDS_PER_BYTE = {
    "none": (16_384 / 91_129 - 16_384 / 58_272 / 2) / 8.22e9,
    "dqt-fp8": (16_384 / 56_590 - 16_384 / 88_139 / 2) / 5.81e9,
    "none, CUDA graph": (16_384 / 90_324 - 16_384 / 58_048 / 2) / 8.22e9,
    "dqt-fp8, CUDA graph": (16_384 / 137_822 - 16_384 / 88_934 / 2) / 5.81e9,
}
"""What a step at TP 2 takes longer than half of a step on one H100, over the bytes that a rank sends in it. Pages as
PIPELINE_FACTORS."""
SECONDS_PER_BYTE = {
    "none": (2 * 16_384 / 112_312 - 16_384 / 58_272) / 2.73e9,
    "dqt-bf16": (2 * 16_384 / 112_884 - 16_384 / 60_042) / 1.65e9,
    "dqt-fp8": (2 * 16_384 / 136_206 - 16_384 / 88_139) / 1.65e9,
    "dqt-fp8, CUDA graph": (2 * 16_384 / 170_235 - 16_384 / 88_494) / 1.65e9,
}
"""What a step at DP 2 takes longer than on one GPU, over the bytes that a rank sends in it. With a CUDA graph from
LAYOUTS; other methods were not measured with one and are taken as without."""
STAGE_3_FACTOR, OFFLOAD_FACTOR = 97_803 / 99_955, 73_003 / 99_955
LATENTS_FACTOR = (87_104 + 87_365) / (88_312 + 88_212)
"""Tokens/s with 8-bit latents over those of codes alone, 1.36 B weights, fp8, one H100: TRAIN_STEP."""


@dataclass(frozen=True)
class Speed:
    """What is expected of a step."""

    parts: dict[str, float]
    """Seconds: those of `products`, with what is recomputed, as one GPU has them, and what each part of the layout
    adds: tensor, pipeline, ZeRO 3, offload, data, network."""
    tokens_per_second: float
    mfu: float
    notes: tuple[str, ...]
    """Where the numbers come from, and what was not measured; one line each."""

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.parts.values())

    @property
    def measured(self) -> bool:
        """Whether this method was measured at this size and layout, if on another GPU."""
        return not any("unmeasured" in note for note in self.notes)


def expected_speed(config: Config, grid: ProcessGrid, device: Device) -> Speed | None:
    """The expected speed on `device`s. None for fp32, which was not measured on a GPU."""
    quantization, parallel = config.quantization, config.parallel
    if quantization.compute == "fp32":
        return None
    tokens = config.training.global_batch_size * config.model.seq_length
    flops = tokens * flops_per_token(config.model)
    mfu, measured_on, notes = _single_gpu(config)
    if device.name != measured_on:
        notes.append(f"one {device.name} is taken to be as efficient as the {measured_on} of that page, by bf16 peak")
    parts = {"products": flops / (grid.world_size * device.bf16_tflops * 1e12 * mfu)}

    def slow_down(part: str, share: float) -> None:
        parts[part] = sum(parts.values()) * (1 / share - 1)

    layout_page = LAYOUTS if uses_cuda_graph(config) else PLANNING
    method = "dqt-fp8" if quantization.method == "dqt" else "none"
    if quantization.method == "dqt" and quantization.compute != "fp8" and grid.tensor * grid.pipeline > 1:
        notes.append(f"tensor and pipeline parallel with {quantization.compute}: unmeasured, as fp8")
    if quantization.method == "dqt" and config.optimizer.second_moment == "factored":
        notes.append("factored second moment: unmeasured, as a full one")
    if grid.tensor > 1:
        rate = TENSOR_SECONDS_PER_BYTE[_row(method, TENSOR_SECONDS_PER_BYTE, config)]
        parts["tensor"] = sum(sent_to_tensor_ranks(config, grid, last_stage(config)).values()) * rate
        share = parts["products"] / sum(parts.values())
        measured = _measured("tensor", grid.tensor, config, layout_page)
        notes.append(f"tensor {grid.tensor}: {share:.2f} of single GPUs; {measured}")
    if grid.pipeline > 1:
        factor = PIPELINE_FACTORS[_row(method, PIPELINE_FACTORS, config)] ** math.log2(grid.pipeline)
        measured = _measured("pipeline", grid.pipeline, config, layout_page)
        notes.append(f"pipeline {grid.pipeline}: {factor:.2f} of single GPUs; {measured}")
        chunks = parallel.virtual_pipeline or 1
        bubble = grid.num_microbatches / (grid.num_microbatches + (grid.pipeline - 1) / chunks)
        slow_down("pipeline", factor * bubble)
        notes.append(f"pipeline bubble: {bubble:.2f} of the time is left")
    if config.zero_stage == 3 and grid.data > 1:
        slow_down("ZeRO 3", STAGE_3_FACTOR)
        notes.append(f"ZeRO 3: {STAGE_3_FACTOR:.2f}, {ZERO_STAGES}, 4 GPUs")
    if config.offloads_optimizer:
        slow_down("offload", OFFLOAD_FACTOR)
        notes.append(f"offloaded optimizer: {OFFLOAD_FACTOR:.2f}, {ZERO_STAGES}, 4 GPUs")
    far = bytes_to_other_machines(config, grid)
    if grid.data > 1:
        key = _exchange_key(config)
        parts["data"] = (sum(_exchanged(config, grid).values()) - far) * SECONDS_PER_BYTE[key]
        page = LAYOUTS if "graph" in key else PLANNING
        notes.append(
            f"data {grid.data}: {1000 * parts['data']:.0f} ms a step; {_measured('data', grid.data, config, page)}"
        )
    if grid.world_size > MACHINE_GPUS:
        parts["network"] = (far + _pipeline_messages(config, grid)) / NETWORK_BYTES_PER_SECOND
        notes.append(
            f"more than {MACHINE_GPUS} GPUs: {1000 * parts['network']:.0f} ms a step between machines, unmeasured, at "
            f"{NETWORK_BYTES_PER_SECOND / 1e9:.0f} GB/s a GPU"
        )
    seconds = sum(parts.values())
    mfu = flops / seconds / (grid.world_size * device.bf16_tflops * 1e12)
    return Speed(parts, tokens / seconds, mfu, tuple(notes))


def _row(name: str, table: Collection[str], config: Config) -> str:
    """The row of a table for a method: that with CUDA graphs for a run with graphs, where the table has one."""
    with_graph = f"{name}, CUDA graph"
    return with_graph if uses_cuda_graph(config) and with_graph in table else name


def _single_gpu(config: Config) -> tuple[float, str, list[str]]:
    """MFU of one GPU, the GPU on which it was measured, and notes."""
    quantization, training = config.quantization, config.training
    variant = f"{quantization.method}-{quantization.compute}"
    if quantization.compute == "fp8" and quantization.weight_gradient == "bf16":
        variant += ", dW in bf16"
    variant = _row(variant, MFU, config)
    weights = config.model.num_layers * config.model.linear_weights_per_block
    weights += 2 * config.model.vocab_size * config.model.hidden_size
    size = min(MFU[variant], key=lambda measured: abs(math.log(measured / weights)))
    share = training.recompute != "none" and config.recompute_layers / config.layers_per_chunk
    slower = RECOMPUTE_MFU["none"] / RECOMPUTE_MFU[training.recompute] - 1
    mfu = MFU[variant][size] / (1 + share * slower)
    name = variant + ("" if training.recompute == "none" else f", recompute {training.recompute}")
    gpu = "H100" if size == SEVEN else "H200"
    notes = [f"{name}: MFU {mfu:.3f} of one GPU, {TRAIN_STEP}, {size / 1e9:.3g} B weights, one {gpu}"]
    if not 0.5 < weights / size < 2:
        notes.append(f"a model of {weights / 1e9:.3g} B weights: unmeasured")
    if quantization.latent_bits is not None:
        mfu *= LATENTS_FACTOR
        notes.append(f"latents: {LATENTS_FACTOR:.2f} of codes alone, {TRAIN_STEP}, 1.36 B weights, fp8, one H100")
    if share and variant != "dqt-fp8":
        notes.append(f"recompute {training.recompute} with {variant}: unmeasured, slower by the ratio of dqt-fp8")
    return mfu, gpu, notes


def _measured(name: str, size: int, config: Config, page: str) -> str:
    """Whether a parallel size was measured, and where: on `page`, if at all."""
    parallel = config.parallel
    others = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
    alone = all(other == 1 for axis, other in others.items() if axis != name)
    if size == 2 and alone:
        return f"{page}, two H100"
    return f"unmeasured, from size 2 alone of {page}"


def _exchange_key(config: Config) -> str:
    quantization = config.quantization
    if quantization.method != "dqt":
        return "none"
    if quantization.compute != "fp8":
        return "dqt-bf16"
    return _row("dqt-fp8", SECONDS_PER_BYTE, config)


def _exchanged(config: Config, grid: ProcessGrid) -> dict[str, int]:
    """Bytes that a rank of the last stage sends to data-parallel ranks in a step, by kind."""
    if config.zero_stage == 3:
        # What stage 3 sends beyond stage 1 is in STAGE_3_FACTOR.
        config = config.model_copy(update={"deepspeed": {"zero_optimization": {"stage": 1}}})
    return sent_to_data_ranks(config, grid, last_stage(config))


def bytes_to_other_machines(config: Config, grid: ProcessGrid) -> float:
    """Of the bytes that a rank of the last stage sends to data-parallel ranks those that leave its machine.

    Ranks of a machine are first tensor-, then data-parallel ones (parallel/groups.py). Gradients go from each rank to
    each owner (parallel/row_sharding.py). A gather is a ring, which leaves a machine once, over the ports of all its
    ranks.
    """
    neighbours = min(grid.data, max(1, MACHINE_GPUS // grid.tensor))
    if neighbours == grid.data:
        return 0.0
    sent = _exchanged(config, grid)
    share = (grid.data - neighbours) / (grid.data - 1)
    return share * (sent["gradients"] + (sent["codes"] + sent["weights"]) / neighbours)


def _pipeline_messages(config: Config, grid: ProcessGrid) -> int:
    """Bytes between stages of a rank in the middle, whose neighbours are in other machines."""
    return bytes_sent(config, grid, min(1, last_stage(config)))["pipeline"]
