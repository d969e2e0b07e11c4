#!/usr/bin/env python3
"""A training step at each layout and with each method: what a second GPU, or the eighth, is worth.

Every method at every layout is a run of benchmarks/train_step.py, one after the other, on the same text. Every
method is compared with itself on one GPU, and with ordinary bf16 weights at the same layout.

    benchmarks/layouts.py --gpus 2 --json layouts.json --output docs/benchmarks/layouts.md
    benchmarks/layouts.py --gpus 2 --only "TP 2" --methods "none-bf16;dqt-fp8" --steps 10
    benchmarks/layouts.py --from-json layouts.json --plot layouts.png            # needs matplotlib

    of ideal    tokens/s over those of as many single GPUs at the same micro-batch; with a pipeline of p stages and M
                micro-batches, times M / (M + p - 1), which is what the bubble leaves; v chunks per rank: (p - 1) / v
    of none     tokens/s over those of none-bf16 at the same layout
    sent        MB per step and GPU by kind, as a ring would send them; without what Megatron sends by itself: between
                stages, and the sums of ordinary weights over tensor-parallel ranks
    on the wire ms that these bytes take at the measured bandwidth, if nothing else travels
    exposed     share of a profiled step in which a GPU communicates, or waits for others, and computes nothing
    unused      share in which a GPU runs nothing: Python, bubbles
    TFLOP/s     model FLOPs (training/cost.py) per second and GPU

The bandwidth is that of an all-gather of 256 MB (on a CPU 16 MB) over all processes, measured before the layouts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from benchmarks.common import ROOT, append, markdown, provenance, write_json
from benchmarks.train_step import has_corpus, prepare
from dqt_dist.command_line import pyplot

DEFAULTS = {
    "cuda": ("configs/1b_ternary_fp8.json", "none-bf16;dqt-bf16;dqt-fp8"),
    "cpu": ("configs/demo_cpu.json", "none-fp32;dqt-fp32"),
}
"""Config and methods by device."""
LINK_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
COLUMNS = [
    "layout", "method", "tokens/s", "of ideal", "of none", "TFLOP/s", "ms per step", "sent: gradients", "codes",
    "activations", "on the wire", "exposed", "unused", "peak GiB",
]  # fmt: skip


@dataclass(frozen=True)
class Layout:
    name: str
    processes: int
    settings: tuple[str, ...]
    single: str
    """Name of the one-GPU layout that it is compared with."""
    bubble: float = 1.0
    """Share of the time that the pipeline's bubble leaves."""


def layouts(gpus: int, micro_batch_size: int) -> list[Layout]:
    """The layouts over `gpus` processes. Pipelines have a quarter of the micro-batch, and 8 micro-batches a step."""
    small = max(1, micro_batch_size // 4)
    whole, part = f"one GPU, micro-batch {micro_batch_size}", f"one GPU, micro-batches of {small}"
    zero_1, count = "deepspeed.zero_optimization.stage=1", 8

    def batch(size: int, samples: int) -> tuple[str, str]:
        return f"training.micro_batch_size={size}", f"training.global_batch_size={samples}"

    found = [
        Layout(whole, 1, (zero_1, *batch(micro_batch_size, micro_batch_size)), whole),
        Layout(part, 1, (zero_1, *batch(small, count * small)), part),
    ]
    if gpus == 1:
        return found
    data_parallel = f"DP {gpus}, ZeRO 1"
    found += [
        Layout(data_parallel, gpus, (zero_1, *batch(micro_batch_size, gpus * micro_batch_size)), whole),
        Layout(
            f"{data_parallel}, 16 micro-batches",
            gpus,
            (zero_1, *batch(micro_batch_size, 16 * gpus * micro_batch_size)),
            whole,
        ),
        Layout(
            f"TP {gpus}, SP",
            gpus,
            (zero_1, f"parallel.tensor={gpus}", "parallel.sequence=true", *batch(micro_batch_size, micro_batch_size)),
            whole,
        ),
    ]
    for chunks in (1, 2):
        settings = (zero_1, f"parallel.pipeline={gpus}", *batch(small, count * small))
        if chunks > 1:
            settings += (f"parallel.virtual_pipeline={chunks}",)
        name = f"PP {gpus}" + f", {chunks} chunks a rank" * (chunks > 1)
        found.append(Layout(name, gpus, settings, part, count / (count + (gpus - 1) / chunks)))
    return found


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--config", metavar="FILE", help="default: configs/1b_ternary_fp8.json, without a GPU configs/demo_cpu.json")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value; may be repeated")
    add("--gpus", type=int, help="processes of the layouts (default: the GPUs of this machine; without a GPU 2)")
    add("--only", metavar="REGEX", help="only layouts whose name contains a match, and what they are compared with")
    add("--methods", help="variants of benchmarks/train_step.py, separated by semicolons; the first is `none`")
    add("--steps", type=int, default=10, help="timed steps (default: %(default)s)")
    add("--warmup", type=int, default=4, help="steps before them (default: %(default)s)")
    add("--no-profile", action="store_true", help="leave out the profiled step, and with it exposed and unused")
    add("--seconds", type=float, default=240.0, help="time limit of a method at a layout (default: %(default)s)")
    add("--json", metavar="FILE", help="write all figures there, after every layout")
    add("--from-json", metavar="FILE", help="measure nothing, take the figures of that file")
    add("--output", metavar="FILE", help="append the table to this file, as Markdown")
    add("--plot", metavar="FILE", help="draw the table there (needs matplotlib)")
    add("--link", action="store_true", help="under torchrun: only measure the bandwidth, and print it as JSON")
    args = parser.parse_args()
    if args.link:
        link = measure_link()
        if os.environ["RANK"] == "0":  # lines of two ranks may run into one another
            print(json.dumps(link), flush=True)
        return 0
    found = json.loads(Path(args.from_json).read_text()) if args.from_json else measure_all(args)
    append(args.output, table(found))
    if args.plot:
        plot(found, args.plot)
    return 0 if all("tokens_per_s" in row for layout in found["layouts"] for row in layout["rows"]) else 1


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from dqt_dist.config import load_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config_file = args.config or DEFAULTS[device][0]
    gpus = args.gpus or (torch.cuda.device_count() if device == "cuda" else 2)
    config = load_config(config_file, args.set)
    found: dict[str, Any] = {
        "about": provenance(f"{gpus} x {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}"),
        "config": config_file,
        "link": None,
        "layouts": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        data = [] if has_corpus(config, args.set) else prepare(f"{folder}/corpus", config)
        if gpus > 1:
            printed = run(gpus, ["benchmarks/layouts.py", "--link"], args.seconds)[1]
            found["link"] = next((json.loads(line) for line in printed.splitlines() if line.startswith("{")), None)
        for layout in wanted(layouts(gpus, config.training.micro_batch_size), args.only):
            entry: dict[str, Any] = vars(layout) | {"rows": []}
            found["layouts"].append(entry)
            for method in (args.methods or DEFAULTS[device][1]).split(";"):
                command = ["benchmarks/train_step.py", "--config", config_file, "--json", f"{folder}/row.json"]
                command += ["--variants", method, "--steps", str(args.steps), "--warmup", str(args.warmup)]
                command += ["--no-profile"] * args.no_profile
                for setting in [*data, "parallel.tensor=1", "parallel.pipeline=1", *args.set, *layout.settings]:
                    command += ["--set", setting]
                entry["rows"].append(measured(layout.processes, method.strip(), command, args.seconds, folder))
                write_json(args.json, found)
                row = entry["rows"][-1]
                speed = f"{row['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in row else row["failed"]
                print(f"{layout.name}, {row['variant']}: {speed}", file=sys.stderr, flush=True)
    return found


def measured(processes: int, method: str, command: list[str], seconds: float, folder: str) -> dict[str, Any]:
    """The figures of one method at one layout, or why there are none. A process group of its own, so that nothing of an
    earlier method counts in its peak."""
    result = Path(folder, "row.json")
    result.unlink(missing_ok=True)
    code, printed = run(processes, command, seconds)
    if result.is_file():
        return json.loads(result.read_text())["rows"][0]
    print("\n".join([line for line in printed.strip().splitlines() if line][-12:]), file=sys.stderr)
    return {"variant": method, "failed": f"exit code {code}"}


def wanted(known: list[Layout], pattern: str | None) -> list[Layout]:
    """The layouts whose name contains a match, and the layouts that these are compared with."""
    chosen = [layout for layout in known if pattern is None or re.search(pattern, layout.name)]
    if not chosen:
        raise SystemExit(f"--only {pattern!r}: no such layout; known: {'; '.join(layout.name for layout in known)}")
    singles = {layout.single for layout in chosen}
    return [layout for layout in known if layout in chosen or layout.name in singles]


def run(processes: int, command: list[str], seconds: float) -> tuple[int, str]:
    """Exit code and output of a command of this repository over some processes. After the time limit it is killed."""
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with subprocess.Popen(
        [*starter, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            printed = child.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return 124, child.communicate()[0]
        return child.returncode, printed


def measure_link() -> dict[str, float]:
    """Bytes per second that a GPU sends in a large all-gather. A collective call under torchrun."""
    import torch
    import torch.distributed as dist

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    ranks, size = dist.get_world_size(), LINK_BYTES[device]
    part = torch.ones(size // ranks, dtype=torch.uint8, device=device)
    whole = torch.empty(ranks * part.numel(), dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(12):
        dist.barrier()
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        dist.all_gather_into_tensor(whole, part)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    dist.destroy_process_group()
    return {"bytes_per_second": part.numel() * (ranks - 1) / sorted(seconds[2:])[len(seconds[2:]) // 2]}


def table(found: dict[str, Any]) -> str:
    link = found["link"]
    speed = f" A GPU sends {link['bytes_per_second'] / 1e9:.1f} GB/s in an all-gather." if link else ""
    rows = [cells(layout, row, found) for layout in found["layouts"] for row in layout["rows"]]
    return f"## {found['config']}\n\n{found['about']}{speed}\n\n{markdown(COLUMNS, rows)}"


def cells(layout: dict[str, Any], row: dict[str, Any], found: dict[str, Any]) -> list[str]:
    if "tokens_per_s" not in row:
        return [layout["name"], row["variant"], row["failed"], *[""] * (len(COLUMNS) - 3)]
    figures = compared(layout, row, found)
    processes, sent = layout["processes"], row["sent_bytes"]
    activations = sent.get("activations", 0) + sent.get("activation_maxima", 0)
    of_kinds = [sent.get("gradients", 0), sent.get("codes", 0), activations]
    return [
        layout["name"],
        row["variant"],
        f"{row['tokens_per_s']:,.0f}",
        *(f"{figures[name]:.2f}" if figures[name] else "-" for name in ("of ideal", "of none")),
        f"{row['tflops']:.1f}",
        f"{row['step_ms']:.1f}",
        *(f"{count / processes / 1e6:,.0f}" for count in of_kinds),
        f"{figures['wire_ms']:.1f}" if figures["wire_ms"] is not None else "-",
        *(f"{row[name]:.2f}" if name in row else "-" for name in ("exposed", "unused")),
        f"{row['peak_memory_gib']:.2f}" if row["peak_memory_gib"] else "-",
    ]


def compared(layout: dict[str, Any], row: dict[str, Any], found: dict[str, Any]) -> dict[str, float | None]:
    """The figures of a row that need other rows, or the bandwidth."""

    def speed(name: str, variant: str) -> float | None:
        rows = [each for other in found["layouts"] if other["name"] == name for each in other["rows"]]
        return next((each.get("tokens_per_s") for each in rows if each["variant"] == variant), None)

    single = speed(layout["single"], row["variant"])
    none = speed(layout["name"], layout["rows"][0]["variant"])
    sent = sum(row["sent_bytes"].values()) / layout["processes"]
    ideal = single * layout["processes"] * layout["bubble"] if single else None
    return {
        "of ideal": row["tokens_per_s"] / ideal if ideal else None,
        "of none": row["tokens_per_s"] / none if none else None,
        "wire_ms": 1e3 * sent / found["link"]["bytes_per_second"] if found["link"] else None,
    }


def plot(found: dict[str, Any], path: str) -> None:
    """Bars of tokens/s by layout and method, with the ideal of each as a line above its bar."""
    plt = pyplot()
    done = [layout for layout in found["layouts"] if any("tokens_per_s" in row for row in layout["rows"])]
    variants = list(dict.fromkeys(row["variant"] for layout in done for row in layout["rows"]))
    figure, axes = plt.subplots(figsize=(1.6 * len(done) + 3, 4.2), layout="constrained")
    width = 0.8 / len(variants)
    for index, variant in enumerate(variants):
        for place, layout, row in _rows_of(done, variant):
            at = place + (index - (len(variants) - 1) / 2) * width
            label = variant if place == 0 else None
            axes.bar(at, row["tokens_per_s"], width * 0.95, color=f"C{index}", label=label)
            share = compared(layout, row, found)["of ideal"]
            if share:
                axes.hlines(row["tokens_per_s"] / share, at - width / 2, at + width / 2, color="black", lw=1)
    axes.set_xticks(range(len(done)), [layout["name"].replace(", ", "\n") for layout in done], fontsize=8)
    axes.set_ylabel("tokens/s; line: ideal")
    axes.legend(fontsize=8)
    figure.suptitle(f"{found['config']}: {found['about'].split('. ')[0]}", fontsize=9)
    figure.savefig(path, dpi=130)
    print(path)


def _rows_of(done: list[dict[str, Any]], variant: str) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    for place, layout in enumerate(done):
        for row in layout["rows"]:
            if row["variant"] == variant and "tokens_per_s" in row:
                yield place, layout, row


if __name__ == "__main__":
    sys.exit(main())
