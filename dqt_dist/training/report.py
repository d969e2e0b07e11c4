"""The report at the end of a run: results, cost, where the files are, what to do next.

dqt_dist/commands/pretrain.py shows the parts in order: summary, sample, next.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dqt_dist.command_line import as_typed
from dqt_dist.config import Config


def last_checkpoint(summary: dict[str, Any], config: Config) -> Path:
    """The checkpoint that a finished run leaves."""
    return Path(config.checkpoint.dir) / "checkpoints" / f"step_{summary['steps']:08d}"


def show_summary(summary: dict[str, Any], config: Config) -> None:
    """Prints the table of a finished run."""
    table = Table(title=f"{summary['parameters']:,} weights after {summary['tokens']:,} tokens", show_header=False)
    for name, value in _rows(summary, config):
        table.add_row(name, value)
    Console().print(table)


def show_divergence(summary: dict[str, Any]) -> None:
    """Prints, for a run that diverged, that it did."""
    if summary.get("diverged"):
        _line(
            f"the run diverged: its validation loss of {summary['valid_loss']:.4g} is above that of a uniform guess, "
            f"{summary['uniform_loss']:.3f} nats per token; a lower learning rate may help"
        )


def show_sample(text: str | None, explanation: str, prompt: str) -> None:
    """Prints `text`, a continuation of the prompt, in a panel unless it is None, and then `explanation`."""
    if text is not None:
        Console().print(Panel(Text(text), title="what it writes", subtitle=Text(f"prompt: {prompt}")))
    _line(explanation)


def show_next(config: Config) -> None:
    """Prints the commands that use what the run has left, and how it goes on."""
    run = Path(config.checkpoint.dir)
    checkpoint, export = shlex.quote(str(run)), shlex.quote(str(run / "export"))
    prompt = shlex.quote(config.training.sample_prompt or "A list is")
    commands = [
        f"{as_typed('dqt-generate')} --checkpoint {checkpoint} --prompt {prompt}",
        f"{as_typed('dqt-convert')} --checkpoint {checkpoint} --output {export}",
        f"the command of this run with --set training.steps={2 * config.training.steps} goes on from here",
    ]
    if config.data.valid is not None:
        valid = shlex.quote(config.data.valid[0].path)
        commands.insert(0, f"{as_typed('dqt-evaluate')} --checkpoint {checkpoint} --data {valid}")
    if config.logging.tensorboard:
        commands.insert(0, f"tensorboard --logdir {shlex.quote(str(run / 'tb'))}")
    for lead, command in zip(["next: ", *["      "] * len(commands)], commands, strict=False):
        _line(lead + command)


def _line(text: str) -> None:
    """Prints one line, whatever the width of the terminal. Brackets in the text are no markup."""
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


def _rows(summary: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    layout = summary["layout"]
    first, last = summary["first_loss"], summary["last_loss"]
    losses = "not recorded in metrics.jsonl" if first is None else f"{first:.3f} -> {last:.3f} nats per token"
    speed = summary["tokens_per_s"]
    tokens_per_s = "not recorded in metrics.jsonl" if speed is None else f"{speed:,.0f} tokens/s"
    training = config.training
    scored = f"{training.eval_batches * training.global_batch_size * config.model.seq_length:,} tokens"
    rows = [
        ("loss, first to last step", losses),
        ("validation", f"loss {summary['valid_loss']:.3f}, perplexity {summary['valid_perplexity']:.1f}, {scored}"),
        *((f"validation, {name}", f"loss {value:.3f}") for name, value in summary["valid_text_losses"].items()),
        ("speed", f"{tokens_per_s}, {summary['steps']} steps"),
        ("layout", f"tensor {layout['tensor']} x pipeline {layout['pipeline']} x data {layout['data']}"),
    ]
    breakdown = summary["static_bytes_breakdown"]
    if breakdown:
        parts = ", ".join(f"{kind} {value:.3f}" for kind, value in breakdown.items() if value)
        rows.append(("low-bit weights", f"{summary['low_bit_parameters']:,}"))
        rows.append(
            ("bytes per low-bit weight", f"{summary['static_bytes_per_low_bit_weight']:.3f} ({parts}), measured")
        )
    rows.append(("TensorBoard files", str(Path(config.checkpoint.dir) / "tb")))
    rows.append(("checkpoint", str(last_checkpoint(summary, config))))
    return rows
