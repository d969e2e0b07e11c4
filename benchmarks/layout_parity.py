#!/usr/bin/env python3
"""Does the layout change what is learned? The same run at several layouts, validation losses side by side.

Each layout trains the model of a config, made small enough for a CPU, on the same text and from the same seed. Each
layout has processes of its own (torchrun, gloo). Rounding is a function of logical coordinates, so only the order of
floating-point sums may differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from benchmarks.common import ROOT, markdown, provenance

# tensor, pipeline, data
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2)]
CUT = [
    "model.num_layers=4",
    "model.hidden_size=256",
    "model.ffn_hidden_size=704",
    "model.num_attention_heads=4",
    "model.num_query_groups=4",
    "model.seq_length=128",
    "quantization.compute=fp32",
    "training.micro_batch_size=2",
    "training.global_batch_size=8",
    "training.eval_interval=0",
    "training.eval_batches=20",
    "checkpoint.interval=0",
    "data.num_workers=0",
    "logging.interval=10",
]


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    example = "example:\n  benchmarks/layout_parity.py --data data/corpus --output docs/benchmarks/layout_parity.md"
    parser = argparse.ArgumentParser(description=__doc__, epilog=example, formatter_class=style)
    parser.add_argument("--config", default="configs/130m_pure_ternary.json", metavar="FILE", help="config to cut down")
    parser.add_argument("--data", required=True, metavar="DIR", help="a folder made by tools/prepare_data.py")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--work", default="runs/layout_parity", metavar="DIR", help="run folders go here")
    parser.add_argument("--output", metavar="FILE", help="also write the table as Markdown")
    args = parser.parse_args()
    rows = [(layout, run(args, layout)) for layout in LAYOUTS]
    text = table(args, rows)
    print(text)
    if args.output:
        Path(args.output).write_text(text)
    return 0


def run(args: argparse.Namespace, layout: tuple[int, int, int]) -> dict:
    """One run in its own processes; returns its summary."""
    tensor, pipeline, data = layout
    folder = f"{args.work}/tp{tensor}_pp{pipeline}_dp{data}"
    vocabulary = json.loads(Path(f"{args.data}/train.json").read_text())["vocab_size"]
    settings = [
        *CUT,
        f"model.vocab_size={vocabulary}",
        f"training.steps={args.steps}",
        f"optimizer.warmup_steps={args.steps // 10}",
        f"parallel.tensor={tensor}",
        f"parallel.pipeline={pipeline}",
        f"data.train.0.path={args.data}/train",
        f'data.valid=[{{"path": "{args.data}/valid"}}]',
        f"data.tokenizer={args.data}/tokenizer.model",
        f"checkpoint.dir={folder}",
    ]
    processes = tensor * pipeline * data
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += [str(ROOT / "launchers/pretrain.py"), "--config", args.config, "--resume", "none"]
    command += [part for setting in settings for part in ("--set", setting)]
    print(f"tensor {tensor} x pipeline {pipeline} x data {data}", flush=True)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, env=environment)
    return json.loads(Path(folder, "summary.json").read_text())


def table(args: argparse.Namespace, rows: list[tuple[tuple[int, int, int], dict]]) -> str:
    """Markdown table with the relative difference of each validation loss to that of the first layout."""
    first = rows[0][1]
    cells = []
    for layout, summary in rows:
        losses = (summary["first_loss"], summary["last_loss"], summary["valid_loss"])
        difference = summary["valid_loss"] / first["valid_loss"] - 1
        cells.append([*map(str, layout), *(f"{loss:.5f}" for loss in losses), f"{difference:+.4%}"])
    columns = ("tensor", "pipeline", "data", "first loss", "last loss", "validation loss", "against the first row")
    weights = f"{args.config} cut to {first['parameters']:,} weights"
    cut = f"{weights}, {args.steps} steps of 1,024 tokens, gloo, fp32, one seed."
    return f"# One run at five layouts\n\n{cut}\n{provenance('CPU')}\n\n{markdown(columns, cells)}"


if __name__ == "__main__":
    sys.exit(main())
