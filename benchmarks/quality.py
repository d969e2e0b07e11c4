#!/usr/bin/env python3
"""Which recipe learns best? A list of training runs over the GPUs of a machine, and the page that compares them.

    run       trains what is not finished yet, several runs per GPU; goes on where an earlier call was stopped
    collect   keeps the small part of each run folder: settings, validation losses, losses at the logged steps, figures of the codes
    page      docs/benchmarks/quality.md and its plots, from the collected files alone

All runs of a list see the same text in the same order. Prepare the text once; the tokenizer is trained on the first shard:

    tools/prepare_data.py --input CORPUS/train-00.jsonl.zst --vocab-size 8192 --valid-fraction 0 --output DATA
    tools/prepare_data.py --input CORPUS/train-*.jsonl.zst --tokenizer DATA/tokenizer.model --valid-input CORPUS/valid.jsonl.zst --output DATA

examples:
    benchmarks/quality.py run OUT --data DATA --per-gpu 2 --seconds 3000
    benchmarks/quality.py run OUT --data DATA --only 'dqt8_.*' --steps 100
    benchmarks/quality.py collect OUT --commit COMMIT --device 'H100 80 GB' --date 2026-11-26
    benchmarks/quality.py page
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dqt_dist.errors import STOPPED_EXIT_CODE

ROOT = Path(__file__).resolve().parents[1]
KEPT, PAGE = ROOT / "docs/benchmarks/quality", ROOT / "docs/benchmarks/quality.md"
POLL_SECONDS = 0.5

SIZE_S = {
    "model.num_layers": 8,
    "model.hidden_size": 512,
    "model.ffn_hidden_size": 1408,
    "model.num_attention_heads": 8,
    "model.vocab_size": 8192,
}
# 4,578 steps of 128 sequences of 512 tokens: 300 M tokens. Seven validation batches are 0.46 M tokens.
RECIPE = {
    "training.steps": 4578,
    "training.micro_batch_size": 128,
    "training.global_batch_size": 128,
    "training.eval_interval": 763,
    "training.eval_batches": 7,
    "training.replica_check_interval": 0,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 100,
    "optimizer.min_learning_rate_ratio": 0.0,
    "checkpoint.interval": 0,
    "logging.interval": 109,
    "logging.tensorboard": False,
}
METHODS: dict[str, dict[str, Any]] = {
    "none": {"quantization.method": "none"},
    "bitnet": {"quantization.method": "bitnet"},
    "dqt8": {"quantization.bits": 8},
    "dqt4": {"quantization.bits": 4},
    "dqt3": {"quantization.bits": 3},
    "dqt_ternary": {"quantization.bits": "ternary"},
}
NAMES = {
    "none": "bf16, fp32 master",
    "bitnet": "BitNet b1.58, fp32 master",
    "dqt8": "DQT, 8 bit",
    "dqt4": "DQT, 4 bit",
    "dqt3": "DQT, 3 bit",
    "dqt_ternary": "DQT, ternary",
}
# By count: a bf16 weight, its fp32 master, two fp32 moments. Of DQT the run itself reports what it measures.
BYTES_WITH_MASTER = 14.0


@dataclass(frozen=True)
class Run:
    """One training run of the study."""

    method: str
    rate: float
    """Peak rate of the linears."""
    rest_rate: float = 3e-3
    seed: int = 1234
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        rest = "" if self.rest_rate == Run.rest_rate else f"_rest{self.rest_rate:g}"
        seed = "" if self.seed == Run.seed else f"_seed{self.seed}"
        return f"{self.method}_{self.rate:g}{rest}{seed}"

    def settings(self, data: str) -> dict[str, Any]:
        return (
            SIZE_S
            | RECIPE
            | {
                "data.train": [{"path": f"{data}/train"}],
                "data.valid": [{"path": f"{data}/valid"}],
                "data.tokenizer": f"{data}/tokenizer.model",
                "training.seed": self.seed,
                "optimizer.learning_rate": self.rest_rate,
                "optimizer.low_bit_learning_rate": self.rate,
            }
            | METHODS[self.method]
            | self.more
        )


def study() -> list[Run]:
    """The list, in the order in which runs are wanted: the likely best rate of each method first, then its neighbours."""
    first = [Run("none", 2e-3), Run("dqt8", 1e-3), Run("dqt4", 1e-3), Run("none", 1e-3), Run("bitnet", 2e-3)]
    first += [Run("dqt_ternary", 5e-4), Run("dqt3", 1e-3)]
    sweep = [Run("dqt8", 5e-4), Run("dqt8", 2e-3), Run("dqt4", 5e-4), Run("dqt4", 2e-3), Run("none", 4e-3)]
    sweep += [Run("bitnet", 1e-3), Run("bitnet", 4e-3), Run("dqt_ternary", 2.5e-4), Run("dqt_ternary", 1e-3)]
    sweep += [Run("dqt3", 5e-4), Run("dqt3", 2e-3)]
    rest = [Run(method, 2e-3, rest_rate) for method in ("none", "bitnet") for rest_rate in (1.5e-3, 6e-3)]
    return [*first, *sweep, *rest]


# ---- run ----


def run_all(args: argparse.Namespace) -> int:
    """Runs the list; returns 0 when every run is finished."""
    out = Path(args.out)
    wanted = [run for run in study() if re.fullmatch(args.only, run.name)]
    queue = [run for run in wanted if not (out / run.name / "summary.json").exists()]
    print(f"{len(wanted)} runs, {len(queue)} of them to do, {args.per_gpu} at a time on each of {args.gpus} GPU(s)")
    slots = [gpu for _ in range(args.per_gpu) for gpu in range(args.gpus)]
    running: dict[subprocess.Popen[bytes], tuple[Run, int]] = {}
    start, port, stopping = time.monotonic(), args.port, False
    while queue or running:
        for process in [process for process in running if process.poll() is not None]:
            run, gpu = running.pop(process)
            slots.append(gpu)
            say_end(out / run.name, process.returncode, time.monotonic() - start)
        if not stopping and time.monotonic() - start > args.seconds:
            stopping, queue = True, []
            for process in running:  # the trainer saves, and goes on in the next call
                process.send_signal(signal.SIGTERM)
        while queue and slots:
            run, gpu, port = queue.pop(0), slots.pop(0), port + 1
            running[started(run, gpu, port, args)] = run, gpu
        time.sleep(POLL_SECONDS)
    return 0 if all((out / run.name / "summary.json").exists() for run in wanted) else 1


def started(run: Run, gpu: int, port: int, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """The process of one run; what the process prints goes to OUT/NAME.log."""
    settings = run.settings(str(Path(args.data).resolve())) | {
        "checkpoint.dir": str(Path(args.out, run.name).resolve())
    }
    settings |= {"training.steps": args.steps} if args.steps else {}
    settings |= dict(override.split("=", 1) for override in args.set)
    command = [sys.executable, str(ROOT / "launchers/pretrain.py"), "--config", str(ROOT / "configs/130m_ternary.json")]
    for key, value in settings.items():
        command += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": str(gpu),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "2",
    }
    environment.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir(), "triton")))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with Path(args.out, f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def say_end(folder: Path, code: int, seconds: float) -> None:
    how = (
        "finished"
        if code == 0
        else "stopped, goes on in the next call"
        if code == STOPPED_EXIT_CODE
        else f"exit {code}"
    )
    lines = metrics(folder)
    valid = [line["valid_loss"] for line in lines if "valid_loss" in line]
    last = f"validation {valid[-1]:.4f}" if valid else "no validation yet"
    print(f"{seconds:6.0f} s  {folder.name}: {how}; {last}", flush=True)


# ---- collect ----


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def collect(args: argparse.Namespace) -> int:
    """Writes OUT/NAME as docs/benchmarks/quality/NAME.json for every run that has been validated."""
    target = Path(args.to)
    target.mkdir(parents=True, exist_ok=True)
    by_name = {run.name: run for run in study()}
    for folder in sorted(path for path in Path(args.out).iterdir() if path.is_dir()):
        lines = metrics(folder)
        if folder.name not in by_name or not any("valid_loss" in line for line in lines):
            print(
                f"{folder.name}: left out, {'not of the list' if folder.name not in by_name else 'no validation yet'}"
            )
            continue
        kept = small(by_name[folder.name], folder, lines)
        kept["about"] = {"commit": args.commit, "device": args.device, "date": args.date}
        partial = target / f"{folder.name}.json.partial"
        partial.write_text(json.dumps(kept, indent=1) + "\n")
        partial.rename(target / f"{folder.name}.json")
        print(f"{folder.name}: {kept['valid'][-1][1]:.4f} at {kept['valid'][-1][0] / 1e6:.0f} M tokens")
    return 0


def small(run: Run, folder: Path, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of a run that the page needs."""
    config = json.loads((folder / "config.json").read_text())
    tokens_per_step = config["training"]["global_batch_size"] * config["model"]["seq_length"]
    summary_path = folder / "summary.json"
    summary = json.loads(summary_path.read_text()) if summary_path.exists() else {}
    logged = [line for line in lines if "loss" in line]
    valid = [[line["step"] * tokens_per_step, round(line["valid_loss"], 4)] for line in lines if "valid_loss" in line]
    if summary and valid[-1][0] < summary["tokens"]:
        valid.append([summary["tokens"], round(summary["valid_loss"], 4)])
    figures = {name: [line.get(name) for line in logged] for name in ("flip_rate", "zero_fraction", "saturation")}
    return {
        "name": run.name,
        "method": run.method,
        "rate": run.rate,
        "rest_rate": run.rest_rate,
        "seed": run.seed,
        "more": run.more,
        "finished": bool(summary),
        "tokens": config["training"]["steps"] * tokens_per_step,
        "bytes_per_linear_weight": summary.get("static_bytes_per_low_bit_weight") or BYTES_WITH_MASTER,
        "bytes_are": "measured" if summary.get("static_bytes_per_low_bit_weight") else "by count",
        "versions": summary.get("versions", {}),
        "valid": valid,
        "training": [[line["tokens"], round(line["loss"], 4)] for line in logged],
        **{name: [round(x, 7) for x in values] for name, values in figures.items() if values and None not in values},
    }


# ---- page ----


def page(args: argparse.Namespace) -> int:
    runs = [json.loads(path.read_text()) for path in sorted(Path(args.kept).glob("*.json"))]
    if not runs:
        sys.exit(f"{args.kept}: no collected runs; benchmarks/quality.py collect makes them")
    plot(runs, Path(args.page).with_suffix(".png"))
    Path(args.page).write_text("\n".join(text(runs, Path(args.page).with_suffix(".png").name)) + "\n")
    print(args.page)
    return 0


def text(runs: list[dict[str, Any]], picture: str) -> Iterator[str]:
    """The page, line by line."""
    finished = [run for run in runs if run["finished"]]
    yield from (
        "# Which recipe learns best?",
        "",
        f"![validation loss against tokens, and at the end against the rate and the bytes of a linear weight]({picture})",
        "",
        "LLaMA of 8 layers x 512 (ffn 1408, 8 heads, sequences of 512, vocabulary 8,192): 25.7 M weights in linears, 34 M in",
        "all. 104.5 M tokens of English text (Wikipedia, books, documentation), the same order for all runs; 65,536 tokens per",
        "step; warm-up of 100 steps, cosine to 0; bf16 compute, 32-bit moments. Validation on 0.46 M tokens, in nats per token.",
        "`benchmarks/quality.py` runs the list and writes this page from the files in [quality/](quality).",
        "",
        "## Finished runs",
        "",
        "| method | rate of the linears | rate of the rest | seed | tokens | validation loss | bytes per linear weight |",
        "|---|---|---|---|---|---|---|",
    )
    best = {method: min(group, key=lambda run: run["valid"][-1][1]) for method, group in by_method(finished).items()}
    for run in sorted(finished, key=lambda run: (list(METHODS).index(run["method"]), run["rate"])):
        loss = f"{run['valid'][-1][1]:.3f}"
        loss = f"**{loss}**" if best[run["method"]] is run else loss
        yield (
            f"| {NAMES[run['method']]} | {run['rate']:g} | {run['rest_rate']:g} | {run['seed']} | {run['tokens'] / 1e6:.0f} M"
            f" | {loss} | {run['bytes_per_linear_weight']:.2f}, {run['bytes_are']} |"
        )
    stopped = [run for run in runs if not run["finished"]]
    if stopped:
        yield from (
            "",
            "## Stopped runs",
            "",
            "| method | rate of the linears | validation loss at tokens |",
            "|---|---|---|",
        )
        for run in stopped:
            losses = ", ".join(f"{loss:.3f} at {tokens / 1e6:.0f} M" for tokens, loss in run["valid"])
            yield f"| {NAMES[run['method']]} | {run['rate']:g} | {losses} |"
        yield from (
            "",
            "A stopped run was on the schedule of the full length, so it compares with others at the same tokens only.",
        )
    yield from ("", "## Limits", "")
    seeds = max(len({run["seed"] for run in group}) for group in by_method(runs).values())
    yield f"- {'One seed' if seeds == 1 else f'Up to {seeds} seeds'} per recipe, one size of model."
    for method, group in by_method(finished).items():
        rates = sorted({run["rate"] for run in group})
        inside = len(rates) > 2 and rates[0] < best[method]["rate"] < rates[-1]
        swept = "the best rate lies inside the range" if inside else "the best rate may lie outside"
        yield f"- {NAMES[method]}: rates {', '.join(f'{rate:g}' for rate in rates)} at full length; {swept}."
    yield from ("", "## Where the runs were made", "")
    for about in sorted({json.dumps(run["about"], sort_keys=True) for run in runs}):
        made = json.loads(about)
        yield f"- {made['date']}, commit {made['commit']}, {made['device']}"


def by_method(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        found[run["method"]].append(run)
    return dict(sorted(found.items(), key=lambda item: list(METHODS).index(item[0])))


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Loss against tokens of every run; final loss against rate and against bytes, a point per finished run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, rates, frontier) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for number, (method, group) in enumerate(by_method(runs).items()):
        color, label = f"C{number}", NAMES[method]
        for run in sorted(group, key=lambda run: run["valid"][-1][1]):
            tokens, losses = zip(*run["valid"], strict=True)
            style = "o-" if run["finished"] else "o:"
            curves.plot([t / 1e6 for t in tokens], losses, style, ms=3, lw=1, color=color, label=label)
            label = None
        finished = sorted((run for run in group if run["finished"]), key=lambda run: run["rate"])
        if not finished:
            continue
        at_rate: dict[float, list[float]] = defaultdict(list)
        for run in finished:
            at_rate[run["rate"]].append(run["valid"][-1][1])
        rates.plot(list(at_rate), [statistics.mean(losses) for losses in at_rate.values()], "o-", color=color)
        best = min(finished, key=lambda run: run["valid"][-1][1])
        frontier.plot(best["bytes_per_linear_weight"], best["valid"][-1][1], "o", color=color, label=NAMES[method])
    curves.set(xlabel="tokens, millions", ylabel="validation loss, nats per token", title="dotted: stopped runs")
    rates.set(xlabel="rate of the linears", xscale="log", title="at the last step")
    frontier.set(xlabel="bytes per linear weight between steps", title="best run of each method")
    curves.legend(fontsize=8)
    for axes in (curves, rates, frontier):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{run,collect,page}")
    add = commands.add_parser("run", help="train what is not finished").add_argument
    add("out", metavar="OUT", help="folder of the run folders")
    add("--data", required=True, metavar="DATA", help="folder with train, valid and tokenizer.model")
    add(
        "--only",
        default=".*",
        metavar="REGEX",
        help="runs whose name matches; see docs/benchmarks/quality.md for names",
    )
    add("--seconds", type=float, default=1e9, help="after so long no run is started, and running ones save and stop")
    add("--gpus", type=int, default=1, help="GPUs to use (default: %(default)s)")
    add("--per-gpu", type=int, default=2, help="runs at a time on each GPU (default: %(default)s)")
    add("--port", type=int, default=29600, help="first port of the runs (default: %(default)s)")
    add("--steps", type=int, help="another length, for a trial: such runs do not belong on the page")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override of every run, for a trial")
    commands.choices["run"].set_defaults(command=run_all)
    add = commands.add_parser("collect", help="keep the small part of each run").add_argument
    add("out", metavar="OUT", help="folder of the run folders")
    add("--to", default=str(KEPT), help="default: docs/benchmarks/quality")
    for name, what in (("commit", "commit that was run"), ("device", "GPU"), ("date", "day of the runs")):
        add(f"--{name}", required=True, help=what)
    commands.choices["collect"].set_defaults(command=collect)
    add = commands.add_parser("page", help="write page and plots").add_argument
    add("--kept", default=str(KEPT), help="default: docs/benchmarks/quality")
    add("--page", default=str(PAGE), help="default: docs/benchmarks/quality.md")
    commands.choices["page"].set_defaults(command=page)
    args = parser.parse_args()
    return args.command(args)


if __name__ == "__main__":
    sys.exit(main())
