#!/usr/bin/env python3
"""Draws training and validation losses of several runs, and the share of codes that flip, from their metrics.jsonl."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    command = "benchmarks/plot_runs.py --run dqt=runs/a --run bf16=runs/b --title '130m' --output docs/benchmarks/x.png"
    example = f"example:\n  {command}"
    parser = argparse.ArgumentParser(description=__doc__, epilog=example, formatter_class=style)
    parser.add_argument(
        "--run", action="append", required=True, metavar="NAME=RUN", help="label and run folder or metrics.jsonl"
    )
    parser.add_argument("--title", default="")
    parser.add_argument("--output", required=True, metavar="PNG")
    args = parser.parse_args()
    figure, (losses, flips) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for run in args.run:
        name, _, path = run.partition("=")
        draw(name, read(Path(path)), losses, flips)
    losses.set(xlabel="tokens, millions", ylabel="loss, nats per token", title=args.title)
    losses.legend()
    losses.grid(alpha=0.3)
    flips.set(xlabel="tokens, millions", ylabel="share of codes changed in a step", yscale="log", title="flips")
    flips.grid(alpha=0.3)
    if flips.lines:
        flips.legend()
    figure.savefig(args.output, dpi=130)
    print(args.output)
    return 0


def read(path: Path) -> list[dict]:
    path = path / "metrics.jsonl" if path.is_dir() else path
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw(name: str, lines: list[dict], losses: plt.Axes, flips: plt.Axes) -> None:
    """Training losses as a line, validation losses as dots of the same colour; flips where there are any."""
    training = [line for line in lines if "loss" in line]
    tokens_at = {line["step"]: line["tokens"] / 1e6 for line in training}
    millions = list(tokens_at.values())
    (curve,) = losses.plot(millions, [line["loss"] for line in training], lw=1, alpha=0.6)
    valid = [line for line in lines if "valid_loss" in line]
    points = [tokens_at[line["step"]] for line in valid]
    label = f"{name}: validation {valid[-1]['valid_loss']:.3f} at {points[-1]:.1f} M" if valid else name
    losses.plot(points, [line["valid_loss"] for line in valid], "o-", ms=4, color=curve.get_color(), label=label)
    changed = [
        (tokens, line["flip_rate"]) for tokens, line in zip(millions, training, strict=True) if line.get("flip_rate")
    ]
    if changed:
        flips.plot(*zip(*changed, strict=True), lw=1, color=curve.get_color(), label=name)


if __name__ == "__main__":
    sys.exit(main())
