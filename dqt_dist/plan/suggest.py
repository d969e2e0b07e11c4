"""Layouts that fit a number of GPUs, best first by the expected time of a step.

Tried are the products of these choices that the config's checks allow; batch, model and method stay as they are:

    parallel.tensor, with sequence parallelism     powers of two up to 8, the GPUs of one machine
    parallel.pipeline                              the divisors of the number of GPUs
    deepspeed.zero_optimization.stage              0 to 3
    training.micro_batch_size                      powers of two
    training.recompute                             none, mlp, full

Of each (tensor, pipeline) only the best is shown. Micro-batches of fewer tokens than were ever measured are taken only
where nothing else fits: the expected time knows nothing of kernels that become too short.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dqt_dist.config import Config, load_config, process_grid
from dqt_dist.errors import UserError
from dqt_dist.plan.arithmetic import RESERVED_GIB, Device
from dqt_dist.plan.footprint import largest_footprint
from dqt_dist.plan.report import fits
from dqt_dist.plan.speed import expected_speed

TENSOR_SIZES = (1, 2, 4, 8)
ZERO_STAGES = (0, 1, 2, 3)
MEASURED_TOKENS = 4096
"""Tokens of the smallest micro-batch that was measured on one GPU or more: 2 * 2048, at PP 2 (docs/planning.md)."""
TYPICAL_TOKENS = 16_384
"""Tokens of the micro-batches that docs/benchmarks/train_step.md measured."""
LINES = 5


@dataclass(frozen=True)
class Suggestion:
    """One layout."""

    tensor: int
    pipeline: int
    settings: tuple[str, ...]
    """The arguments of --set that choose it: those that say something else than the config."""
    seconds: float
    tokens_per_second: float
    measured: bool
    """Whether the speed comes from a measurement of this layout."""
    memory_bytes: int
    tokens: int
    """Of a micro-batch."""

    @property
    def rank(self) -> tuple[bool, float, float, int]:
        """Sorts the best first. Of equally fast ones first the one whose micro-batch is nearest to that of which the
        speed is known, then the one that needs least memory."""
        distance = abs(math.log2(self.tokens / TYPICAL_TOKENS))
        return self.tokens < MEASURED_TOKENS, round(self.seconds, 4), distance, self.memory_bytes


def suggestions(
    path: str | Path,
    overrides: Sequence[str],
    world_size: int,
    device: Device,
    stages: Sequence[int] = ZERO_STAGES,
) -> list[Suggestion]:
    """The best layout of each (tensor, pipeline), best first, at most `LINES`; none when nothing fits. `stages` are the
    ZeRO stages that are tried.

    Raises `UserError` for a config whose speed was not measured, which has no order.
    """
    config = load_config(path, overrides)
    if config.quantization.compute == "fp32":
        raise UserError(
            f'{path}: quantization.compute: "fp32" was not measured on a GPU, so layouts have no order; use "bf16"'
        )
    best: dict[tuple[int, int], Suggestion] = {}
    for settings in _candidates(config, world_size, stages):
        found = _evaluate(path, overrides, settings, world_size, device)
        if found is None:
            continue
        axes = (found.tensor, found.pipeline)
        if axes not in best or found.rank < best[axes].rank:
            best[axes] = found
    return sorted(best.values(), key=lambda suggestion: suggestion.rank)[:LINES]


def show_suggestions(path: str | Path, overrides: Sequence[str], world_size: int, device: Device) -> str:
    """The suggestions as text, one line each: what to expect, and the arguments."""
    found = suggestions(path, overrides, world_size, device)
    if not found:
        return f"nothing fits {world_size} {device.name} of {device.memory_gib} - {RESERVED_GIB} GiB"
    lines = [
        f"{suggestion.tokens_per_second:>12,.0f} tokens/s{'' if suggestion.measured else '?'}"
        f" {suggestion.memory_bytes / 2**30:6.1f} GiB  "
        + (" ".join(f"--set {setting}" for setting in suggestion.settings) or "as configured")
        for suggestion in found
    ]
    return "\n".join(
        [f"layouts for {world_size} {device.name}, best first; tokens/s? is unmeasured, and --plan says why", *lines]
    )


def _settings(tensor: int, sequence: bool, pipeline: int, stage: int, micro_batch: int, recompute: str) -> list[str]:
    return [
        f"parallel.tensor={tensor}",
        f"parallel.sequence={'true' if sequence else 'false'}",
        f"parallel.pipeline={pipeline}",
        f"deepspeed.zero_optimization.stage={stage}",
        f"training.micro_batch_size={micro_batch}",
        f"training.recompute={recompute}",
    ]


def _candidates(config: Config, world_size: int, stages: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """The settings of each layout that divides GPUs, layers and batch."""
    parallel, training, stage = config.parallel, config.training, config.zero_stage
    layout = (parallel.tensor, parallel.sequence, parallel.pipeline)
    present = _settings(*layout, stage, training.micro_batch_size, training.recompute)
    for tensor in (size for size in TENSOR_SIZES if world_size % size == 0):
        rest = world_size // tensor
        pipelines = [size for size in range(1, rest + 1) if rest % size == 0 and config.model.num_layers % size == 0]
        for pipeline, stage, recompute in itertools.product(pipelines, stages, ("none", "mlp", "full")):
            for micro_batch in (2**power for power in range(10)):
                if training.global_batch_size % (micro_batch * rest // pipeline) == 0:
                    settings = _settings(tensor, tensor > 1, pipeline, stage, micro_batch, recompute)
                    yield tuple(setting for setting in settings if setting not in present)


def _evaluate(
    path: str | Path, overrides: Sequence[str], settings: tuple[str, ...], world_size: int, device: Device
) -> Suggestion | None:
    """None for settings that the config's checks refuse, or that do not fit."""
    try:
        config = load_config(path, [*overrides, *settings])
        grid = process_grid(config, world_size)
    except UserError:
        return None
    memory = largest_footprint(config, grid)
    if not fits(memory, device):
        return None
    speed = expected_speed(config, grid, device)
    assert speed is not None, "the precision was measured"
    tokens = config.training.micro_batch_size * config.model.seq_length
    axes = (grid.tensor, grid.pipeline)
    return Suggestion(*axes, settings, speed.seconds, speed.tokens_per_second, speed.measured, memory.total, tokens)
