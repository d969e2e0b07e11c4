#!/usr/bin/env python3
"""A training step of each method and precision, side by side in one process: speed, memory, and where the time goes.

Every variant is the real trainer: megatron-core's model, DeepSpeed's engine, our optimizer, the data loader's worker
processes. The config gives model, batch and data; a variant changes what its name says. Text is the config's corpus.
Where that does not exist, the documentation of Python's library is prepared into a temporary folder.

    python benchmarks/train_step.py --set data.train.0.path=data/corpus/train
    python benchmarks/train_step.py --json step.json \\
        --variants "none-bf16;dqt-fp8;mine=quantization.bits=4,training.recompute=mlp"
    python benchmarks/train_step.py --from-json step.json --plot step.png        # needs matplotlib
    torchrun --nproc-per-node 2 benchmarks/train_step.py --set parallel.tensor=2 --set parallel.sequence=true
    python benchmarks/train_step.py --steps 1 --warmup 1 --no-profile --variants "dqt-fp8, fused, recompute full" \\
        --set training.micro_batch_size=1 --set model.num_layers=80 --set model.hidden_size=8192 ...    # the largest

    step     from the end of the previous step to its own end, with the wait for the loader
    MFU      model FLOPs (training/cost.py) against the device's dense bf16 peak, in every variant, so that variants
             compare; on a CPU against an fp32 product that is measured first
    parts    kernels by name; on a CPU operators, without the operators inside them
    update   everything that the optimizer's step has launched
    idle     the median step less the sum of the kernels of one profiled step

Under torchrun one layout is measured, that of --set, over all processes; benchmarks/layouts.py measures several.
Speed, memory and bytes sent are then those of all ranks, parts those of rank 0, and two shares of a profiled step are
means over the ranks:

    exposed  time in which a GPU communicates, or waits in a communication kernel, and does nothing else
    unused   time in which a GPU runs nothing at all
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from benchmarks.common import (
    ROOT,
    append,
    chosen,
    device_name,
    free_memory,
    markdown,
    one_line,
    provenance,
    waiting_is_an_error,
    write_json,
)
from dqt_dist.command_line import pyplot

SMALL = ["optimizer.state_bits=8"]
FP8 = [*SMALL, "quantization.compute=fp8"]
NO_LATENTS = ["quantization.latent_bits=null"]
CODES_ONLY = [*NO_LATENTS, "optimizer.low_bit_weight_decay=0"]
VARIANTS: dict[str, list[str]] = {
    "none-fp32": [
        *NO_LATENTS, "quantization.method=none", "quantization.compute=fp32", "optimizer.gradient_dtype=fp32",
    ],
    "dqt-fp32": ["quantization.compute=fp32", "optimizer.gradient_dtype=fp32"],
    "none-bf16": [*NO_LATENTS, "quantization.method=none", "quantization.compute=bf16"],
    "bitnet-bf16": [*NO_LATENTS, "quantization.method=bitnet", "quantization.compute=bf16"],
    "dqt-bf16": [*SMALL, "quantization.compute=bf16"],
    "dqt-int8": [*SMALL, "quantization.compute=int8"],
    "dqt-fp8": FP8,
    "dqt-fp8, codes only": [*FP8, *CODES_ONLY],
    "dqt-fp8, codes only, CUDA graph": [*FP8, *CODES_ONLY, "training.cuda_graph=true"],
    "dqt-fp8, documents": [*FP8, "data.document_masking=true"],
    "dqt-fp8, dW in bf16": [*FP8, "quantization.weight_gradient=bf16"],
    "dqt-fp8, fused update": [*FP8, "optimizer.fused_backward=true", "optimizer.max_grad_norm=0"],
    "dqt-fp8, recompute mlp": [*FP8, "training.recompute=mlp"],
    "dqt-fp8, recompute mlp in 10": [*FP8, "training.recompute=mlp", "training.recompute_layers=10"],
    "dqt-fp8, recompute full": [*FP8, "training.recompute=full"],
    "dqt-fp8, fused, recompute full": [
        *FP8, "optimizer.fused_backward=true", "optimizer.max_grad_norm=0", "training.recompute=full",
    ],
}  # fmt: skip
for name in ("none-bf16", "bitnet-bf16", "dqt-bf16", "dqt-int8", "dqt-fp8", "dqt-fp8, documents"):
    VARIANTS[f"{name}, CUDA graph"] = [*VARIANTS[name], "training.cuda_graph=true"]
DEFAULTS = {
    "cuda": (
        "configs/1b_ternary.json",
        "none-bf16;bitnet-bf16;dqt-bf16;dqt-int8;dqt-fp8;dqt-fp8, dW in bf16;dqt-fp8, fused update;"
        "dqt-fp8, recompute mlp;dqt-fp8, recompute full",
    ),
    "cpu": ("configs/demo_cpu.json", "none-fp32;dqt-fp32;dqt-bf16"),
}
"""Config and variants by device."""
PARTS: list[tuple[str, tuple[str, ...]]] = [
    # c10d:: holds the barriers of parallel/peer_copies.py, and gloo; PtoP are copies from one GPU to another.
    ("communication", ("nccl", "c10d::", "gloo:", "Memcpy PtoP")),
    ("update", ("_adamw", "_update_kernel", "multi_tensor_apply")),
    ("attention", ("sdpa", "cudnn::fusion", "flash", "fmha", "scaled_dot_product")),
    (
        "matrix products",
        ("nvjet", "gemm", "cutlass", "xmma", "aten::mm", "aten::addmm", "aten::bmm", "aten::_int_mm",
         "aten::_scaled_mm"),
    ),
    ("loss", ("_statistics_kernel", "_gradient_kernel", "softmax")),
    (
        "quantise, norm, SwiGLU, rope",
        ("_quantize", "_swiglu", "_norm_backward", "_transpose_kernel", "_unpack", "_scaled_kernel", "_rope",
         "layer_norm", "rms_norm", "GammaBeta", "silu"),
    ),
]  # fmt: skip
"""Kernels by part of the step. A kernel belongs to the first part that has a fragment of its name, else to `other`."""
IN_OPTIMIZER = "dqt_dist: update"
LINES = 25


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--config", metavar="FILE", help="default: configs/1b_ternary.json, without a GPU configs/demo_cpu.json")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value; may be repeated")
    known = f"{'; '.join(VARIANTS)}; or NAME=section.key=value,section.key=value"
    add("--variants", help=f"which, separated by semicolons, of: {known}. The first is what others are compared with")
    add("--steps", type=int, default=10, help="timed steps of each variant (default: %(default)s)")
    add("--warmup", type=int, default=5, help="steps before them, at least 3 for a CUDA graph (default: %(default)s)")
    add("--no-profile", action="store_true", help="leave out the profiled step")
    add("--sync-check", action="store_true", help="also run 3 steps in which waiting for the GPU is an error")
    add("--kernels", action="store_true", help=f"print the {LINES} kernels that take longest")
    add("--json", metavar="FILE", help="write all figures there")
    add("--from-json", metavar="FILE", help="measure nothing, take the figures of that file")
    add("--output", metavar="FILE", help="append the tables to this file, as Markdown")
    add("--plot", metavar="FILE", help="draw the tables there (needs matplotlib)")
    args = parser.parse_args()
    found = json.loads(Path(args.from_json).read_text()) if args.from_json else measure_all(args)
    if int(os.environ.get("RANK", 0)) > 0:
        return 0
    write_json(args.json, found)
    append(args.output, tables(found))
    if args.plot:
        plot(found, args.plot)
    return 0 if any("tokens_per_s" in row for row in found["rows"]) else 1


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from dqt_dist.launch import discover, export
    from dqt_dist.parallel.groups import finalize, initialize
    from dqt_dist.training import cost

    args.config = args.config or DEFAULTS[device][0]
    named = [chosen(text, VARIANTS, "--variants") for text in (args.variants or DEFAULTS[device][1]).split(";")]
    launch = discover()
    export(launch)
    with tempfile.TemporaryDirectory() as folder:
        config = load(args, [], folder, launch.world_size)
        groups = initialize(config, launch)
        folder = of_rank_0(folder)
        args.set = [*args.set, *corpus(args, config, groups, folder)]
        peak = cost.peak_flops(config, groups)
        rows = []
        for name, settings in named:
            row: dict[str, Any] = {"variant": name, "settings": settings}
            try:
                with progress(name):
                    row |= measure(args, load(args, settings, folder, launch.world_size), groups, peak.flops)
            except Exception as error:  # a variant that does not fit or is not supported leaves the others
                row["failed"] = one_line(error)
                row["traceback"] = traceback.format_exc()
                print(row["traceback"], file=sys.stderr)
            free_memory()
            if device == "cuda":
                row["left_gib"] = torch.cuda.memory_allocated() / 2**30
            if launch.rank == 0:
                print(json.dumps({key: row[key] for key in row if key not in ("kernels", "traceback")}), flush=True)
                if args.kernels:
                    print(
                        "\n".join(f"  {ms:8.2f} ms {calls:5d} {kernel}" for kernel, calls, ms in row.get("kernels", []))
                    )
            rows.append(row)
        about = provenance(f"{launch.world_size} x {device_name()}")
        facts = {"config": args.config, "peak": f"{peak.flops / 1e12:,.4g} TFLOP/s ({peak.source})", "about": about}
        model = config.model.model_dump() | {"micro_batch_size": config.training.micro_batch_size}
        finalize()
    return facts | {"model": model, "steps": args.steps, "warmup": args.warmup, "rows": rows}


def of_rank_0(value: Any) -> Any:
    """The value that rank 0 has. A collective call."""
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def load(args: argparse.Namespace, settings: list[str], folder: str, world_size: int) -> Any:
    """The config of a variant. By default no parallel layout, one micro-batch per step and constant rates."""
    from dqt_dist.config import check_world, load_config

    base = ["parallel.tensor=1", "parallel.pipeline=1", "optimizer.gradient_dtype=bf16", "training.steps=1000"]
    base += [f'checkpoint.dir="{folder}/run"', "optimizer.warmup_steps=0", "optimizer.schedule=constant"]
    overrides = [*base, *args.set, *settings]
    config = load_config(args.config, overrides)
    if not any(setting.startswith("training.global_batch_size=") for setting in overrides):
        samples = config.training.micro_batch_size * world_size // (config.parallel.tensor * config.parallel.pipeline)
        config = load_config(args.config, [*overrides, f"training.global_batch_size={samples}"])
    check_world(config, world_size)
    return config


def corpus(args: argparse.Namespace, config: Any, groups: Any, folder: str) -> list[str]:
    """Overrides that name a corpus where the config's does not exist. A collective call."""
    if has_corpus(config, args.set):
        return []
    # The other ranks wait until rank 0 has prepared the text.
    return of_rank_0(prepare(f"{folder}/corpus", config) if groups.world.rank() == 0 else None)


def has_corpus(config: Any, overrides: list[str]) -> bool:
    """Whether the config's training text exists, or `overrides` name one."""
    named = any(setting.startswith("data.train") for setting in overrides)
    return named or Path(f"{config.data.train[0].path}.idx").exists()


def prepare(path: str, config: Any) -> list[str]:
    """Prepares the documentation of Python's library into the folder `path`. Returns the overrides that name it."""
    command = [sys.executable, str(ROOT / "tools/prepare_data.py"), "--input", "python-docs", "--output", path]
    command += ["--vocab-size", str(min(4096, config.model.vocab_size)), "--valid-fraction", "0.05"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    sources = [f'data.{part}=[{{"path": "{path}/{part}"}}]' for part in ("train", "valid")]
    # Validation data are never read, but one batch must exist.
    return [*sources, f'data.tokenizer="{path}/tokenizer.model"', "training.eval_batches=1"]


@contextmanager
def progress(name: str, seconds: float = 15.0) -> Iterator[None]:
    """Prints a line every few seconds, because building a large model takes minutes."""
    import torch

    done, start = threading.Event(), time.perf_counter()

    def report() -> None:
        while not done.wait(seconds):
            memory = f", {torch.cuda.memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
            print(f"{name}: {time.perf_counter() - start:.0f} s{memory}", file=sys.stderr, flush=True)

    threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def measure(args: argparse.Namespace, config: Any, groups: Any, peak_flops: float) -> dict[str, Any]:
    """Figures of one variant, from scratch. A collective call."""
    import torch

    from dqt_dist.checkpoint.store import Progress
    from dqt_dist.layers.build import build_model
    from dqt_dist.optim.engine import build_engine
    from dqt_dist.parallel.collectives import BYTES_SENT
    from dqt_dist.parallel.groups import select_stream
    from dqt_dist.plan.arithmetic import flops_per_token
    from dqt_dist.training import cost
    from dqt_dist.training.cuda_graph import choose_forward_backward
    from dqt_dist.training.loop import build_loaders
    from dqt_dist.training.step import mean_over_data, train_step

    on_cuda, start = groups.device.type == "cuda", time.perf_counter()
    if on_cuda:
        select_stream(config)
    batches = build_loaders(config, groups, Progress(0, 0, 0))[0].iterate(0)
    model_chunks = build_model(config, groups)
    engine = build_engine(model_chunks, config, groups)
    forward_backward = choose_forward_backward(model_chunks, engine.optimizer, config, groups)
    built = time.perf_counter() - start
    waited: list[float] = []
    losses: list[torch.Tensor] = []

    def step() -> None:
        begin = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - begin)
        losses.append(train_step(engine, model_chunks, batch, forward_backward).loss)

    def mark() -> Any:
        if not on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    try:
        if on_cuda:
            # Before the first steps, because torch counts the memory of a CUDA graph only when the graph is recorded.
            torch.cuda.reset_peak_memory_stats()
        for _ in range(args.warmup):
            step()
        if on_cuda:
            torch.cuda.synchronize()
        waited.clear()
        sent_before = Counter(BYTES_SENT)
        start, marks = time.perf_counter(), [mark()]
        for _ in range(args.steps):
            step()
            marks.append(mark())
        if on_cuda:
            torch.cuda.synchronize()
        wall = (time.perf_counter() - start) / args.steps
        sent = {kind: count / args.steps for kind, count in (BYTES_SENT - sent_before).items()}
        pairs = itertools.pairwise(marks)
        each = [first.elapsed_time(second) / 1e3 if on_cuda else second - first for first, second in pairs]
        seconds = statistics.median(each)
        flops = flops_per_token(config.model, config.data.document_masking)
        tokens = config.training.global_batch_size * config.model.seq_length
        total, low_bit = cost.count_parameters(model_chunks, engine.optimizer.low_bit, groups)
        row: dict[str, Any] = {
            "tokens_per_s": tokens / seconds,
            "wall_tokens_per_s": tokens / wall,
            "step_ms": seconds * 1e3,
            "step_ms_each": [1e3 * s for s in each],
            "loader_wait_ms": 1e3 * sum(waited) / len(waited),
            "mfu": flops * tokens / seconds / peak_flops,
            "tflops": flops * tokens / seconds / groups.world.size() / 1e12,
            # A CPU's resident memory never shrinks, so variants could not be compared.
            "peak_memory_gib": cost.peak_memory_bytes(groups) / 2**30 if on_cuda else None,
            "between_steps_gib": torch.cuda.memory_allocated() / 2**30 if on_cuda else None,
            "low_bit_bytes": cost.low_bit_bytes(engine.optimizer.low_bit),
            "parameters": total,
            "low_bit_parameters": low_bit,
            "first_loss": float(mean_over_data(losses[0], groups)),
            "last_loss": float(mean_over_data(losses[-1], groups)),
            "build_seconds": built,
            "sent_bytes": total_over_ranks(sent),
        }
        if not args.no_profile:
            row["parts"], row["kernels"], shares = profile(step, engine.optimizer, row["step_ms"])
            row |= {name: total / groups.world.size() for name, total in total_over_ranks(shares).items()}
        if args.sync_check and on_cuda:
            row["sync"] = sync_check(engine, model_chunks, [next(batches) for _ in range(3)], forward_backward)
        return row
    finally:
        batches.close()  # ends the loader's processes


def total_over_ranks(figures: dict[str, float]) -> dict[str, float]:
    """Sums of the figures of all ranks, by name. A collective call."""
    import torch.distributed as dist

    everyone: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, figures)
    names = {name for each in everyone for name in each}
    return {name: sum(each.get(name, 0.0) for each in everyone) for name in sorted(names)}


Longest = list[tuple[str, int, float]]
"""(name, calls, milliseconds)"""


def profile(step: Any, optimizer: Any, step_ms: float) -> tuple[dict[str, float], Longest, dict[str, float]]:
    """Milliseconds of one step by part, its longest kernels, and its shares of time (`shares_of_time`)."""
    import torch
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as torch_profile

    update = optimizer.step

    def recorded_update(*arguments: Any, **named: Any) -> None:
        with record_function(IN_OPTIMIZER):
            update(*arguments, **named)

    on_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    optimizer.step = recorded_update
    try:
        with torch_profile(activities=activities) as recorded:
            step()
            if on_cuda:
                torch.cuda.synchronize()
    finally:
        del optimizer.step  # the method of the class again
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    kernels: dict[str, list[float]] = {}
    parts = dict.fromkeys([part for part, _ in PARTS] + ["other"], 0.0)
    for name, ms, in_update in on_device(events) if on_cuda else on_host(events):
        calls_and_time = kernels.setdefault(name, [0, 0.0])
        calls_and_time[0] += 1
        calls_and_time[1] += ms
        parts[part_of(name, in_update)] += ms
    parts["idle"] = max(0.0, step_ms - sum(parts.values()))
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:LINES]
    return parts, [(name[:100], int(calls), ms) for name, (calls, ms) in longest], shares_of_time(events)


def shares_of_time(events: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the time from the first to the last kernel of a trace: `exposed` and `unused`. Empty without a GPU.

    The two are shares of a profiled step, in which launches take longer than otherwise.
    """
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            communicates = part_of(event["name"], in_update=False) == "communication"
            spans[communicates].append((event["ts"], event["ts"] + event["dur"]))
    everything = spans[True] + spans[False]
    if not everything:
        return {}
    length = max(end for _, end in everything) - min(start for start, _ in everything)
    busy, computing = covered(everything), covered(spans[False])
    return {"exposed": (busy - computing) / length, "unused": (length - busy) / length}


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans [start, end]."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def part_of(name: str, in_update: bool) -> str:
    found = next((part for part, fragments in PARTS if any(fragment in name for fragment in fragments)), "other")
    return "update" if in_update and found != "communication" else found


def update_range(events: list[dict[str, Any]]) -> tuple[float, float]:
    """Begin and end of the optimizer's step on the host, in the trace's microseconds."""
    begin, length = next(
        (e["ts"], e["dur"]) for e in events if e.get("name") == IN_OPTIMIZER and e["cat"] == "user_annotation"
    )
    return begin, begin + length


def on_device(events: list[dict[str, Any]]) -> Iterator[tuple[str, float, bool]]:
    """(name, milliseconds, launched by the optimizer's step) of everything that the GPU ran.

    A launch on the host and its kernel have the same correlation id.
    """
    begin, end = update_range(events)
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    for e in events:
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            yield e["name"], e["dur"] / 1e3, begin <= launched.get(e["args"].get("correlation"), -1.0) <= end


def on_host(events: list[dict[str, Any]]) -> Iterator[tuple[str, float, bool]]:
    """(name, milliseconds without the operators inside it, inside the optimizer's step) of every operator on a CPU."""
    begin, end = update_range(events)
    operators = [e for e in events if e.get("cat") == "cpu_op"]
    own = [e["dur"] for e in operators]
    open_ones: dict[Any, list[int]] = {}
    for i in sorted(range(len(operators)), key=lambda i: (operators[i]["ts"], -operators[i]["dur"])):
        e = operators[i]
        stack = open_ones.setdefault(e["tid"], [])
        while stack and operators[stack[-1]]["ts"] + operators[stack[-1]]["dur"] <= e["ts"]:
            stack.pop()
        if stack:
            own[stack[-1]] -= e["dur"]
        stack.append(i)
    for e, microseconds in zip(operators, own, strict=True):
        yield e["name"], max(0.0, microseconds) / 1e3, begin <= e["ts"] <= end


def sync_check(engine: Any, model_chunks: Any, batches: list[Any], forward_backward: Any) -> str:
    """ "none", or the lines of our code that waited for the GPU. Steps include the copy of the batch to the device."""
    from dqt_dist.training.step import train_step

    try:
        with waiting_is_an_error():
            for batch in batches:
                train_step(engine, model_chunks, batch, forward_backward)
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "dqt_dist" in frame.filename]
        where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*ours[-4:], frames[-1]]]
        return f"{' > '.join(where)}: {one_line(error)}"
    return "none"


def tables(found: dict[str, Any]) -> str:
    first = next((row for row in found["rows"] if "tokens_per_s" in row), {})
    columns = [
        "variant",
        "tokens/s",
        "ratio",
        "tokens/s, wall",
        "ms per step",
        "MFU",
        "peak GiB",
        "ratio",
        "GiB between steps",
    ]
    columns += ["bytes per low-bit weight", "loss, first to last"]
    rows = [cells(row, first) for row in found["rows"]]
    about = f"{found['about']} MFU against {found['peak']}; {found['steps']} steps after {found['warmup']}."
    model = ", ".join(f"{key} {value}" for key, value in found["model"].items())
    text = f"## {found['config']}\n\n{about} Model: {model}.\n\n{markdown(columns, rows)}"
    profiled = [row for row in found["rows"] if "parts" in row]
    if profiled:
        parts = list(profiled[0]["parts"])
        lines = [[row["variant"], *(f"{row['parts'][part]:.1f}" for part in parts)] for row in profiled]
        text += f"\nMilliseconds of one profiled step by part:\n\n{markdown(['variant', *parts], lines)}"
    checked = [f"{row['variant']}: {row['sync']}" for row in found["rows"] if "sync" in row]
    if checked:
        text += f"\nWaits for the GPU inside a step: {'; '.join(checked)}.\n"
    return text


def cells(row: dict[str, Any], first: dict[str, Any]) -> list[str]:
    if "tokens_per_s" not in row:
        return [row["variant"], row.get("failed", ""), *[""] * 9]
    peak, static = row["peak_memory_gib"], row["low_bit_bytes"]
    kinds = ", ".join(f"{kind} {value:.3g}" for kind, value in static.items() if value >= 0.005)
    return [
        row["variant"],
        f"{row['tokens_per_s']:,.0f}",
        f"{row['tokens_per_s'] / first['tokens_per_s']:.2f}",
        f"{row['wall_tokens_per_s']:,.0f}",
        f"{row['step_ms']:.1f}",
        f"{row['mfu']:.3f}",
        f"{peak:.2f}" if peak else "-",
        f"{peak / first['peak_memory_gib']:.2f}" if peak else "-",
        f"{row['between_steps_gib']:.2f}" if peak else "-",
        f"{sum(static.values()):.2f} ({kinds})" if static else "-",
        f"{row['first_loss']:.3f} -> {row['last_loss']:.3f}",
    ]


def plot(found: dict[str, Any], path: str) -> None:
    """Speed and memory as bars, and the parts of a step stacked; one line per variant."""
    plt = pyplot()
    rows = [row for row in found["rows"] if "tokens_per_s" in row][::-1]
    bars = [("tokens_per_s", "tokens/s", "{:,.0f}", "#4c72b0")]
    if all(row["peak_memory_gib"] for row in rows):
        bars.append(("peak_memory_gib", "peak memory, GiB", "{:.1f}", "#dd8452"))
    profiled = [row for row in rows if "parts" in row]
    size = (5 * len(bars) + 8 * bool(profiled), 1.6 + 0.45 * len(rows))
    widths = [1.0] * len(bars) + [1.4] * bool(profiled)
    figure, axes = plt.subplots(
        1, len(widths), figsize=size, sharey=True, squeeze=False, layout="constrained", width_ratios=widths
    )
    for axis, (key, label, shown, color) in zip(axes[0], bars, strict=False):
        drawn = axis.barh([row["variant"] for row in rows], [row[key] for row in rows], color=color)
        axis.bar_label(drawn, [shown.format(row[key]) for row in rows], padding=3, fontsize=9)
        axis.set_xlabel(label)
        axis.margins(x=0.2)
    if profiled:
        axis, left = axes[0][-1], [0.0] * len(profiled)
        # The same colour for a part in every figure; idle is light.
        for index, part in enumerate([*(part for part, _ in PARTS), "other", "idle"]):
            milliseconds = [row["parts"][part] for row in profiled]
            color = "#e6e6e6" if part == "idle" else plt.get_cmap("tab10")(index)
            axis.barh([row["variant"] for row in profiled], milliseconds, left=left, label=part, color=color)
            left = [a + b for a, b in zip(left, milliseconds, strict=True)]
        for row in rows:
            if "parts" not in row:
                axis.annotate("  not profiled", (0, row["variant"]), va="center", fontsize=8, color="gray")
        axis.set_xlabel("ms of a step, by part")
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{found['config']}: {found['about'].split('. ')[0]}", fontsize=9)
    figure.savefig(path, dpi=130)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
