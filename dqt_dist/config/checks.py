"""Whether the fields of a config go together, and whether a number of processes fits them.

Each problem is one line: the full path of the field, the numbers that disagree, and what would be right.
`config_problems` needs the config alone and runs when a file is loaded. `check_world` and `process_grid` also need the
number of processes.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dqt_dist.config.schema import CODES_PER_GROUP, MOST_PROFILED_STEPS, STATE_BLOCK, Config, ZeroOptimization
from dqt_dist.errors import UserError


@dataclass(frozen=True)
class ProcessGrid:
    """How the processes of a run are arranged: tensor * pipeline * data == world_size."""

    tensor: int
    pipeline: int
    data: int
    virtual_pipeline: int | None
    num_microbatches: int
    """Forward and backward passes of one optimizer step on each data-parallel rank."""
    world_size: int


def check_world(config: Config, world_size: int) -> None:
    """Raise `UserError` when `world_size` processes cannot be arranged as the config says."""
    raise_if(_world_problems(config, world_size), f"config with {world_size} process(es)")


def process_grid(config: Config, world_size: int) -> ProcessGrid:
    """The arrangement of `world_size` processes. Raises `UserError` as `check_world` does."""
    check_world(config, world_size)
    parallel, training = config.parallel, config.training
    data_parallel_size = world_size // (parallel.tensor * parallel.pipeline)
    return ProcessGrid(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=data_parallel_size,
        virtual_pipeline=parallel.virtual_pipeline,
        num_microbatches=training.global_batch_size // (data_parallel_size * training.micro_batch_size),
        world_size=world_size,
    )


def raise_if(problems: Iterable[str], source: object) -> None:
    """Raise one `UserError` that lists `problems`, or return when there are none. `source` is the file or command at
    fault."""
    lines = [line.replace("\n", "\\n") for line in problems]
    if len(lines) == 1:
        raise UserError(f"{source}: {lines[0]}")
    if lines:
        raise UserError("\n".join([f"{source}: {len(lines)} problems", *(f"  {line}" for line in lines)]))


def shown(value: Any, width: int = 60) -> str:
    """`value` as a message quotes it: JSON, cut at `width` characters."""
    text = json.dumps(value)
    return text if len(text) <= width else f"{text[:width]} ..."


def config_problems(config: Config) -> Iterable[str]:
    """A line per contradiction between fields, in the order of the sections."""
    yield from _model_problems(config)
    yield from _tensor_parallel_problems(config)
    yield from _pipeline_problems(config)
    yield from _quantization_problems(config)
    yield from _latent_problems(config)
    yield from _fused_backward_problems(config)
    yield from _recompute_problems(config)
    yield from _cuda_graph_problems(config)
    yield from _replay_problems(config)
    yield from _moment_problems(config)
    yield from _schedule_problems(config)
    yield from _checkpoint_problems(config)
    yield from _path_problems(config)
    yield from _profile_problems(config)
    yield from _deepspeed_problems(config)


def _model_problems(config: Config) -> Iterable[str]:
    model = config.model
    heads, groups, hidden = model.num_attention_heads, model.num_query_groups, model.hidden_size
    if heads % groups:
        yield (
            f"model.num_query_groups: {groups} groups do not divide model.num_attention_heads = {heads}; "
            f"use one of {_divisors(heads)}"
        )
    if hidden % heads:
        yield (
            f"model.hidden_size: {hidden} is not divisible by model.num_attention_heads = {heads}; "
            f"nearest: {_nearest(hidden, heads)}"
        )
    elif hidden // heads % 2:
        yield (
            f"model.hidden_size: {hidden} / model.num_attention_heads = {heads} gives heads of width "
            f"{hidden // heads}, but rotary embedding turns pairs; nearest: {_nearest(hidden, 2 * heads)}"
        )


def _tensor_parallel_problems(config: Config) -> Iterable[str]:
    model, tensor = config.model, config.parallel.tensor
    divided = ["num_attention_heads", "num_query_groups", "vocab_size"]
    if config.parallel.context > 1:
        yield (
            f"parallel.context: {config.parallel.context} is not supported: in megatron-core attention over a split "
            f"sequence exists inside Transformer Engine only, its local attention stops on a context parallel size "
            f"above 1; use 1, and parallel.sequence = true with a larger parallel.tensor to divide long sequences"
        )
    if config.parallel.sequence:
        divided.append("seq_length")
        if tensor == 1:
            yield "parallel.sequence: true needs parallel.tensor > 1, which is 1; use false or raise parallel.tensor"
    if config.parallel.peer_copies is True and not (config.parallel.sequence and config.quantization.method == "dqt"):
        sequence = str(config.parallel.sequence).lower()
        yield (
            f"parallel.peer_copies: true is for low-bit linears with sequence parallelism; quantization.method is "
            f'{config.quantization.method!r} and parallel.sequence is {sequence}; use "auto"'
        )
    for name in divided:
        value = getattr(model, name)
        if value % tensor:
            nearest = _nearest(value, tensor)
            yield f"model.{name}: {value} is not divisible by parallel.tensor = {tensor}; nearest: {nearest}"
    for name in ("hidden_size", "ffn_hidden_size"):
        value, unit = getattr(model, name), CODES_PER_GROUP * tensor
        if value % unit:
            yield (
                f"model.{name}: {value} is not divisible by {CODES_PER_GROUP} * parallel.tensor = {unit}; a group "
                f"of packed codes and a Philox draw hold {CODES_PER_GROUP} codes of one rank's part of a row; "
                f"nearest: {_nearest(value, unit)}"
            )


def _pipeline_problems(config: Config) -> Iterable[str]:
    layers, pipeline, virtual = config.model.num_layers, config.parallel.pipeline, config.parallel.virtual_pipeline
    if virtual is not None and pipeline == 1:
        yield (
            f"parallel.virtual_pipeline: {virtual} chunks need parallel.pipeline > 1, which is 1; "
            f"leave virtual_pipeline out or raise parallel.pipeline"
        )
    num_chunks = config.parallel.num_model_chunks
    if layers % num_chunks:
        product = f"parallel.pipeline = {pipeline}"
        if virtual:
            product += f" * parallel.virtual_pipeline = {virtual}, {num_chunks} chunks"
        yield f"model.num_layers: {layers} is not divisible by {product}; nearest: {_nearest(layers, num_chunks)}"


def _quantization_problems(config: Config) -> Iterable[str]:
    quantization = config.quantization
    if quantization.method != "dqt" and config.optimizer.name == "adafactor":
        yield (
            f"optimizer.name: adafactor updates low-bit weights only, and quantization.method = "
            f'"{quantization.method}" has none; use "adamw", or method "dqt"'
        )
    if quantization.method != "dqt" and quantization.embeddings:
        yield (
            f'quantization.embeddings: true does not go with quantization.method = "{quantization.method}", whose '
            f'embeddings are ordinary weights; use false, or method "dqt"'
        )
    if quantization.method == "bitnet" and quantization.bits != "ternary":
        yield (
            f'quantization.bits: {quantization.bits} does not go with quantization.method = "bitnet", which is '
            f'ternary; use "ternary", or method "dqt" for 2..8 bits'
        )
    if quantization.method == "none" and quantization.activation != "none":
        yield (
            f'quantization.activation: "{quantization.activation}" does not go with quantization.method = "none", '
            f'whose linears take their input as it is; use "none"'
        )
    if quantization.method != "dqt" and quantization.compute in ("fp8", "int8"):
        yield (
            f'quantization.compute: "{quantization.compute}" does not go with quantization.method = '
            f'"{quantization.method}", whose weights are no low-bit codes; use "bf16" or "fp32", or method "dqt"'
        )
    elif (quantization.compute == "fp8") != (quantization.activation == "e4m3"):
        yield (
            f'quantization.activation: "{quantization.activation}" does not go with quantization.compute = '
            f'"{quantization.compute}": e4m3 is the operand of fp8 products and of no others; leave it out'
        )
    elif quantization.compute == "int8" and quantization.activation != "int8":
        yield (
            f'quantization.activation: "{quantization.activation}" does not go with quantization.compute = "int8", '
            f'whose products take int8 codes; use "int8"'
        )
    if quantization.method == "dqt" and quantization.compute == "fp8":
        if quantization.bits not in ("ternary", 2, 3, 4):
            yield (
                f'quantization.compute: "fp8" holds codes of up to 4 bits exactly, quantization.bits is '
                f'{quantization.bits}; use "bf16"'
            )
        yield from _fp8_shape_problems(config)


def _latent_problems(config: Config) -> Iterable[str]:
    quantization = config.quantization
    bits, latent_bits, interval = quantization.bits, quantization.latent_bits, quantization.scale_refit_interval
    if latent_bits is None:
        for name in ("latent_sigmas", "latent_threshold"):
            value = getattr(quantization, name)
            if value is not None:
                yield (
                    f"quantization.{name}: {value:g} is about latents, and there are none; leave it out, or set "
                    f"quantization.latent_bits"
                )
        if interval:
            yield (
                f"quantization.scale_refit_interval: {interval} refits scales from latents, and there are none; use 0, "
                f"or set quantization.latent_bits"
            )
        return
    if quantization.method != "dqt":
        yield (
            f'quantization.latent_bits: {latent_bits} does not go with quantization.method = "{quantization.method}", '
            f'whose weights are no integers; leave it out, or use method "dqt"'
        )
    if bits != "ternary" and bits >= min(latent_bits, 5):
        yield (
            f"quantization.latent_bits: {latent_bits} bits are stored for codes of quantization.bits = {bits}; latents "
            f'are for codes of at most 4 bits and have more bits than these; use "ternary", or latent_bits = null'
        )
    if quantization.latent_threshold is not None:
        largest = 2 ** (latent_bits - 1) - 1
        if bits != "ternary":
            yield (
                f"quantization.latent_threshold: {quantization.latent_threshold} is for ternary codes, "
                f"quantization.bits is {bits}; leave it out"
            )
        elif quantization.latent_threshold > largest:
            yield (
                f"quantization.latent_threshold: {quantization.latent_threshold} is more than {largest}, the largest "
                f"latent of {latent_bits} bits, so every code would be 0; use 1 to {largest}"
            )
    if interval and quantization.scale_power_of_two:
        yield (
            f"quantization.scale_power_of_two: true does not go with quantization.scale_refit_interval = {interval}: "
            f"refitted scales are no powers of two; use false, or an interval of 0"
        )


def _fp8_shape_problems(config: Config) -> Iterable[str]:
    """torch._scaled_mm takes only products of which both dimensions are whole 16-byte vectors of fp8."""
    model, tensor = config.model, config.parallel.tensor
    tokens = config.training.micro_batch_size * model.seq_length
    if tokens % 16:
        yield (
            f"model.seq_length: {model.seq_length} * training.micro_batch_size = {config.training.micro_batch_size} "
            f"gives {tokens} tokens, over which fp8 products of weight gradients sum in multiples of 16; use a "
            f"multiple of 16"
        )
    widths = {
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_query_groups": model.kv_hidden_size,
    }
    if config.quantization.embeddings:
        widths["vocab_size"] = model.vocab_size  # the head is then a low-bit product too
    for name, width in widths.items():
        if width % (16 * tensor):
            meant = f" (keys of width {width})" if name == "num_query_groups" else ""
            yield (
                f"model.{name}: {getattr(model, name)}{meant} gives {width / tensor:g} features a rank, which fp8 "
                f"products need in multiples of 16; nearest: {_nearest(width, 16 * tensor)}"
            )


def _fused_backward_problems(config: Config) -> Iterable[str]:
    optimizer = config.optimizer
    if not optimizer.fused_backward:
        return
    if optimizer.max_grad_norm > 0:
        yield (
            f"optimizer.fused_backward: true updates a matrix before the global gradient norm is known, but "
            f"optimizer.max_grad_norm is {optimizer.max_grad_norm:g}; use 0, or fused_backward = false"
        )
    if optimizer.name != "adamw":
        yield 'optimizer.fused_backward: true is for optimizer.name = "adamw" only; use false'
    if config.quantization.method != "dqt":
        yield (
            f'optimizer.fused_backward: true does not go with quantization.method = "{config.quantization.method}", '
            f"which has no low-bit weights; use false"
        )
    if config.training.spike_deviations is not None:
        yield (
            f"training.spike_deviations: {config.training.spike_deviations:g} skips a step when its loss is known, but "
            f"optimizer.fused_backward = true has updated the low-bit weights by then; leave spike_deviations out, or "
            f"use fused_backward = false"
        )


def _recompute_problems(config: Config) -> Iterable[str]:
    layers = config.training.recompute_layers
    if layers is None:
        return
    if config.training.recompute == "none":
        yield (
            f'training.recompute_layers: {layers} blocks are to compute again, but training.recompute = "none" says '
            f'nothing of them does; use recompute = "mlp" or "full", or leave recompute_layers out'
        )
    if layers > config.layers_per_chunk:
        yield (
            f"training.recompute_layers: {layers} is more than the {config.layers_per_chunk} blocks of a pipeline "
            f"stage; use at most {config.layers_per_chunk}"
        )


def _replay_problems(config: Config) -> Iterable[str]:
    what = "training.replay_suspicious_steps: true"
    if not config.training.replay_suspicious_steps:
        return
    if not config.training.deterministic:
        yield (
            f"{what} compares two executions of a step bit for bit, but training.deterministic is false; use "
            f"deterministic = true, or replay_suspicious_steps = false"
        )
    if config.optimizer.fused_backward:
        yield (
            f"{what} executes a step again from the same weights, but optimizer.fused_backward = true updates them in "
            f"the backward pass; use one of the two"
        )


def _cuda_graph_problems(config: Config) -> Iterable[str]:
    if config.training.cuda_graph is True:
        yield from _cuda_graph_obstacles(config)


def uses_cuda_graph(config: Config) -> bool:
    """Whether micro-batches run as CUDA graphs when the run is on a GPU: training.cuda_graph with "auto" decided."""
    wanted = config.training.cuda_graph
    return next(_cuda_graph_obstacles(config), None) is None if wanted == "auto" else wanted


def _cuda_graph_obstacles(config: Config) -> Iterator[str]:
    what = "training.cuda_graph: true"
    if config.zero.stage == 3:
        yield (
            f"{what} needs weights that stay where they are, but ZeRO stage 3 gathers them in every pass; use "
            f"deepspeed.zero_optimization.stage = 2, or false"
        )
    if config.optimizer.fused_backward:
        yield (
            f"{what} does not go with optimizer.fused_backward = true: step and rate of an update change, what is "
            f"recorded does not; use one of the two"
        )


def _moment_problems(config: Config) -> Iterable[str]:
    optimizer, model, tensor = config.optimizer, config.model, config.parallel.tensor
    if optimizer.second_moment == "full" and optimizer.name == "adafactor":
        yield 'optimizer.second_moment: "full" does not go with optimizer.name = "adafactor"; use "factored"'
    if optimizer.second_moment == "factored" and optimizer.name == "adamw":
        if optimizer.fused_backward:
            yield (
                'optimizer.second_moment: "factored" needs the sums over whole matrices before a row is updated, which '
                "optimizer.fused_backward = true does not wait for; use one of the two"
            )
        if config.quantization.method != "dqt":
            yield (
                f'optimizer.second_moment: "factored" is about low-bit weights, and quantization.method = '
                f'"{config.quantization.method}" has none; use "full", or method "dqt"'
            )
    if optimizer.state_bits == 32:
        return
    if optimizer.name != "adamw":
        yield f'optimizer.state_bits: {optimizer.state_bits} is for optimizer.name = "adamw"; use 32'
    for name in ("hidden_size", "ffn_hidden_size"):
        value, unit = getattr(model, name), STATE_BLOCK * tensor
        if value % unit:
            yield (
                f"model.{name}: {value} is not divisible by {STATE_BLOCK} * parallel.tensor = {unit}, as "
                f"optimizer.state_bits = {optimizer.state_bits} needs: a block of {STATE_BLOCK} columns shares a "
                f"scale; nearest: {_nearest(value, unit)}"
            )


def _schedule_problems(config: Config) -> Iterable[str]:
    optimizer, steps, name = config.optimizer, config.training.steps, "training.steps"
    warmup, decay = optimizer.warmup_steps, optimizer.decay_steps
    if optimizer.low_bit_schedule_steps is not None:
        if optimizer.low_bit_schedule_steps > steps:
            yield (
                f"optimizer.low_bit_schedule_steps: {optimizer.low_bit_schedule_steps} is more than training.steps = "
                f"{steps}; use at most {steps}"
            )
        else:
            # The shorter of the two schedules has less room for warm-up and decay.
            steps, name = optimizer.low_bit_schedule_steps, "optimizer.low_bit_schedule_steps"
    if warmup > steps:
        yield f"optimizer.warmup_steps: {warmup} is more than {name} = {steps}; use at most {steps}"
    elif optimizer.schedule == "wsd" and decay is not None and warmup + decay > steps:
        yield (
            f"optimizer.decay_steps: {decay} + optimizer.warmup_steps = {warmup} is more than {name} = "
            f"{steps}; use a decay of at most {steps - warmup}, or a shorter warm-up"
        )
    if optimizer.second_stage_ratio is not None and optimizer.schedule != "two_stage":
        yield (
            f"optimizer.second_stage_ratio: {optimizer.second_stage_ratio:g} does not go with optimizer.schedule = "
            f'"{optimizer.schedule}", which has no second stage; leave it out, or use "two_stage"'
        )


def _checkpoint_problems(config: Config) -> Iterable[str]:
    every, interval = config.checkpoint.keep_every, config.checkpoint.interval
    if every is not None and interval and every % interval:
        yield (
            f"checkpoint.keep_every: {every} is not a multiple of checkpoint.interval = {interval}, so steps to keep "
            f"would never be saved; nearest: {_nearest(every, interval)}"
        )


def _path_problems(config: Config) -> Iterable[str]:
    paths = {"data.tokenizer": config.data.tokenizer, "checkpoint.dir": config.checkpoint.dir}
    for field, sources in config.data.blends.items():
        paths |= {f"{field}.{number}.path": source.path for number, source in enumerate(sources)}
    for name, path in paths.items():
        if path.startswith("~"):
            yield f"{name}: {shown(path)} begins with ~, which only a shell replaces; write the whole path"


DERIVED_DEEPSPEED_KEYS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "optimizer": "the optimizer section",
    "scheduler": "optimizer.schedule",
    "gradient_clipping": "optimizer.max_grad_norm",
    "bf16": "quantization.compute",
    "fp16": "quantization.compute",
    "amp": "quantization.compute",
    "tensor_parallel": "parallel.tensor",
    "pipeline": "parallel.pipeline",
}
"""Keys of DeepSpeed's own config that follow from our fields, and the fields to use."""

_KINDS = {
    "an object": lambda value: isinstance(value, dict),
    "true or false": lambda value: isinstance(value, bool),
    "a positive integer or null": lambda value: value is None or (type(value) is int and value > 0),
}

DEEPSPEED_KEYS = {
    **dict.fromkeys(("zero_optimization", "timers", "comms_logger"), "an object"),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "an object"),
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state"), "true or false"),
    "steps_per_print": "a positive integer or null",
}
"""Keys of DeepSpeed's own config that are handed on, with the kind of value. DeepSpeed ignores keys that it does not
know, and others speak of what this project does itself: sums of gradients, recomputation, data, checkpoints,
compilation."""

TIMERS = ("throughput",)
"""Keys of `timers`. DeepSpeed ignores others."""

ZERO_STAGES = {
    "allgather_bucket_size": (1, 2),
    **dict.fromkeys(
        (
            *("overlap_comm", "sub_group_size", "memory_efficient_linear", "enable_sanity_checks"),
            *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters"),
            *("stage3_model_persistence_threshold", "stage3_max_reuse_distance", "stage3_allgather_sequential"),
            *("stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params"),
            "log_trace_cache_warnings",
        ),
        (3,),
    ),
}
"""Keys of zero_optimization that are handed on, and the stages in which they have an effect (DeepSpeed 0.19.8)."""

ZERO_KEYS = ("stage", "offload_optimizer", *ZERO_STAGES)
"""All that are handed on."""

REDUCTION_KEYS = ("reduce_scatter", "reduce_bucket_size", "contiguous_gradients", "round_robin_gradients")
"""Keys of zero_optimization about the reduction of gradients, which is not DeepSpeed's here."""

OPTIMIZER_DEVICES = ("none", "cpu")
"""Where masters and moments may live: beside the weights, or in the host's memory."""


def _profile_problems(config: Config) -> Iterable[str]:
    if config.logging.profile_steps is None:
        return
    (first, last), steps = config.logging.profile_steps, config.training.steps
    where = f"logging.profile_steps: [{first}, {last}]"
    if last < first:
        yield f"{where} ends before it begins; write [first, last], such as [{last}, {first}]"
    elif last - first + 1 > MOST_PROFILED_STEPS:
        yield (
            f"{where} are {last - first + 1} steps, and a trace holds every operation of each; use at most "
            f"{MOST_PROFILED_STEPS}, such as [{first}, {min(first + 4, steps)}]"
        )
    elif last > steps:
        yield f"{where} ends after training.steps = {steps}; use steps of 1 to {steps}"


def _deepspeed_problems(config: Config) -> Iterable[str]:
    for key, value in config.deepspeed.items():
        if key in DERIVED_DEEPSPEED_KEYS:
            yield f"deepspeed.{key}: is derived, so that two fields cannot disagree; use {DERIVED_DEEPSPEED_KEYS[key]}"
        elif key not in DEEPSPEED_KEYS:
            yield f"deepspeed.{key}: {_not_handed_on(key, list(DEEPSPEED_KEYS))}"
        elif not _KINDS[DEEPSPEED_KEYS[key]](value) and key != "zero_optimization":
            yield f"deepspeed.{key}: {shown(value)} is not valid; should be {DEEPSPEED_KEYS[key]}"
        elif key == "timers":
            for timer in value.keys() - TIMERS:
                yield f"deepspeed.timers.{timer}: {_not_handed_on(timer, TIMERS)}"
    zero = config.zero
    if not isinstance(zero.section, dict):
        yield (
            f"deepspeed.zero_optimization: {shown(zero.section)} is not valid; should be an object such as "
            f'{{"stage": 1}}'
        )
        return
    stage = zero.stage
    if type(stage) is not int or not 0 <= stage <= 3:
        yield f"deepspeed.zero_optimization.stage: {shown(stage)} is not valid; use 0, 1, 2 or 3"
        return
    if stage >= 2 and config.parallel.pipeline > 1:
        yield (
            f"deepspeed.zero_optimization.stage: {stage} does not go with parallel.pipeline = "
            f"{config.parallel.pipeline}: a pipeline needs many micro-batches, so gradients (2) would stay whole or "
            f"travel once for each of them and weights (3) be gathered once for each (DeepSpeed refuses it too); use "
            f"1, which is enough here because low-bit weights are 8 times smaller than bf16 ones, or parallel.pipeline "
            f"= 1"
        )
    for key in REDUCTION_KEYS:
        if key in zero.section:
            yield (
                f"deepspeed.zero_optimization.{key}: has no effect, as gradients are not reduced by DeepSpeed but in "
                f"one order for all ZeRO stages; leave it out"
            )
    for key in zero.section.keys() - {*ZERO_KEYS, *REDUCTION_KEYS, "offload_param"}:
        yield f"deepspeed.zero_optimization.{key}: {_not_handed_on(key, ZERO_KEYS)}"
    for key, stages in ZERO_STAGES.items():
        if key in zero.section and stage not in stages:
            yield (
                f"deepspeed.zero_optimization.{key}: has no effect in stage {stage}, only in stage "
                f"{' and '.join(map(str, stages))}; leave it out"
            )
    yield from _offload_problems(config, zero)


def _not_handed_on(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
    return f"unknown key; {hint}"


def _offload_problems(config: Config, zero: ZeroOptimization) -> Iterable[str]:
    name = "deepspeed.zero_optimization.offload_optimizer"
    if "offload_param" in zero.section:
        yield (
            "deepspeed.zero_optimization.offload_param: is not supported; low-bit weights take a quarter of a byte on "
            "the device, so leave it out and offload the optimizer's state"
        )
    if zero.optimizer_device not in OPTIMIZER_DEVICES:
        given = shown(zero.section["offload_optimizer"])
        yield f'{name}: {given} is not valid; should be {{"device": "cpu", "pin_memory": true}}, or left out'
        return
    if not zero.offloads_optimizer:
        return
    if zero.stage == 0:
        yield f"{name}: needs a ZeRO stage; set deepspeed.zero_optimization.stage = 1 (it may have one rank only)"
    if config.optimizer.name != "adamw" and config.quantization.method == "dqt":
        yield f"{name}: is for adamw's moments; {config.optimizer.name} has hardly any, so leave it out"


def _world_problems(config: Config, world_size: int) -> Iterable[str]:
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    ranks_of_one_copy = tensor * pipeline
    if world_size % ranks_of_one_copy:
        yield (
            f"parallel: {world_size} process(es) cannot be split into copies of tensor * pipeline = "
            f"{tensor} * {pipeline} = {ranks_of_one_copy}; start "
            f"{_nearest(world_size, ranks_of_one_copy)} processes, or change parallel.tensor or parallel.pipeline"
        )
        return
    yield from _batch_problems(config, data_parallel_size=world_size // ranks_of_one_copy)


def _batch_problems(config: Config, data_parallel_size: int) -> Iterable[str]:
    training, pipeline = config.training, config.parallel.pipeline
    interleaved = config.parallel.virtual_pipeline is not None
    samples_of_one_pass = data_parallel_size * training.micro_batch_size
    valid_unit = samples_of_one_pass * (pipeline if interleaved else 1)
    num_microbatches, rest = divmod(training.global_batch_size, samples_of_one_pass)
    if config.optimizer.fused_backward and not rest and num_microbatches > 1:
        yield (
            f"optimizer.fused_backward: true needs one micro-batch a step, training.global_batch_size = "
            f"{training.global_batch_size} makes {num_microbatches}; use training.global_batch_size = "
            f"{samples_of_one_pass}"
        )
    nearest = _nearest(training.global_batch_size, valid_unit)
    equation = f"data parallel size {data_parallel_size} * micro_batch_size {training.micro_batch_size}"
    if rest:
        yield (
            f"training.global_batch_size: {training.global_batch_size} is not a multiple of {equation} = "
            f"{samples_of_one_pass}; nearest: {nearest}"
        )
    elif interleaved and num_microbatches % pipeline:
        yield (
            f"training.global_batch_size: {training.global_batch_size} / ({equation}) = {num_microbatches} "
            f"micro-batches is not a multiple of parallel.pipeline = {pipeline}, which the interleaved schedule of "
            f"parallel.virtual_pipeline needs; nearest: {nearest}"
        )


def _nearest(value: int, unit: int) -> str:
    """The positive multiples of `unit` on either side of `value`, in words."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"


def _divisors(value: int) -> str:
    """Those up to 4096, which is all of them for any number of heads that there is."""
    return ", ".join(str(candidate) for candidate in range(1, min(value, 4096) + 1) if value % candidate == 0)
