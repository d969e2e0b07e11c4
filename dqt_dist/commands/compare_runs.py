"""Draws several runs into one picture, and prints what differs in their configs.

RUN is a run folder, or NAME=RUN to give it another name. The picture shows loss against tokens and against time, flips,
throughput and memory.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dqt_dist.command_line import drawing, make_parser, run_tool, save_picture, short_name
from dqt_dist.errors import UserError

EXAMPLES = """\
examples:
  %(prog)s runs/ternary runs/bf16                                  writes compare_runs.png
  %(prog)s "rate 1e-3=runs/a" "rate 2e-3=runs/b" --output rates.png --title "134 M weights"

what is drawn:
  Lines are training losses and dots are validation losses, in nats per token. Time is that of the training steps:
  tokens over tokens/s, summed; validations and saves are not counted. Flips are the share of codes that the step
  changed. Memory is the peak of the rank that needs most: of the GPU, or of the process on a CPU.

A line of metrics.jsonl that is damaged, or missing, is a warning. Exit code 2 and one message: a RUN without
metrics.jsonl, without a logged step in it, or a picture that cannot be written.
"""

ONLY_A_NAME = ("checkpoint.dir",)
"""Fields that differ between any two runs and say nothing."""


@dataclass(frozen=True)
class Run:
    """What one run folder holds."""

    name: str
    steps: list[dict[str, Any]]
    """The logged steps, in order."""
    valid: list[dict[str, Any]]
    """The validations, in order."""
    settings: dict[str, Any] | None
    """config.json by section.key, or None where it cannot be read."""

    def column(self, name: str) -> list[float]:
        """A value per logged step; NaN where a line lacks it."""
        from dqt_dist.training.metrics_file import number

        return [number(line, name) for line in self.steps]

    @property
    def millions(self) -> list[float]:
        """Tokens up to each logged step, in millions."""
        return [tokens / 1e6 for tokens in self.column("tokens")]

    @property
    def hours(self) -> list[float]:
        """Time in training steps up to each logged step."""
        hours, before, found = 0.0, 0.0, []
        for tokens, speed in zip(self.column("tokens"), self.column("tokens_per_s"), strict=True):
            if speed > 0 and not math.isnan(tokens):
                hours, before = hours + (tokens - before) / speed / 3600, tokens
            found.append(hours)
        return found


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("dqt-compare", __doc__, EXAMPLES)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder, or NAME=RUN")
    picture = "the picture (default: compare_runs.png)"
    add("--output", type=Path, default=Path("compare_runs.png"), metavar="FILE.png", help=picture)
    add("--title", default="", help="of the picture")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    pyplot = drawing("--output", args.output)
    runs = [read(text) for text in args.runs]
    print(differences(runs))
    save_picture(draw(pyplot, runs, args.title), args.output)
    print(f"drew {args.output}")


def read(text: str) -> Run:
    """The run of one argument; a warning for each thing that is missing from its files. Raises UserError."""
    from dqt_dist.training.metrics_file import METRICS_FILE, read_lines

    name, equals, path = text.partition("=")
    if not equals or Path(text).is_dir():
        name = path = text
    folder = Path(path)
    if not (folder / METRICS_FILE).is_file():
        raise UserError(f"{folder}: holds no {METRICS_FILE}; give the folder that checkpoint.dir of a run names")
    lines, damaged = read_lines(folder)
    if damaged:
        warn(f"{damaged} lines of {folder / METRICS_FILE} are damaged and left out")
    found = Run(
        name,
        [line for line in lines if "loss" in line],
        [line for line in lines if "valid_loss" in line],
        read_settings(folder / "config.json"),
    )
    if not found.steps:
        raise UserError(f"{folder / METRICS_FILE}: holds no logged step; give a run that has made one")
    warn_of_gaps(found, folder / METRICS_FILE)
    return found


def read_settings(path: Path) -> dict[str, Any] | None:
    """config.json by section.key as --set names it. Not checked: a config of another version compares as well."""
    from dqt_dist.json_files import parse_json

    def flat(value: Any, name: str) -> dict[str, Any]:
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        nested = [flat(part, f"{name}.{key}" if name else str(key)) for key, part in parts]
        return {key: leaf for part in nested for key, leaf in part.items()} or {name: value}

    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        warn(f"{path}: cannot be read and is not compared: {error}")
        return None
    return flat(values, "")


def warn_of_gaps(found: Run, path: Path) -> None:
    """Warns where more steps lie between two lines than logging.interval says."""
    interval = (found.settings or {}).get("logging.interval")
    steps = [line["step"] for line in found.steps]
    if not isinstance(interval, int):
        return
    gaps = [f"{first} to {second}" for first, second in pairwise(steps) if second - first > interval]
    if gaps:
        more = f" and {len(gaps) - 1} more" if len(gaps) > 1 else ""
        warn(f"{path}: no line between steps {gaps[0]}{more}, logging.interval is {interval}")


def warn(text: str) -> None:
    print(f"{short_name('dqt-compare')}: warning: {text}", file=sys.stderr)


def differences(runs: list[Run]) -> str:
    """A table: a row per field whose value is not the same in all runs, a column per run."""
    compared = [(found.name, found.settings) for found in runs if found.settings is not None]
    names = dict.fromkeys(name for _, settings in compared for name in settings if name not in ONLY_A_NAME)
    rows = []
    for name in names:
        values = [json.dumps(settings[name]) if name in settings else "-" for _, settings in compared]
        if len(set(values)) > 1:
            rows.append([name, *values])
    if not rows:
        return f"the configs of {len(compared)} runs do not differ"
    rows = [["differs", *(name for name, _ in compared)], *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def draw(pyplot: Any, runs: list[Run], title: str) -> Any:
    """A figure of five panels and a legend."""
    import numpy

    from dqt_dist.training.metrics_file import number

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    by_tokens, by_time, flips, speed, memory, legend = axes.flat
    for found in runs:
        millions, steps = found.millions, found.column("step")
        valid_steps, valid = (
            [line["step"] for line in found.valid],
            [number(line, "valid_loss") for line in found.valid],
        )
        label = f"{found.name}: validation {valid[-1]:.4f} at step {valid_steps[-1]:,}" if valid else found.name
        for panel, places in ((by_tokens, millions), (by_time, found.hours)):
            (curve,) = panel.plot(places, found.column("loss"), lw=1, alpha=0.6)
            # A validation may lie between two logged steps.
            panel.plot(numpy.interp(valid_steps, steps, places), valid, "o-", ms=4, color=curve.get_color())
        # Zeros have no place on a logarithmic axis: the last step of a cosine to 0 changes no code.
        changed = [share or math.nan for share in found.column("flip_rate")]
        flips.plot(millions, changed, lw=1)
        speed.plot(millions, found.column("tokens_per_s"), lw=1)
        memory.plot(millions, [held / 2**30 for held in found.column("peak_memory_bytes")], lw=1)
        legend.plot([], [], label=label)
    tokens = "tokens, millions"
    by_tokens.set(xlabel=tokens, ylabel="loss, nats per token", title="training (line), validation (dots)")
    by_time.set(xlabel="time in training steps, hours", ylabel="loss, nats per token", title="the same against time")
    flips.set(xlabel=tokens, ylabel="share of codes changed in a step", title="flips")
    if any(share > 0 for found in runs for share in found.column("flip_rate")):
        flips.set_yscale("log")
    speed.set(xlabel=tokens, ylabel="tokens/s", title="throughput", ylim=(0, None))
    memory.set(xlabel=tokens, ylabel="GiB", title="peak memory of a rank", ylim=(0, None))
    for panel in axes.flat[:-1]:
        panel.grid(alpha=0.3)
    legend.axis("off")
    legend.legend(loc="upper left")
    figure.suptitle(title)
    return figure


def main(argv: list[str] | None = None) -> int:
    return run_tool("dqt-compare", run, parse_arguments(argv))
