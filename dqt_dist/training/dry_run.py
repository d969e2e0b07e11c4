"""One rank of a layout of any size, built on this machine without its memory: `--dry-run --rank R` of the trainer.

The process groups are torch's fake ones, in which R is alone and collectives do nothing. The tensors lie on the meta
device, where they have shapes and no values. All else is what a run executes: megatron-core's layers, the placement of
their shards, the optimizer of the low-bit weights, and what the rank gives to a checkpoint. A layout that cannot be
built ends here as it would end there. DeepSpeed's optimizer of the other weights is not built, because it cuts real
memory; the plan knows its sizes (dqt_dist/plan/memory.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dqt_dist.checkpoint.logical_tensor import LogicalState
from dqt_dist.checkpoint.state import logical_state
from dqt_dist.config import Config, process_grid
from dqt_dist.launch import Launch
from dqt_dist.layers.build import build_model
from dqt_dist.layers.parameters import low_bit_matrices, parameters
from dqt_dist.optim.gradient_reducer import GradientReducer
from dqt_dist.optim.low_bit_optimizer import LowBitOptimizer
from dqt_dist.parallel.groups import Groups, finalize, initialize


@dataclass(frozen=True)
class BuiltRank:
    """The parts of one rank, on the meta device."""

    groups: Groups
    model_chunks: nn.ModuleList
    optimizer: LowBitOptimizer
    state: LogicalState
    """What the rank gives to a checkpoint of the low-bit weights and their optimizer."""

    @property
    def updated_weights(self) -> int:
        """Low-bit weights of the rows that this rank owns."""
        return sum((rows.stop - rows.start) * rows.weight.columns for rows in self.optimizer.rows)

    def low_bit_bytes(self) -> dict[str, int]:
        """Bytes of codes, latents and moments. Scales, which are small, get most of their bytes in the first step."""
        found = {"codes": 0, "latents": 0, "moments": 0}
        for rows in self.optimizer.rows:
            found["codes"] += rows.weight.codes.nbytes
            for name, tensor in rows.state.items():
                found["latents" if name == "latent" else "moments"] += tensor.nbytes
        return found


@contextmanager
def built(config: Config, rank: int, world_size: int) -> Iterator[BuiltRank]:
    """Rank `rank` of `world_size`. Call it in a process that has no process group and sees no GPU."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    grid = process_grid(config, world_size)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        joined = initialize(config, Launch(rank, world_size, 0, 1, "dry run", "", 0))
        groups = replace(joined, device=torch.device("meta"))
        with groups.device:
            model_chunks = build_model(config, groups)
            reducer = GradientReducer(groups.data, grid.num_microbatches)
            optimizer = LowBitOptimizer(low_bit_matrices(model_chunks), config, groups, reducer)
            low_bit: Any = SimpleNamespace(low_bit=optimizer, shards=[])
            yield BuiltRank(groups, model_chunks, optimizer, logical_state(model_chunks, low_bit))
    finally:
        finalize()


def describe_rank(config: Config, rank: int, world_size: int) -> str:
    """What the rank is, holds, updates and saves, as text."""
    grid = process_grid(config, world_size)
    with built(config, rank, world_size) as found:
        groups, matrices = found.groups, [m for w in low_bit_matrices(found.model_chunks) for m in _layout(w).matrices]
        others = parameters(found.model_chunks)
        names = [matrix.name for matrix in matrices] + [m.name for p in others for m in p.layout.matrices]
        held = sum(weight.rows * weight.columns for weight in low_bit_matrices(found.model_chunks))
        gib = ", ".join(f"{kind} {number / 2**30:.3f}" for kind, number in found.low_bit_bytes().items() if number)
        pieces = [chunk for tensor in found.state.values() for chunk in tensor.chunks.values()]
        place = (
            f"tensor {groups.tensor.rank()} + {grid.tensor} * (data {groups.data.rank()} + {grid.data} * pipeline "
            f"{groups.pipeline.rank()})"
        )
        lines = [
            f"rank            {rank} = {place}",
            f"holds           blocks {_ranges(names)} of {config.model.num_layers}; {held:,} low-bit weights of "
            f"{len(matrices)} matrices, {sum(p.tensor.numel() for p in others):,} others",
            f"updates         {found.updated_weights:,} low-bit weights; GiB of {gib}",
            f"saves           up to {len(pieces):,} pieces of {len(found.state):,} low-bit tensors, "
            f"{sum(piece.nbytes for piece in pieces) / 1e9:.3f} GB",
            "built with fake process groups and no memory, but for DeepSpeed's optimizer of the other weights",
        ]
    return "\n".join(lines if matrices else lines[:2] + lines[-1:])


def _layout(weight: Any) -> Any:
    assert weight.layout is not None
    return weight.layout


def _ranges(names: list[str]) -> str:
    """The numbers N of names layers.N..., as "0-4, 40-44"."""
    numbers = sorted({int(match[1]) for name in names if (match := re.match(r"layers\.(\d+)\.", name))})
    starts = numbers[:1] + [after for before, after in pairwise(numbers) if after != before + 1]
    stops = [before for before, after in pairwise(numbers) if after != before + 1] + numbers[-1:]
    return ", ".join(f"{start}-{stop}" for start, stop in zip(starts, stops, strict=True))
