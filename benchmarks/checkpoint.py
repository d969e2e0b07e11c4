#!/usr/bin/env python3
"""What checkpoints cost: save, the time an asynchronous save blocks, load, and load at another number of ranks.

The script starts its own processes with torchrun: on GPUs where there are any, else on the CPU with gloo. N
data-parallel ranks under ZeRO 1 save and load. One process loads their checkpoint and saves another, which the N ranks
load. The model is that of a config.

Beside each number stands its ceiling, measured in the same processes. All ranks at once write a plain file with one
fsync, or read a file, or copy a tensor to host memory, each of as many bytes as the rank's share. Files leave the page
cache before they are read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from benchmarks.common import ROOT, device_name, markdown, provenance

EXAMPLES = """\
examples:
  benchmarks/checkpoint.py --folder /scratch
  benchmarks/checkpoint.py --ranks 8 --config configs/1b_ternary.json --folder /scratch --output checkpoint.md
"""
# The config without --config: a model whose checkpoint is some 100 MB.
WIDER = ["model.num_layers=4", "model.hidden_size=512", "model.ffn_hidden_size=1408", "model.num_attention_heads=8"]
WIDER += ["model.num_query_groups=8", "model.vocab_size=8192"]
PIECE = bytes(1 << 24)


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=style)
    add = parser.add_argument
    add("--config", metavar="FILE", help="default: configs/demo_cpu.json made wider")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value; may be repeated")
    add("--ranks", type=int, default=2, metavar="N", help="processes, and GPUs where there are any (default: 2)")
    add("--repeats", type=int, default=3, metavar="N", help="the fastest of N is shown (default: 3)")
    add("--folder", default=".", metavar="DIR", help="a place on the disk to measure (default: here)")
    add("--output", metavar="FILE", help="also write the table as Markdown")
    add("--worker", metavar="JSON", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        work(args, json.loads(args.worker))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="checkpoint_benchmark_") as scratch:
        many = start(args, args.ranks, scratch, write=True, read=["many"])
        one = start(args, 1, scratch, write=True, read=["many"])
        again = start(args, args.ranks, scratch, write=False, read=["one"])
    n = args.ranks
    loads = [(f"load, {n} ranks", many), (f"load, {n} ranks to 1", one), (f"load, 1 rank to {n}", again)]
    text = report(args, [*many["rows"], *([what, *result["loads"][0]] for what, result in loads)])
    print(text)
    if args.output:
        Path(args.output).write_text(text)
    return 0


def start(args: argparse.Namespace, ranks: int, scratch: str, **task: Any) -> dict[str, Any]:
    """Runs a task in `ranks` processes; returns what rank 0 found."""
    own = "many" if ranks == args.ranks else "one"
    task |= {"scratch": scratch, "own": own, "result": f"{scratch}/result.json"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
    command += ["--worker", json.dumps(task), "--ranks", str(ranks), "--repeats", str(args.repeats)]
    command += ["--config", args.config] if args.config else []
    command += [part for setting in args.set for part in ("--set", setting)]
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1"} | os.environ)
    return json.loads(Path(task["result"]).read_text())


# ---- in each process ----


def work(args: argparse.Namespace, task: dict[str, Any]) -> None:
    """One torchrun job: saves below its own folder, loads from others, leaves the numbers in a file."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from dqt_dist.config import load_config
    from dqt_dist.launch import discover
    from dqt_dist.layers.build import build_model
    from dqt_dist.optim.engine import build_engine
    from dqt_dist.parallel.groups import finalize, initialize

    scratch = Path(task["scratch"])
    settings = [*([] if args.config else WIDER), f"checkpoint.dir={scratch / task['own']}", "checkpoint.keep_last=1"]
    settings += ["training.micro_batch_size=1", f"training.global_batch_size={args.ranks}", "parallel.tensor=1"]
    settings += ["parallel.pipeline=1", "deepspeed.zero_optimization.stage=1", *args.set]
    config = load_config(args.config or ROOT / "configs/demo_cpu.json", settings)
    groups = initialize(config, discover())
    model_chunks = build_model(config, groups)
    state = (model_chunks, build_engine(model_chunks, config, groups).optimizer, config)
    plain = scratch / f"plain_{groups.world.rank()}"
    rows = save_rows(args, state, plain, groups.device) if task["write"] else []
    loads = [load_row(args, state, plain, scratch / name) for name in task["read"]]
    if groups.world.rank() == 0:
        Path(task["result"]).write_text(json.dumps({"rows": rows, "loads": loads}))
    finalize()


def save_rows(args: argparse.Namespace, state: tuple[Any, ...], plain: Path, device: Any) -> list[list[Any]]:
    """[what, seconds, bytes, seconds of the ceiling] of both kinds of saves."""
    import torch

    waiting, size, _ = save_repeatedly(args, state, asynchronous=False)
    blocked, _, written = save_repeatedly(args, state, asynchronous=True)
    share = size // args.ranks
    source = torch.ones(share, dtype=torch.uint8, device=device)
    target = torch.zeros(share, dtype=torch.uint8, pin_memory=source.is_cuda)
    copying = fastest(args, lambda: target.copy_(source))
    writing = fastest(args, lambda: write_plain(plain, share))
    return [
        [f"save, {args.ranks} ranks", min(waiting[1:]), size, writing],
        ["asynchronous save, training blocked, first", blocked[0], size, copying],
        ["asynchronous save, training blocked, later", min(blocked[1:]), size, copying],
        ["asynchronous save, until complete", min(written), size, writing],
    ]


def save_repeatedly(
    args: argparse.Namespace, state: tuple[Any, ...], asynchronous: bool
) -> tuple[list[float], int, list[float]]:
    """Seconds that each of repeats + 1 saves blocked, bytes of one, seconds until each was complete."""
    from dqt_dist.checkpoint import store

    model_chunks, optimizer, config = state
    checkpoint = config.checkpoint.model_copy(update={"async_save": asynchronous})
    writer = store.open_writer(config.model_copy(update={"checkpoint": checkpoint}))
    blocked = []
    for step in range(args.repeats + 1):
        progress = store.Progress(step, step, step)
        blocked.append(timed(lambda: store.save(writer, model_chunks, optimizer, config, progress, {})))  # noqa: B023
        writer.wait()
    writer.close()
    finished = writer.take_finished()
    return blocked, finished[-1].save_bytes, [figures.save_seconds for figures in finished]


def load_row(args: argparse.Namespace, state: tuple[Any, ...], plain: Path, run: Path) -> list[Any]:
    """[seconds, bytes, seconds of the ceiling] of checking and loading the newest checkpoint of `run`."""
    from dqt_dist.checkpoint import folder, store

    path = folder.resolve(run)
    files = [path / file for file in folder.read_manifest(path)["files"]]
    size = sum(file.stat().st_size for file in files)
    write_plain(plain, size // args.ranks)
    reading = fastest(args, lambda: read_plain(plain), before=lambda: leave_cache([plain]))
    loading = fastest(args, lambda: store.load(store.opened(path), *state), before=lambda: leave_cache(files))
    return [loading, size, reading]


def timed(function: Callable[[], Any]) -> float:
    """Seconds until all ranks have done it."""
    import torch.distributed as dist

    dist.barrier()
    begin = time.perf_counter()
    function()
    dist.barrier()
    return time.perf_counter() - begin


def fastest(args: argparse.Namespace, function: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    return min((before(), timed(function))[1] for _ in range(args.repeats))


def write_plain(path: Path, num_bytes: int) -> None:
    with open(path, "wb", buffering=0) as file:
        for first in range(0, num_bytes, len(PIECE)):
            file.write(memoryview(PIECE)[: num_bytes - first])
        os.fsync(file.fileno())


def read_plain(path: Path) -> None:
    target = bytearray(len(PIECE))
    with open(path, "rb", buffering=0) as file:
        while file.readinto(target):
            pass


def leave_cache(files: list[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# ---- the table ----


def report(args: argparse.Namespace, rows: list[list[Any]]) -> str:
    """Markdown: seconds, GB/s of the whole checkpoint, and the ceiling."""
    config = args.config or f"configs/demo_cpu.json with {' '.join(WIDER)}"
    about = f"Config {config} {' '.join(args.set)}; checkpoint of {rows[0][2]:,} bytes, fastest of {args.repeats}."
    cells = []
    for what, seconds, num_bytes, ceiling_seconds in rows:
        speed, ceiling = num_bytes / 1e9 / seconds, num_bytes / 1e9 / ceiling_seconds
        cells.append([what, f"{seconds:.3f}", f"{speed:.2f}", f"{ceiling:.2f}", f"{speed / ceiling:.0%}"])
    table = markdown(("what", "seconds", "GB/s", "ceiling GB/s", "of it"), cells)
    return f"# Checkpoints: what they cost\n\n{provenance(f'{args.ranks} x {device_name()}')}\n{about}\n\n{table}"


if __name__ == "__main__":
    sys.exit(main())
