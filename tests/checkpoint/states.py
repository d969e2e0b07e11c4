"""Small logical states without a model, cut over the ranks by rows, for tests of the writer and the tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dqt_dist.checkpoint.folder import Progress
from dqt_dist.checkpoint.logical_tensor import LogicalState, LogicalTensor
from dqt_dist.checkpoint.writer import CheckpointWriter, Retention
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.packing import pack
from tests.small import small_config

MATRIX = "layers.0.mlp.up_proj"
ROWS, COLUMNS = 48, 32


def whole_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """A tensor of every part of the state. The codes are ternary, a quarter of them -1, half 0, a quarter +1."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.tensor([-1, 0, 0, 1]).repeat(ROWS * COLUMNS // 4).view(ROWS, COLUMNS)
    return {
        f"codes/{MATRIX}": pack(codes, make_grid("ternary")),
        f"scale/{MATRIX}": torch.full((1, 1), 0.25),
        f"latent/{MATRIX}": pack(3 * codes, make_grid(4)),
        f"latent_scale/{MATRIX}": torch.full((1, 1), 0.0625),
        f"low_bit.exp_avg/{MATRIX}": torch.randn(ROWS, COLUMNS, generator=generator),
        "parameter/norm": torch.randn(COLUMNS, 1, generator=generator),
        "parameter.exp_avg/norm": torch.randn(COLUMNS, 1, generator=generator),
    }


def own_rows(tensors: dict[str, torch.Tensor]) -> LogicalState:
    """This rank's rows of whole tensors, as copies; single rows are held by every rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    state: LogicalState = {}
    for name, tensor in tensors.items():
        start, stop = (rank * len(tensor) // size, (rank + 1) * len(tensor) // size) if len(tensor) > 1 else (0, 1)
        chunks = {(start, 0): tensor[start:stop].clone()}
        state[name] = LogicalTensor((tensor.shape[0], tensor.shape[1]), tensor.dtype, chunks)
    return state


def facts(folder: Path) -> dict[str, Any]:
    """What a run adds to the manifest."""
    config = small_config("quantization.latent_bits=4", f"checkpoint.dir={folder}").model_dump(mode="json")
    return {"config": config, "layout": {"data": dist.get_world_size()}, "versions": "of a test"}


def progress_at(step: int) -> Progress:
    return Progress(step, tokens=100 * step, samples=12 * step)


def open_writer(folder: Path, asynchronous: bool = False, keep_last: int = 9, **keep: int) -> CheckpointWriter:
    return CheckpointWriter(folder / "checkpoints", Retention(keep_last, **keep), asynchronous)


def write(rank: int, world_size: int, folder: str, steps: list[int], seed: int = 0) -> None:
    """A worker that writes the state of `seed` as checkpoints of `steps`."""
    writer = open_writer(Path(folder))
    for step in steps:
        writer.save(own_rows(whole_tensors(seed)), progress_at(step), facts(Path(folder)))
    writer.close()
