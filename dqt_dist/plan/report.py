"""The plan as text, for two options of launchers/pretrain.py.

describe   layout, batch, and memory against a device: --dry-run
plan       the same with every kind, traffic and expected speed, and method none beside it: --plan
"""

from __future__ import annotations

from dataclasses import dataclass

from dqt_dist.config import Config, OptimizerConfig, ProcessGrid, QuantizationConfig, process_grid
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.plan.arithmetic import RESERVED_GIB, Device, flops_per_token
from dqt_dist.plan.footprint import Footprint, largest_footprint
from dqt_dist.plan.memory import largest_rank
from dqt_dist.plan.speed import Speed, expected_speed
from dqt_dist.plan.traffic import COUNTED, UNCOUNTED, bytes_sent

LABEL_WIDTH, COLUMN_WIDTH = 26, 16
SECONDS_PER_DAY = 86_400
MOMENTS = {
    "begin": "when the last backward pass of a step begins",
    "end": "when the backward passes of a step end",
    "update": "during the update",
}


def describe(config: Config, world_size: int, device: Device | None = None) -> str:
    """The short form. Raises `UserError` when the config does not fit `world_size` processes."""
    column = _Column.of("", config, world_size, None)
    lines = [*_header(config, column.grid), "", *_memory([column], device), f"run folder      {config.checkpoint.dir}"]
    return "\n".join(lines)


def plan(config: Config, world_size: int, device: Device) -> str:
    """The long form. Raises `UserError` as `describe`."""
    columns = [
        _Column.of("as configured", config, world_size, device),
        _Column.of("method none", without_codes(config), world_size, device),
    ]
    grid = columns[0].grid
    lines = [*_header(config, grid), f"run folder      {config.checkpoint.dir}"]
    lines += ["", *_weights(columns), "", *_memory(columns, device), "", *_traffic(columns)]
    lines += ["", *_speed(columns, config, device)]
    return "\n".join(lines)


def without_codes(config: Config) -> Config:
    """The same run with ordinary weights: method none, in bf16 unless the run is in fp32."""
    quantization = QuantizationConfig(method="none", compute=config.quantization.dtype)
    ordinary = {"name": "adamw", "second_moment": "full", "state_bits": 32}
    ordinary["fused_backward"] = False
    optimizer = OptimizerConfig(**(config.optimizer.model_dump(exclude_none=True) | ordinary))
    return config.model_copy(update={"quantization": quantization, "optimizer": optimizer})


@dataclass(frozen=True)
class _Column:
    """One run of the table."""

    title: str
    config: Config
    grid: ProcessGrid
    memory: Footprint
    sent: dict[str, int]
    speed: Speed | None

    @classmethod
    def of(cls, title: str, config: Config, world_size: int, device: Device | None) -> _Column:
        grid = process_grid(config, world_size)
        memory = largest_footprint(config, grid)
        speed = None if device is None else expected_speed(config, grid, device)
        return cls(title, config, grid, memory, bytes_sent(config, grid, memory.stage), speed)


def _row(label: str, cells: list[str]) -> str:
    return (f"{label:{LABEL_WIDTH}}" + "".join(f"{cell:>{COLUMN_WIDTH}}" for cell in cells)).rstrip()


def _header(config: Config, grid: ProcessGrid) -> list[str]:
    model, quantization, training = config.model, config.quantization, config.training
    tokens = training.global_batch_size * model.seq_length
    interleaved = f", {grid.virtual_pipeline} chunks a stage" if grid.virtual_pipeline else ""
    return [
        f"processes       {grid.world_size} = tensor {grid.tensor} * pipeline {grid.pipeline}{interleaved}"
        f" * data {grid.data}, ZeRO stage {config.zero_stage}",
        f"batch           {training.global_batch_size} samples = data {grid.data} * micro batch "
        f"{training.micro_batch_size} * {grid.num_microbatches} micro-batches; {tokens:,} tokens a step",
        f"length          {training.steps:,} steps, {training.steps * tokens:,} tokens",
        f"method          {quantization.method}, compute {quantization.compute}, activations "
        f"{quantization.activation}, recompute {training.recompute}",
    ]


def _weights(columns: list[_Column]) -> list[str]:
    """Weights of the whole model."""
    model = columns[0].config.model
    linear, vocabulary = model.num_layers * model.linear_weights_per_block, 2 * model.vocab_size * model.hidden_size
    norms = (2 * model.num_layers + 1) * model.hidden_size
    norms += model.num_layers * (model.hidden_size + model.ffn_hidden_size) if model.sub_norm else 0
    low_bit = [
        (linear if column.config.quantization.method == "dqt" else 0)
        + (vocabulary if column.config.quantization.embeddings else 0)
        for column in columns
    ]
    total = linear + vocabulary + norms
    return [
        _row("weights", [column.title for column in columns]),
        _row("  low-bit", [f"{count:,}" for count in low_bit]),
        _row("  other", [f"{total - count:,}" for count in low_bit]),
        _row("  all", [f"{total:,}"] * len(columns)),
    ]


def _memory(columns: list[_Column], device: Device | None) -> list[str]:
    footprints = [column.memory for column in columns]
    unit, power = ("GiB", 30) if max(footprint.total for footprint in footprints) >= 2**30 else ("MiB", 20)

    def cells(sizes: list[int]) -> list[str]:
        return [f"{size / 2**power:,.2f}" for size in sizes]

    lines = [_row(f"{unit} of the largest rank", [column.title for column in columns])]
    of_kind = [footprint.kinds() for footprint in footprints]
    for kind in of_kind[0]:
        if any(kinds[kind] for kinds in of_kind):
            lines.append(_row(f"  {kind}", cells([kinds[kind] for kinds in of_kind])))
    lines.append(_row("  all", cells([footprint.total for footprint in footprints])))
    if any(footprint.on_host for footprint in footprints):
        lines.append(_row("  beside, on the host", cells([footprint.on_host for footprint in footprints])))
    if device is not None:
        verdicts = ["fits" if fits(footprint, device) else "does not fit" for footprint in footprints]
        lines.append(_row(f"  {device.name}, {device.memory_gib} - {RESERVED_GIB} GiB", verdicts))
    weights, low_bit = largest_rank(columns[0].config), of_kind[0]["codes"]
    bits = make_grid(columns[0].config.quantization.bits).storage_bits
    kind = f"{bits}-bit codes" if low_bit else columns[0].config.quantization.dtype
    moment = footprints[0]
    return [
        *lines,
        f"  fullest in pipeline stage {moment.stage}, {MOMENTS[moment.moment]}; activations and scratch are estimates",
        f"  the last stage holds {weights.linear:,} weights in linears as {kind}, {weights.other:,} in embedding, head "
        f"and norms",
    ]


def fits(footprint: Footprint, device: Device) -> bool:
    """Whether a rank's memory is in the device's, less what is reserved."""
    return footprint.total <= (device.memory_gib - RESERVED_GIB) * 2**30


def _traffic(columns: list[_Column]) -> list[str]:
    lines = [_row("MB a rank sends in a step", [column.title for column in columns])]
    for kinds, counted in ((COUNTED, ""), (UNCOUNTED, " (uncounted)")):
        for kind in kinds:
            if any(column.sent[kind] for column in columns):
                name = f"  {kind.replace('_', ' ')}{counted}"
                lines.append(_row(name, [f"{column.sent[kind] / 1e6:,.1f}" for column in columns]))
    lines.append(_row("  all", [f"{sum(column.sent.values()) / 1e6:,.1f}" for column in columns]))
    return lines


def _speed(columns: list[_Column], config: Config, device: Device) -> list[str]:
    tokens = config.training.global_batch_size * config.model.seq_length
    speeds = [column.speed for column in columns if column.speed is not None]
    teraflops = f"{tokens * flops_per_token(config.model) / 1e12:,.1f}"
    lines = [
        _row(f"expected on {columns[0].grid.world_size} {device.name}", [column.title for column in columns]),
        _row("  model TFLOP a step", [teraflops] * len(columns)),
    ]
    if len(speeds) < len(columns):
        return [*lines, "  speed: unmeasured, as no run in fp32 was measured on a GPU"]
    days = config.training.steps / SECONDS_PER_DAY
    lines += [
        _row("  seconds a step", [f"{speed.seconds:,.3f}" for speed in speeds]),
        _row("  tokens/s", [f"{speed.tokens_per_second:,.0f}" for speed in speeds]),
        _row("  MFU", [f"{speed.mfu:.3f}" for speed in speeds]),
        _row("  days for all steps", [f"{speed.seconds * days:,.2f}" for speed in speeds]),
    ]
    shared = [note for note in speeds[0].notes if all(note in speed.notes for speed in speeds)]
    for column, speed in zip(columns, speeds, strict=True):
        lines += [f"  {column.title}: {note}" for note in speed.notes if note not in shared]
    return lines + [f"  both: {note}" for note in shared]
