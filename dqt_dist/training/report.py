"""The report at the end of a run: what was learned, what it took, where things are, what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dqt_dist.config import Config


def show(summary: dict[str, Any], sample: str | None, config: Config) -> None:
    """Prints the report of a finished run."""
    console = Console()
    folder = Path(config.checkpoint.dir)
    table = Table(title=f"{summary['parameters']:,} weights after {summary['tokens']:,} tokens", show_header=False)
    for name, value in _rows(summary, folder):
        table.add_row(name, value)
    console.print(table)
    if sample is not None:
        console.print(Panel(Text(sample), title="what it writes", subtitle=f"prompt: {config.training.sample_prompt}"))
    console.print(f"next: tensorboard --logdir {folder / 'tb'}", highlight=False, soft_wrap=True)


def _rows(summary: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    layout = summary["layout"]
    rows = [
        ("loss, first to last step", f"{summary['first_loss']:.3f} -> {summary['last_loss']:.3f} nats a token"),
        ("validation", f"loss {summary['valid_loss']:.3f}, perplexity {summary['valid_perplexity']:.1f}"),
        ("speed", f"{summary['tokens_per_s']:,.0f} tokens/s over {summary['steps']} steps"),
        ("layout", f"tensor {layout['tensor']} x pipeline {layout['pipeline']} x data {layout['data']}"),
    ]
    breakdown = summary["static_bytes_breakdown"]
    if breakdown:
        parts = ", ".join(f"{kind} {value:.3f}" for kind, value in breakdown.items() if value)
        rows.append(("low-bit weights", f"{summary['low_bit_parameters']:,}"))
        rows.append(("bytes a low-bit weight", f"{summary['static_bytes_per_low_bit_weight']:.3f} ({parts}), measured"))
    rows.append(("TensorBoard files", str(folder / "tb")))
    rows.append(("checkpoint", str(folder / "checkpoints" / f"step_{summary['steps']:08d}")))
    return rows
