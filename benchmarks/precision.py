#!/usr/bin/env python3
"""Does a cheaper precision learn the same?

One config is trained under several settings on the same tokens; a table shows the validation losses side by side.
Each setting is a run of launchers/pretrain.py from the same seed, in a process of its own and a folder of its own
below --work. A run that was stopped goes on. A run that has finished is not repeated; to repeat it, remove its
folder. Each setting has one seed, so read small differences with care. The last example shows how to run another seed
of a setting for comparison.

    benchmarks/precision.py --config configs/130m_pure_ternary.json --set training.steps=400 \\
        --set optimizer.warmup_steps=40
    benchmarks/precision.py --config configs/demo_cpu.json --settings "fp32;fp8" --work runs/precision
    benchmarks/precision.py --from-runs bf16=runs/precision/bf16 --from-runs fp8=runs/precision/fp8 --plot precision.png
    benchmarks/precision.py --settings "bf16;bf16 again=quantization.compute=bf16,training.seed=1;fp8"
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from benchmarks.common import ROOT, append, chosen, device_name, markdown, provenance, write_json
from dqt_dist.training.metrics_file import read_lines

SMALL = ["quantization.compute=fp8", "optimizer.state_bits=8"]
SETTINGS: dict[str, list[str]] = {
    "fp32": ["quantization.compute=fp32"],
    "bf16": ["quantization.compute=bf16"],
    "int8": ["quantization.compute=int8"],
    "fp8, dW in bf16": ["quantization.compute=fp8", "quantization.weight_gradient=bf16"],
    "fp8": ["quantization.compute=fp8"],
    "fp8, 8-bit moments": SMALL,
    "fp8, 8-bit moments, bf16 gradients": [*SMALL, "optimizer.gradient_dtype=bf16"],
    "fp8, 8-bit moments, fused update": [*SMALL, "optimizer.fused_backward=true", "optimizer.max_grad_norm=0"],
    "bf16, not clipped": ["quantization.compute=bf16", "optimizer.max_grad_norm=0"],
}
"""Compare the fused update, which cannot clip, with "bf16, not clipped"."""
DEFAULT = "bf16;int8;fp8, dW in bf16;fp8;fp8, 8-bit moments;fp8, 8-bit moments, bf16 gradients"


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add(
        "--config",
        default="configs/130m_pure_ternary.json",
        metavar="FILE",
        help="what is trained (default: %(default)s)",
    )
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value in all settings")
    known = f"{'; '.join(SETTINGS)}; or NAME=section.key=value,section.key=value"
    add("--settings", default=DEFAULT, help=f"which, separated by semicolons, of: {known} (default: %(default)s)")
    add("--work", default="runs/precision", metavar="DIR", help="run folders go here (default: %(default)s)")
    add("--from-runs", action="append", metavar="NAME=RUN", help="train nothing, compare these run folders")
    add("--output", metavar="FILE", help="append the table to this file, as Markdown")
    add("--json", metavar="FILE", help="write all numbers there")
    add("--plot", metavar="PNG", help="draw the loss curves, with tools/compare_runs.py (needs matplotlib)")
    args = parser.parse_args()
    if args.from_runs:
        runs = [tuple(text.split("=", 1)) for text in args.from_runs]
    else:
        runs = [train(args, text) for text in args.settings.split(";")]
    rows = [read(name, Path(folder)) for name, folder in runs]
    about = provenance(device_name())
    append(args.output, f"## {args.config} {' '.join(args.set)}\n\n{about}\n\n{table(rows)}")
    write_json(args.json, {"about": about, "rows": rows})
    finished = [(row["name"], row["run"]) for row in rows if "valid_loss" in row]
    if args.plot and finished:
        named = [f"{name}={folder}" for name, folder in finished]
        command = [sys.executable, str(ROOT / "tools/compare_runs.py"), *named, "--output", args.plot]
        subprocess.run([*command, "--title", Path(args.config).stem], check=True)
    return 0 if finished else 1


def train(args: argparse.Namespace, text: str) -> tuple[str, str]:
    """Runs one item of --settings unless it has finished; returns its name and folder."""
    name, own = chosen(text, SETTINGS, "--settings")
    folder = Path(args.work, "_".join(name.replace(",", "").split()))
    settings = [*args.set, *own, f"checkpoint.dir={folder}"]
    if not (folder / "summary.json").exists():
        print(f"{name}: {' '.join(settings)}", flush=True)
        command = [sys.executable, str(ROOT / "launchers/pretrain.py"), "--config", args.config, "--resume", "auto"]
        # No check: a setting that fails has printed the reason, and has a line in the table.
        subprocess.run([*command, *(part for setting in settings for part in ("--set", setting))])
    return name, str(folder)


def read(name: str, folder: Path) -> dict[str, Any]:
    """What the run has written down."""
    facts: dict[str, Any] = {"name": name, "run": str(folder)}
    lines, _ = read_lines(folder)
    steps = [line for line in lines if "loss" in line]
    valid = [line for line in lines if "valid_loss" in line]
    if not steps or not valid:
        return facts | {"failed": "no validation loss in its metrics.jsonl"}
    facts |= {"step": steps[-1]["step"], "tokens": steps[-1]["tokens"], "loss": steps[-1]["loss"]}
    speeds = sorted(line["tokens_per_s"] for line in steps[1:] or steps)
    facts |= {"valid_loss": valid[-1]["valid_loss"], "tokens_per_s": speeds[len(speeds) // 2]}
    return facts | {"peak_memory_gib": max(line["peak_memory_bytes"] for line in steps) / 2**30}


def table(rows: list[dict[str, Any]]) -> str:
    """Differences are to the first run that finished. Runs with another number of tokens show no difference."""
    finished = [row for row in rows if "valid_loss" in row]
    columns = (
        "setting",
        "tokens",
        "validation loss",
        "difference",
        "last training loss",
        "tokens/s, median",
        "peak GiB",
    )
    cells = []
    for row in rows:
        if "failed" in row:
            cells.append([row["name"], "", row["failed"], "", "", "", ""])
            continue
        same = row["tokens"] == finished[0]["tokens"]
        difference = f"{row['valid_loss'] / finished[0]['valid_loss'] - 1:+.2%}" if same else "other tokens"
        losses = (f"{row['valid_loss']:.4f}", difference, f"{row['loss']:.4f}")
        cells.append(
            [row["name"], f"{row['tokens']:,}", *losses, f"{row['tokens_per_s']:,.0f}", f"{row['peak_memory_gib']:.2f}"]
        )
    return markdown(columns, cells)


if __name__ == "__main__":
    sys.exit(main())
