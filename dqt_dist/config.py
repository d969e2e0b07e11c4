"""The JSON file that describes one run, and every check that can be made before a process group exists.

A file has nine sections (model, quantization, optimizer, parallel, data, training, checkpoint, logging, deepspeed);
each is a frozen pydantic model below, or for `deepspeed` a dictionary handed to DeepSpeed. The steps of `load_config`:

    file + --set  ->  fields   each value against its type and range; an unknown key stops the run
                  ->  defaults fields left out (or null) get their value, also where it follows from another field
                  ->  checks   what fields say about each other (heads and tensor parallel size, layers and stages ...)

so a loaded `Config` is complete: written beside the run with `to_json` it loads again to an equal object. What needs
the number of processes comes after, in `check_world`. Every step lists all the problems it finds in one `UserError`, a
line each:

    full.field.path: what is wrong; the numbers that disagree; what would be right

Types are strict: "12" is no integer and 1 is no boolean, so a slip of the keyboard cannot change a run in silence.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from dqt_dist.errors import UserError

CODES_PER_GROUP = 4
"""Codes in one packed byte of the 2-bit format, and 32-bit words in one Philox4x32 draw."""

STATE_BLOCK = 32
"""Neighbouring columns of a row that share the scale of their 8-bit moments."""

Bits = Literal["ternary", 2, 3, 4, 5, 6, 7, 8]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """What all sections share: frozen, strict types, no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The LLaMA to train: RMSNorm, RoPE, SwiGLU, no biases."""

    num_layers: PositiveInt
    """Transformer blocks."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt
    """Width of gate_proj and up_proj."""
    num_attention_heads: PositiveInt
    """Query heads; the width of a head is hidden_size / num_attention_heads."""
    num_query_groups: PositiveInt = Field(default_factory=lambda data: data["num_attention_heads"])
    """Key/value heads (grouped-query attention). Default: num_attention_heads, which is multi-head attention."""
    vocab_size: PositiveInt
    """Rows of the embedding and of the head; at least the tokenizer's vocabulary."""
    seq_length: PositiveInt
    """Tokens of one training sample."""
    sub_norm: bool = False
    """Extra RMSNorm before o_proj and before down_proj, as in the architecture of the DQT authors' code."""
    norm_epsilon: PositiveFloat = 1e-5
    """Added to the mean square inside RMSNorm."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""


class QuantizationConfig(Section):
    """How the linear layers of the blocks are stored and computed."""

    method: Literal["dqt", "bitnet", "none"] = "dqt"
    """dqt: weights are integer codes only; bitnet: b1.58, float master, straight-through; none: ordinary weights."""
    bits: Bits = "ternary"
    """Grid of the codes: "ternary" (-1, 0, 1) or 2..8 bits, -2^(b-1) to 2^(b-1)-1."""
    embeddings: bool = False
    """Store embedding and head as codes too, as the DQT authors' code does; by default they stay in high precision."""
    compute: Literal["fp32", "bf16", "fp8", "int8"] = "bf16"
    """Precision of the linears' matrix products. fp8: inputs, codes and output gradients in e4m3; int8: forward in int8, backward
    in bf16. Everything around the linears is then in bf16. fp8 and int8 are for method dqt."""
    activation: Literal["int8", "e4m3", "none"] = Field(
        default_factory=lambda data: (
            "none" if data["method"] == "none" else "e4m3" if data["compute"] == "fp8" else "int8"
        )
    )
    """Quantisation of a linear's input, one scale per token. Default: none for method none, else e4m3 when compute is fp8 and int8
    otherwise."""
    weight_gradient: Literal["bf16", "fp8"] = "fp8"
    """Operands of the product that gives the weights' gradients, when compute is fp8."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How an updated weight lands on the grid; nearest exists as the control that makes no progress."""
    scale_rule: Literal["absmean", "sigma", "absmax", "paper"] = Field(
        default_factory=lambda data: "absmean" if data["bits"] == "ternary" else "sigma"
    )
    """Scale at initialisation: absmean s = mean|W|; sigma s = scale_sigmas * std / Qp; absmax s = max|W| / Qp;
    paper s = mean|W| / Qp (parity with arXiv 2412.04787 only: it clips). Default: absmean for ternary, sigma else."""
    scale_sigmas: PositiveFloat = Field(
        default_factory=lambda data: 3.0 if data["bits"] == "ternary" or data["bits"] <= 4 else 6.0
    )
    """k of the sigma rule: the range in standard deviations. Default: 3 up to 4 bits, 6 above."""
    scale_power_of_two: bool = True
    """Round the scale to a power of two, so that scale * code is exact in bf16 and every export is lossless."""

    @property
    def dtype(self) -> Literal["fp32", "bf16"]:
        """Type of everything that is not an operand of a low-bit product: residual stream, norms, attention, embeddings, head."""
        return "fp32" if self.compute == "fp32" else "bf16"


class OptimizerConfig(Section):
    """Update rule and learning-rate schedule."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """Update rule of the low-bit weights. adamw: two moments a weight; adafactor: factored second moment, which saves memory.
    Everything else keeps AdamW, since DeepSpeed's flat partitions cannot be factored."""
    learning_rate: PositiveFloat
    """Peak rate of embeddings, head and norms."""
    low_bit_learning_rate: PositiveFloat = Field(default_factory=lambda data: data["learning_rate"])
    """Peak rate of the linears of the blocks, in weight units, not codes: the low-bit weights, or their counterparts in the
    methods none and bitnet. Default: learning_rate."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of the high-precision matrices."""
    low_bit_weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of the low-bit weights."""
    beta1: Beta | None = Field(default_factory=lambda data: 0.9 if data["name"] == "adamw" else None)
    """Decay of the first moment. Default: 0.9 for adamw; none for adafactor, which then keeps no first moment."""
    beta2: Beta = 0.95
    """Decay of AdamW's second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of AdamW's second moment."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Course after warm-up; wsd (warm-up, stable, decay) is constant but for the last decay_steps."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    decay_steps: PositiveInt | None = None
    """Length of the final decay, in steps; wsd only, where the default is 10 % of training.steps."""
    min_learning_rate_ratio: Fraction = 0.0
    """Rate at the last step as a fraction of the peak."""
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of gradient buffers, in which micro-batches are added up and which travels; ranks are added up in fp32. bf16 halves
    memory and traffic of gradients."""
    gradient_reduction: Literal["step", "micro_batch"] = "step"
    """When gradients are summed over data-parallel ranks: once a step, after the micro-batches are added up, or with each
    micro-batch, which costs their number times the traffic and in ZeRO stages 2 and 3 keeps owned rows only throughout."""
    state_bits: Literal[8, 32] = 32
    """Bits of each of AdamW's two moments of a low-bit weight. 8: fp8 values with a scale for every 32 columns, rounded
    stochastically."""
    fused_backward: bool = False
    """Update each low-bit matrix as soon as the backward pass has made its gradient, so that gradients of the whole model never
    exist at once. Needs one micro-batch a step and max_grad_norm = 0. Elements of a gradient that are not finite then count as zero:
    the norm that would have stopped the step comes too late for the low-bit weights."""
    adafactor_decay_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Adafactor's second-moment decay is 1 - step^-adafactor_decay_rate."""
    adafactor_clip_threshold: PositiveFloat = 1.0
    """Root mean square above which Adafactor scales its own update down."""


class ParallelConfig(Section):
    """How one copy of the model is cut; data parallel size is world size / (tensor * pipeline)."""

    tensor: PositiveInt = 1
    """Tensor parallel size: ranks that share each matrix."""
    pipeline: PositiveInt = 1
    """Pipeline parallel size: ranks that share the layers."""
    virtual_pipeline: Annotated[int, Field(ge=2)] | None = None
    """Model chunks per pipeline rank in the interleaved schedule; none for the plain 1F1B schedule."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals are split over the tensor-parallel ranks by sequence position."""
    context: PositiveInt = 1
    """Context parallel size. Only 1: megatron-core's attention over a split sequence exists inside Transformer Engine only."""

    @property
    def chunks(self) -> int:
        """Parts that the layers are cut into, one or more a pipeline rank."""
        return self.pipeline * (self.virtual_pipeline or 1)


class DataSource(Section):
    """One tokenised corpus of a blend."""

    path: Annotated[str, Field(min_length=1)]
    """Prefix of a .bin/.idx pair as tools/prepare_data.py writes it; relative to the working folder."""
    weight: PositiveFloat = 1.0
    """Share of the samples drawn from it, relative to the other sources' weights."""


Blend = Annotated[tuple[DataSource, ...], Field(min_length=1)]


class DataConfig(Section):
    """What is read."""

    train: Blend
    """Training blend."""
    valid: Blend | None = None
    """Validation blend. Default: none, and valid_fraction of the training corpus is kept out for it."""
    valid_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Part of the training corpus held out when valid is not given."""
    tokenizer: Annotated[str, Field(min_length=1)]
    """SentencePiece .model file."""
    num_workers: NonNegativeInt = 2
    """Loader processes of each rank."""


class TrainingConfig(Section):
    """Length, batch and seed of the run."""

    steps: PositiveInt
    """Optimizer steps."""
    micro_batch_size: PositiveInt
    """Samples of one forward and backward pass on one data-parallel rank."""
    global_batch_size: PositiveInt
    """Samples of one optimizer step over all ranks; a multiple of data parallel size * micro_batch_size."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    """Key of every random draw; 32 bits, as it is a word of the Philox key."""
    deterministic: bool = False
    """Only deterministic kernels, so that on GPUs too a run gives the same bits each time and in every ZeRO stage. It costs speed:
    the fused attention kernels are faster when their backward may add up in any order. CPU runs are deterministic anyway."""
    recompute: Literal["none", "mlp", "full"] = "none"
    """Activation checkpointing: what the backward pass computes again instead of keeping it. mlp: the feed-forward half of each
    block; full: whole blocks, of which only the input is kept."""
    recompute_layers: PositiveInt | None = None
    """In how many blocks of each pipeline stage (of each virtual one where there are). Default: all of them."""
    cuda_graph: bool | Literal["auto"] = False
    """Launch forward and backward of a micro-batch as one CUDA graph, so that Python's speed does not matter. Needs tensor and pipeline
    parallel size 1 and ZeRO stage 0 or 1. Gradients then stay allocated between steps. auto: on a GPU, where nothing else in the
    config stands against it."""
    replica_check_interval: NonNegativeInt = 100
    """Steps between comparisons of weights that several ranks hold alike; a difference stops the run. 0 for none."""
    eval_interval: NonNegativeInt = 0
    """Steps between validations; 0 for one at the end only."""
    eval_batches: PositiveInt = 20
    """Global batches of one validation."""
    sample_prompt: str | None = None
    """When given, the report at the end shows a continuation of this text. To make it, rank 0 loads the whole last checkpoint after
    training (4 bytes per weight, on the GPU where there is one): leave it out where one process cannot hold the model."""
    sample_tokens: PositiveInt = 64
    """Most tokens of that continuation, which also ends with the document or with the model's context."""


class CheckpointConfig(Section):
    """The run folder and what is kept in it."""

    dir: Annotated[str, Field(min_length=1)]
    """Run folder: config.json, metrics.jsonl, tb/, checkpoints/, summary.json."""
    interval: NonNegativeInt = 0
    """Steps between checkpoints; 0 for one at the end only."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that stay on disk."""
    keep_every: PositiveInt | None = None
    """Checkpoints of every so many steps stay on disk for good, beside the newest. Default: none do."""
    async_save: bool = False
    """Copy the state to host memory and write it while training goes on; false makes training wait for the disk."""


class LoggingConfig(Section):
    """What is recorded, and how often."""

    interval: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    histogram_interval: PositiveInt = 100
    """Steps between TensorBoard's per-layer histograms."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device in TFLOP/s, for the MFU. Default: from a table of devices, or measured."""


class Config(Section):
    """One run."""

    model: ModelConfig
    quantization: QuantizationConfig = QuantizationConfig()
    optimizer: OptimizerConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig = LoggingConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Passed to deepspeed.initialize, except for the keys that follow from other sections."""

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the run; 0 when deepspeed.zero_optimization does not name one."""
        return self.deepspeed.get("zero_optimization", {}).get("stage", 0)

    @property
    def layers_of_chunk(self) -> int:
        """Blocks of a model chunk."""
        return self.model.num_layers // self.parallel.chunks

    @property
    def recompute_layers(self) -> int:
        """In how many of them training.recompute holds."""
        return self.training.recompute_layers or self.layers_of_chunk

    @property
    def cuda_graph(self) -> bool:
        """Whether micro-batches run as CUDA graphs, on a GPU."""
        wanted = self.training.cuda_graph
        return next(_cuda_graph_obstacles(self), None) is None if wanted == "auto" else wanted

    @property
    def offloads_optimizer(self) -> bool:
        """Whether moments (and masters) live in the host's memory: deepspeed.zero_optimization.offload_optimizer."""
        offload = self.deepspeed.get("zero_optimization", {}).get("offload_optimizer", {})
        return offload.get("device", "none") != "none"


@dataclass(frozen=True)
class Layout:
    """How the processes of a run are arranged; tensor * pipeline * data == world_size."""

    tensor: int
    pipeline: int
    data: int
    virtual_pipeline: int | None
    num_microbatches: int
    """Forward and backward passes of one optimizer step on each data-parallel rank."""
    world_size: int


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override, validate and complete the JSON file at `path`; `overrides` are `section.key=value` texts.

    Raises `UserError` with one line for each problem. Paths inside the file stay as they are written.
    """
    values = _read_json(Path(path))
    _raise_if(_apply_overrides(values, overrides), "--set")
    try:
        # Through JSON, where strict mode takes an array for a tuple.
        config = Config.model_validate_json(json.dumps(_without_nulls(values)))
    except ValidationError as error:
        _raise_if(_field_problems(error), path)
        raise
    config = _with_defaults_across_sections(config)
    _raise_if(_problems(config), path)
    return config


def to_json(config: Config) -> str:
    """The complete config as JSON text; `load_config` turns it into an equal object again."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def check_world(config: Config, world_size: int) -> None:
    """Raise `UserError` when `world_size` processes cannot be arranged as the config says."""
    _raise_if(_world_problems(config, world_size), f"config with {world_size} process(es)")


def layout(config: Config, world_size: int) -> Layout:
    """The arrangement of `world_size` processes; raises `UserError` as `check_world` does."""
    check_world(config, world_size)
    parallel, training = config.parallel, config.training
    data_parallel_size = world_size // (parallel.tensor * parallel.pipeline)
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=data_parallel_size,
        virtual_pipeline=parallel.virtual_pipeline,
        num_microbatches=training.global_batch_size // (data_parallel_size * training.micro_batch_size),
        world_size=world_size,
    )


def _raise_if(problems: Iterable[str], source: object) -> None:
    lines = list(problems)
    if len(lines) == 1:
        raise UserError(f"{source}: {lines[0]}")
    if lines:
        raise UserError("\n".join([f"{source}: {len(lines)} problems", *(f"  {line}" for line in lines)]))


# ---- file and overrides ----


def _read_json(path: Path) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        doubled = sorted({key for key in keys if keys.count(key) > 1})
        if doubled:
            raise UserError(f"{path}: the key {doubled[0]!r} stands twice in one section; keep one of them")
        return dict(pairs)

    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=refuse_duplicates)
    except OSError as error:
        raise UserError(f"{path}: the config file cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8: {error.reason} at byte {error.start}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a JSON {type(values).__name__}; a config is an object, {{...}}")
    return values


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write each `section.key=value` into `values`; returns a line for each that cannot be written.

    A value that is JSON (8, true, null, [..]) is taken as such, anything else as text.
    """
    problems = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or len(keys) < 2 or not all(keys):
            problems.append(f"{override!r} is not of the form section.key=value, as in training.steps=100")
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        problem = _write(values, keys, value)
        if problem:
            problems.append(f"{dotted}: {problem}")
    return problems


def _write(values: dict[str, Any], keys: Sequence[str], value: Any) -> str | None:
    """Set values[k0][k1]... = value, making missing sections; returns what stands in the way, if anything."""
    place: Any = values
    for depth, name in enumerate(keys):
        key: Any = name
        if isinstance(place, list):
            if not name.isdecimal() or int(name) >= len(place):
                return f"{'.'.join(keys[:depth])} is a list of {len(place)} and has no element {name!r}"
            key = int(name)
        elif not isinstance(place, dict):
            return f"{'.'.join(keys[:depth])} is {place!r} and has no key {name!r}"
        elif depth < len(keys) - 1 and place.get(name) is None:
            place[name] = {}
        if depth == len(keys) - 1:
            place[key] = value
        else:
            place = place[key]
    return None


def _without_nulls(value: Any) -> Any:
    """`value` without the keys that are null: null means the default. DeepSpeed's dictionary keeps its own nulls."""
    if isinstance(value, dict):
        return {
            key: part if key == "deepspeed" else _without_nulls(part) for key, part in value.items() if part is not None
        }
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


# ---- field errors in our words ----


def _field_problems(error: ValidationError) -> list[str]:
    lines = []
    for detail in error.errors(include_url=False):
        location = detail["loc"]
        name = ".".join(str(part) for part in location) or "the file"
        if detail["type"] == "default_factory_not_called":
            continue  # follows from a problem with another field, which has its own line
        elif detail["type"] == "extra_forbidden":
            lines.append(f"{name}: unknown key{_suggestion(location)}")
        elif detail["type"] == "missing":
            lines.append(f"{name}: required, but not given")
        else:
            what = detail["msg"].removeprefix("Input ")
            what = (what[0].lower() + what[1:]).replace("tuple", "list").replace(" after validation", "")
            lines.append(f"{name}: {_shown(detail['input'])} is not valid; {what}")
    return lines


def _shown(value: Any, width: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= width else f"{text[:width]} ..."


def _suggestion(location: tuple[int | str, ...]) -> str:
    """What an unknown key at `location` may have been meant to be: the nearest field of its section, or all of them."""
    section: Any = Config
    for part in location[:-1]:
        if isinstance(part, str):
            section = _section_in(section.model_fields[part].annotation)
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(known)}"


def _section_in(annotation: Any) -> type[Section] | None:
    """The Section inside an annotation such as tuple[DataSource, ...] | None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


# ---- defaults and checks that span sections ----


def _with_defaults_across_sections(config: Config) -> Config:
    optimizer = config.optimizer
    if optimizer.schedule != "wsd" or optimizer.decay_steps is not None:
        return config
    decay_steps = max(1, config.training.steps // 10)
    return config.model_copy(update={"optimizer": optimizer.model_copy(update={"decay_steps": decay_steps})})


def _problems(config: Config) -> Iterable[str]:
    yield from _model_problems(config)
    yield from _tensor_parallel_problems(config)
    yield from _pipeline_problems(config)
    yield from _quantization_problems(config)
    yield from _fused_backward_problems(config)
    yield from _recompute_problems(config)
    yield from _cuda_graph_problems(config)
    yield from _state_bits_problems(config)
    yield from _schedule_problems(config)
    yield from _checkpoint_problems(config)
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
            f"parallel.context: {config.parallel.context} is not supported: in megatron-core attention over a split sequence "
            f"exists inside Transformer Engine only, its local attention stops on a context parallel size above 1; use 1, and "
            f"parallel.sequence = true with a larger parallel.tensor to divide long sequences"
        )
    if config.parallel.sequence:
        divided.append("seq_length")
        if tensor == 1:
            yield "parallel.sequence: true needs parallel.tensor > 1, which is 1; use false or raise parallel.tensor"
    for name in divided:
        value = getattr(model, name)
        if value % tensor:
            nearest = _nearest(value, tensor)
            yield f"model.{name}: {value} is not divisible by parallel.tensor = {tensor}; nearest: {nearest}"
    for name in ("hidden_size", "ffn_hidden_size"):
        value, unit = getattr(model, name), CODES_PER_GROUP * tensor
        if value % unit:
            yield (
                f"model.{name}: {value} is not divisible by {CODES_PER_GROUP} * parallel.tensor = {unit}; a packed "
                f"byte and a Philox draw hold {CODES_PER_GROUP} codes of one rank's part of a row; "
                f"nearest: {_nearest(value, unit)}"
            )


def _pipeline_problems(config: Config) -> Iterable[str]:
    layers, pipeline, virtual = config.model.num_layers, config.parallel.pipeline, config.parallel.virtual_pipeline
    if virtual is not None and pipeline == 1:
        yield (
            f"parallel.virtual_pipeline: {virtual} chunks need parallel.pipeline > 1, which is 1; "
            f"leave virtual_pipeline out or raise parallel.pipeline"
        )
    chunks = config.parallel.chunks
    if layers % chunks:
        product = f"parallel.pipeline = {pipeline}"
        if virtual:
            product += f" * parallel.virtual_pipeline = {virtual}, {chunks} chunks"
        yield f"model.num_layers: {layers} is not divisible by {product}; nearest: {_nearest(layers, chunks)}"


def _quantization_problems(config: Config) -> Iterable[str]:
    quantization = config.quantization
    if quantization.method != "dqt" and config.optimizer.name == "adafactor":
        yield (
            f'optimizer.name: adafactor updates low-bit weights only, and quantization.method = "{quantization.method}" '
            f'has none; use "adamw", or method "dqt"'
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
            f'quantization.compute: "{quantization.compute}" does not go with quantization.method = "{quantization.method}", '
            f'whose weights are no low-bit codes; use "bf16" or "fp32", or method "dqt"'
        )
    elif (quantization.compute == "fp8") != (quantization.activation == "e4m3"):
        yield (
            f'quantization.activation: "{quantization.activation}" does not go with quantization.compute = '
            f'"{quantization.compute}": e4m3 is the operand of fp8 products and of no others; leave it out'
        )
    elif quantization.compute == "int8" and quantization.activation != "int8":
        yield (
            f'quantization.activation: "{quantization.activation}" does not go with quantization.compute = "int8", whose '
            f'products take int8 codes; use "int8"'
        )
    if quantization.method == "dqt" and quantization.compute == "fp8":
        if quantization.bits not in ("ternary", 2, 3, 4):
            yield (
                f'quantization.compute: "fp8" holds codes of up to 4 bits exactly, quantization.bits is {quantization.bits}; '
                f'use "bf16"'
            )
        yield from _fp8_shape_problems(config)


def _fp8_shape_problems(config: Config) -> Iterable[str]:
    """Both dimensions of every product are whole 16-byte vectors of fp8: torch._scaled_mm takes nothing else."""
    model, tensor = config.model, config.parallel.tensor
    key_value = model.hidden_size // model.num_attention_heads * model.num_query_groups
    tokens = config.training.micro_batch_size * model.seq_length
    if tokens % 16:
        yield (
            f"model.seq_length: {model.seq_length} * training.micro_batch_size = {config.training.micro_batch_size} gives {tokens} "
            f"tokens, over which fp8 products of weight gradients sum in multiples of 16; use a multiple of 16"
        )
    widths = {"hidden_size": model.hidden_size, "ffn_hidden_size": model.ffn_hidden_size, "num_query_groups": key_value}
    if config.quantization.embeddings:
        widths["vocab_size"] = model.vocab_size  # the head is a low-bit product too
    for name, width in widths.items():
        if width % (16 * tensor):
            meant = f" (keys of width {width})" if name == "num_query_groups" else ""
            yield (
                f"model.{name}: {getattr(model, name)}{meant} gives {width / tensor:g} features a rank, which fp8 products need "
                f"in multiples of 16; nearest: {_nearest(width, 16 * tensor)}"
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
            f'optimizer.fused_backward: true does not go with quantization.method = "{config.quantization.method}", which has '
            f"no low-bit weights; use false"
        )


def _recompute_problems(config: Config) -> Iterable[str]:
    layers = config.training.recompute_layers
    if layers is None:
        return
    if config.training.recompute == "none":
        yield (
            f'training.recompute_layers: {layers} blocks are to compute again, but training.recompute = "none" says nothing of them '
            f'does; use recompute = "mlp" or "full", or leave recompute_layers out'
        )
    if layers > config.layers_of_chunk:
        yield (
            f"training.recompute_layers: {layers} is more than the {config.layers_of_chunk} blocks of a pipeline stage; use at most "
            f"{config.layers_of_chunk}"
        )


def _cuda_graph_problems(config: Config) -> Iterable[str]:
    if config.training.cuda_graph is True:
        yield from _cuda_graph_obstacles(config)


def _cuda_graph_obstacles(config: Config) -> Iterator[str]:
    what = "training.cuda_graph: true"
    for name in ("tensor", "pipeline"):
        size = getattr(config.parallel, name)
        if size > 1:
            yield f"{what} records the work of one rank, but parallel.{name} = {size} makes ranks exchange activations; use false"
    if config.zero_stage > 1:
        yield (
            f"{what} needs gradients and weights that stay where they are, but ZeRO stage {config.zero_stage} moves them in the "
            f"backward pass; use deepspeed.zero_optimization.stage = 1, or false"
        )
    if config.optimizer.fused_backward:
        yield (
            f"{what} does not go with optimizer.fused_backward = true: step and rate of an update change, what is recorded does "
            f"not; use one of the two"
        )
    if config.optimizer.gradient_reduction == "micro_batch":
        yield (
            f'{what} does not go with optimizer.gradient_reduction = "micro_batch", which sums over ranks in every backward pass; '
            f'use "step", or false'
        )
    if config.training.recompute != "none":
        yield (
            f'{what} does not go with training.recompute = "{config.training.recompute}": megatron-core sets generators back on the '
            f'host before it computes again; use recompute = "none", or false'
        )


def _state_bits_problems(config: Config) -> Iterable[str]:
    optimizer, model, tensor = config.optimizer, config.model, config.parallel.tensor
    if optimizer.state_bits == 32:
        return
    if optimizer.name != "adamw":
        yield f'optimizer.state_bits: {optimizer.state_bits} is for optimizer.name = "adamw"; use 32'
    for name in ("hidden_size", "ffn_hidden_size"):
        value, unit = getattr(model, name), STATE_BLOCK * tensor
        if value % unit:
            yield (
                f"model.{name}: {value} is not divisible by {STATE_BLOCK} * parallel.tensor = {unit}, as optimizer.state_bits = "
                f"{optimizer.state_bits} needs: a block of {STATE_BLOCK} columns shares a scale; nearest: {_nearest(value, unit)}"
            )


def _schedule_problems(config: Config) -> Iterable[str]:
    optimizer, steps = config.optimizer, config.training.steps
    warmup, decay = optimizer.warmup_steps, optimizer.decay_steps
    if warmup > steps:
        yield f"optimizer.warmup_steps: {warmup} is more than training.steps = {steps}; use at most {steps}"
    elif optimizer.schedule == "wsd" and decay is not None and warmup + decay > steps:
        yield (
            f"optimizer.decay_steps: {decay} + optimizer.warmup_steps = {warmup} is more than training.steps = "
            f"{steps}; use a decay of at most {steps - warmup}, or a shorter warm-up"
        )


def _checkpoint_problems(config: Config) -> Iterable[str]:
    every, interval = config.checkpoint.keep_every, config.checkpoint.interval
    if every is not None and interval and every % interval:
        yield (
            f"checkpoint.keep_every: {every} is not a multiple of checkpoint.interval = {interval}, so steps to keep "
            f"would never be saved; nearest: {_nearest(every, interval)}"
        )


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

REDUCTION_KEYS = ("reduce_scatter", "reduce_bucket_size", "contiguous_gradients", "round_robin_gradients")
"""Keys of zero_optimization about the reduction of gradients, which is not DeepSpeed's here."""

OPTIMIZER_DEVICES = ("none", "cpu")


def _deepspeed_problems(config: Config) -> Iterable[str]:
    for key in config.deepspeed:
        if key in DERIVED_DEEPSPEED_KEYS:
            yield f"deepspeed.{key}: is derived, so that two fields cannot disagree; use {DERIVED_DEEPSPEED_KEYS[key]}"
        elif key != "zero_optimization" and difflib.get_close_matches(key, ["zero_optimization"], cutoff=0.8):
            # DeepSpeed ignores top-level keys that it does not know: a slip here would train without ZeRO in silence.
            yield f"deepspeed.{key}: unknown key; did you mean 'zero_optimization'?"
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield f'deepspeed.zero_optimization: {_shown(zero)} is not valid; should be an object such as {{"stage": 1}}'
        return
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        yield f"deepspeed.zero_optimization.stage: {_shown(stage)} is not valid; use 0, 1, 2 or 3"
        return
    if stage >= 2 and config.parallel.pipeline > 1:
        yield (
            f"deepspeed.zero_optimization.stage: {stage} does not go with parallel.pipeline = {config.parallel.pipeline}: a "
            f"pipeline needs many micro-batches, so gradients (2) would stay whole or travel once for each of them and weights "
            f"(3) be gathered once for each (DeepSpeed refuses it too); use 1, which is enough here because low-bit weights "
            f"are 8 times smaller than bf16 ones, or parallel.pipeline = 1"
        )
    for key in REDUCTION_KEYS:
        if key in zero:
            yield (
                f"deepspeed.zero_optimization.{key}: has no effect, as gradients are not reduced by DeepSpeed but in one "
                f"order for all ZeRO stages; leave it out"
            )
    yield from _offload_problems(config, zero, stage)


def _offload_problems(config: Config, zero: dict[str, Any], stage: int) -> Iterable[str]:
    name = "deepspeed.zero_optimization.offload_optimizer"
    if "offload_param" in zero:
        yield (
            "deepspeed.zero_optimization.offload_param: is not supported; low-bit weights take a quarter of a byte on the "
            "device, so leave it out and offload the optimizer's state"
        )
    offload = zero.get("offload_optimizer", {})
    if not isinstance(offload, dict) or offload.get("device", "none") not in OPTIMIZER_DEVICES:
        yield f'{name}: {_shown(offload)} is not valid; should be {{"device": "cpu", "pin_memory": true}}, or left out'
        return
    if not config.offloads_optimizer:
        return
    if stage == 0:
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
            f"{training.global_batch_size} makes {num_microbatches}; use training.global_batch_size = {samples_of_one_pass}"
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
    return ", ".join(str(candidate) for candidate in range(1, value + 1) if value % candidate == 0)
