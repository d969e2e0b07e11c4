#!/usr/bin/env python3
"""What each ZeRO stage costs: speed, memory and traffic of the same steps, and the digest of the state after them.

Start the script with torchrun, one process per GPU (or on a CPU with gloo). All stages run one after the other in the
same processes, from the same seed, on the same random tokens. Stages with equal digests have computed the same bits.

    torchrun --nproc-per-node 4 benchmarks/zero_stages.py --config configs/130m_pure_ternary.json
    torchrun --nproc-per-node 4 benchmarks/zero_stages.py --config configs/130m_pure_ternary.json \\
        --set training.deterministic=true
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from benchmarks.common import append, device_name, free_memory, markdown, provenance

COLUMNS = (
    "stage",
    "tokens/s",
    "peak memory GiB",
    "bytes per low-bit weight",
    "sent per step: gradients MB",
    "codes MB",
    "digest",
)
OFFLOAD = {"device": "cpu", "pin_memory": True}


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--config", default="configs/demo_cpu.json", metavar="FILE", help="model and batch (default: %(default)s)")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value; may be repeated")
    add(
        "--steps",
        type=int,
        default=10,
        help="steps of each stage, of its schedule, the first three untimed (default: %(default)s)",
    )
    add(
        "--stages",
        default="0,1,2,3",
        help="which, comma-separated; 1+offload keeps moments on the host (default: %(default)s)",
    )
    add("--no-digest", action="store_true", help="leave out the digests, which write a checkpoint and read it")
    add("--output", metavar="FILE", help="also append the table to this file, as Markdown")
    args = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from dqt_dist.config import load_config
    from dqt_dist.launch import discover
    from dqt_dist.parallel.groups import finalize, initialize

    config = load_config(args.config, args.set)
    groups = initialize(config, discover())
    rows = [measure(config, groups, stage, args) for stage in args.stages.split(",")]
    if groups.world.rank() == 0:
        about = provenance(f"{groups.world.size()} x {device_name()}")
        append(args.output, f"## {args.config} {' '.join(args.set)}\n\n{about}\n\n{markdown(COLUMNS, rows)}")
    finalize()
    return 0


def measure(config: Any, groups: Any, name: str, args: argparse.Namespace) -> list[str]:
    """One row: the stage from scratch for some steps. A collective call."""
    import torch

    from dqt_dist.layers.build import build_model
    from dqt_dist.optim.engine import build_engine
    from dqt_dist.parallel.collectives import BYTES_SENT
    from dqt_dist.training import cost
    from dqt_dist.training.cuda_graph import choose_forward_backward
    from dqt_dist.training.step import train_step

    stage, _, offload = name.partition("+")
    zero: dict[str, Any] = {"stage": int(stage)} | ({"offload_optimizer": OFFLOAD} if offload else {})
    config = config.model_copy(update={"deepspeed": config.deepspeed | {"zero_optimization": zero}})
    model_chunks = build_model(config, groups)
    engine = build_engine(model_chunks, config, groups)
    forward_backward = choose_forward_backward(model_chunks, engine.optimizer, config, groups)
    on_cuda, steps = groups.device.type == "cuda", args.steps
    for step in range(1, steps + 1):
        if step == 4:
            synchronize(groups)
            start = time.perf_counter()
            if on_cuda:
                torch.cuda.reset_peak_memory_stats()
            BYTES_SENT.clear()
        train_step(engine, model_chunks, batches(config, groups, step), forward_backward)
    synchronize(groups)
    seconds = (time.perf_counter() - start) / (steps - 3)
    sent = cost.sent_bytes(steps - 3)
    static = sum(cost.low_bit_bytes(engine.optimizer.low_bit).values())
    peak = cost.peak_memory_bytes(groups) / 2**30
    digest = "-" if args.no_digest else state_digest(model_chunks, engine.optimizer, groups)
    del engine, model_chunks
    free_memory()
    tokens = config.training.global_batch_size * config.model.seq_length / seconds
    megabytes = [f"{sent[f'{kind}_sent_bytes'] / 1e6:,.1f}" for kind in ("gradients", "codes")]
    memory = f"{peak:.2f}" if on_cuda else "-"
    return [name, f"{tokens:,.0f}", memory, f"{static:.2f}", *megabytes, digest[:12]]


def synchronize(groups: Any) -> None:
    import torch
    import torch.distributed as dist

    if groups.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def batches(config: Any, groups: Any, step: int) -> list[dict[str, Any]]:
    """The micro-batches of this data-parallel rank; the global batch is a function of the step."""
    import torch

    training, model = config.training, config.model
    shape = (training.global_batch_size, model.seq_length + 1)
    tokens = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(step))
    micro = tokens.view(-1, groups.data.size(), training.micro_batch_size, shape[1])[:, groups.data.rank()]
    mask = torch.ones(training.micro_batch_size, model.seq_length)
    return [{"tokens": t[:, :-1].contiguous(), "labels": t[:, 1:].contiguous(), "loss_mask": mask} for t in micro]


def state_digest(model_chunks: Any, optimizer: Any, groups: Any) -> str:
    """The digest of tools/inspect_ckpt.py, by way of a temporary checkpoint; "" on ranks other than 0."""
    import tempfile

    import torch.distributed as dist

    from dqt_dist.checkpoint import store
    from dqt_dist.checkpoint.digest import digest_of
    from dqt_dist.checkpoint.reader import CheckpointReader

    place: list[Any] = [tempfile.mkdtemp() if groups.world.rank() == 0 else None]
    dist.broadcast_object_list(place)
    checkpoint = optimizer.config.checkpoint.model_copy(update={"dir": place[0]})
    config = optimizer.config.model_copy(update={"checkpoint": checkpoint})
    writer = store.open_writer(config)
    store.save(writer, model_chunks, optimizer, config, store.Progress(0, 0, 0), {})
    writer.close()
    found = ""
    if groups.world.rank() == 0:
        found = digest_of(CheckpointReader(place[0])).total
        subprocess.run(["rm", "-r", place[0]], check=True)
    dist.barrier()
    return found


if __name__ == "__main__":
    sys.exit(main())
