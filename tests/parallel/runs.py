"""A run inside a test worker, and the whole logical tensors that tests compare, assembled from all ranks.

    run = start("parallel.tensor=2")          # in a worker, on every rank
    run.step(1); whole_state(run)             # the state of the model by logical name, on rank 0

Logical names are the same in every layout, so tests compare whole tensors by name and never a rank's shard.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqt_dist.checkpoint.logical_tensor import LogicalState, LogicalTensor
from dqt_dist.checkpoint.state import logical_state, rectangles
from dqt_dist.config import Config
from dqt_dist.launch import Launch
from dqt_dist.layers.build import build_model
from dqt_dist.lowbit.gradient_buffer import GradientBuffer
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.packing import unpack
from dqt_dist.optim.engine import CombinedOptimizer, build_engine
from dqt_dist.parallel.groups import Groups, initialize
from dqt_dist.training.cuda_graph import choose_forward_backward
from dqt_dist.training.step import ForwardBackward, StepResult, mean_over_data, train_step
from tests.distributed import run_distributed
from tests.small import random_batches, small_config

Whole = dict[str, Tensor]
"""Tensors of the whole model by logical name."""


@dataclass
class Run:
    """The parts of a run on this rank."""

    config: Config
    groups: Groups
    model_chunks: nn.ModuleList
    engine: Any

    @property
    def optimizer(self) -> CombinedOptimizer:
        return self.engine.optimizer

    @property
    def forward_backward(self) -> ForwardBackward:
        return choose_forward_backward(self.model_chunks, self.optimizer, self.config, self.groups)

    def step(self, number: int, forward_backward: ForwardBackward | None = None) -> StepResult:
        """Step `number` on the batch of that number."""
        batches = random_batches(self.config, number, self.groups.data.rank(), self.groups.data.size())
        return train_step(self.engine, self.model_chunks, batches, forward_backward or self.forward_backward)

    def mean_loss(self, result: StepResult) -> float:
        return float(mean_over_data(result.loss, self.groups))


def start(*overrides: str, launch: Launch | None = None) -> Run:
    """Groups, model and engine of the small configuration with `overrides`. A collective call of the whole world.

    Without `launch` the process group exists already.
    """
    config = small_config(*overrides)
    if launch is None:
        rank, size = dist.get_rank(), dist.get_world_size()
        launch = Launch(rank, size, rank, size, "tests", "", 0)
    groups = initialize(config, launch)
    model_chunks = build_model(config, groups)
    return Run(config, groups, model_chunks, build_engine(model_chunks, config, groups))


# ---- from rectangles to whole tensors ----


def assemble(state: LogicalState) -> Whole:
    """Whole tensors on rank 0 (nothing on other ranks) from the rectangles of every rank. A collective call.

    Elements that several ranks hold must have the same bits, and every element must be held.
    """
    for tensor in state.values():
        tensor.chunks = {place: chunk.cpu() for place, chunk in tensor.chunks.items()}
    parts_per_rank: list[Any] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(state, parts_per_rank)
    if parts_per_rank is None:
        return {}
    whole: Whole = {}
    covered: dict[str, Tensor] = {}
    for rank, part in enumerate(parts_per_rank):
        for name, tensor in part.items():
            whole.setdefault(name, torch.zeros(tensor.shape, dtype=tensor.dtype))
            seen = covered.setdefault(name, torch.zeros(tensor.shape, dtype=torch.bool))
            for (row, column), chunk in tensor.chunks.items():
                place = (slice(row, row + chunk.shape[0]), slice(column, column + chunk.shape[1]))
                known = seen[place]
                assert torch.equal(whole[name][place][known], chunk[known]), f"rank {rank} holds another {name}"
                whole[name][place], seen[place] = chunk, True
    missing = {name: int((~seen).sum()) for name, seen in covered.items() if not seen.all()}
    assert not missing, f"elements that no rank holds: {missing}"
    return whole


def whole_state(run: Run) -> Whole:
    """A copy of everything that a checkpoint holds, by the names of the checkpoint."""
    return assemble(logical_state(run.model_chunks, run.optimizer))


def whole_gradients(run: Run) -> Whole:
    """Reduced gradients before clipping, by logical name. Only inside a step: see `record_gradients`."""
    state: LogicalState = {}

    def add(name: str, shape: tuple[int, int], offset: tuple[int, int], view: Tensor) -> None:
        state.setdefault(name, LogicalTensor(shape, torch.float32)).add(offset, view.float())

    for rows in run.optimizer.low_bit.rows:
        layout, mean = rows.weight.layout, rows.gradient.mean
        assert layout is not None and mean is not None
        for matrix, row, local, count in layout.pieces(rows.start, rows.stop):
            view = mean[local - rows.start : local - rows.start + count]
            add(matrix.name, (matrix.rows, matrix.columns), (row, layout.column_offset), view)
    for shard, gradient in zip(run.optimizer.shards, run.optimizer.gradients, strict=True):
        assert gradient.mean is not None
        for matrix, offset, view in rectangles(shard.parameter.layout, shard.start, gradient.mean.reshape(-1)):
            add(matrix.name, (matrix.rows, matrix.columns), offset, view)
    return assemble(state)


def record_gradients(run: Run) -> list[Whole]:
    """A list that every following step adds its reduced gradients to, taken where the step computes their norm."""
    recorded: list[Whole] = []
    reducer = run.optimizer.reducer
    square_norm = reducer.square_norm

    def record_and_go_on(gradients: list[GradientBuffer]) -> Tensor:
        recorded.append({name: gradient.clone() for name, gradient in whole_gradients(run).items()})
        return square_norm(gradients)

    reducer.square_norm = record_and_go_on  # type: ignore[method-assign]
    return recorded


@dataclass
class Record:
    """The results of some steps of a run, as whole tensors."""

    config: Config
    initial: Whole
    gradients: list[Whole]
    """Gradients of each step, reduced over data-parallel ranks, before clipping."""
    losses: list[float]
    grad_norms: list[float]
    final: Whole


def _record(rank: int, world_size: int, steps: int, *overrides: str) -> Record | None:
    run = start(*overrides)
    initial = whole_state(run)
    gradients = record_gradients(run)
    results = [run.step(number) for number in range(1, steps + 1)]
    losses, norms = [run.mean_loss(result) for result in results], [float(result.grad_norm) for result in results]
    record = Record(run.config, initial, gradients, losses, norms, whole_state(run))
    return record if rank == 0 else None


def recorded(world_size: int, steps: int, *overrides: str) -> Record:
    """Runs `steps` steps on `world_size` ranks. Cached: the same arguments return the same record."""
    return _recorded(world_size, steps, tuple(sorted(overrides)))


@functools.cache
def _recorded(world_size: int, steps: int, overrides: tuple[str, ...]) -> Record:
    record = run_distributed(_record, world_size, steps, *overrides)[0]
    assert record is not None
    return record


# ---- comparing ----


def assert_equal(found: Whole, wanted: Whole, kinds: str | tuple[str, ...] = "") -> None:
    """The same names (beginning with one of `kinds`), and the same bits under each."""
    names = {name for name in wanted if name.startswith(kinds)}
    assert names and names == {name for name in found if name.startswith(kinds)}
    different = [name for name in sorted(names) if not torch.equal(found[name], wanted[name])]
    assert not different, f"{len(different)} of {len(names)} differ: {different[:5]}"


def codes(whole: Whole, config: Config) -> Iterator[tuple[str, Tensor]]:
    """The codes of each logical matrix, unpacked: int8 [rows, columns]."""
    grid = make_grid(config.quantization.bits)
    for name, packed in whole.items():
        if name.startswith("codes/"):
            yield name, unpack(packed, grid, packed.shape[1] // grid.group_bytes * grid.group_codes)


def fraction_of_codes_that_differ(found: Whole, wanted: Whole, config: Config) -> float:
    """Over all low-bit matrices together."""
    other = dict(codes(found, config))
    different = [(other[name] != tensor).flatten() for name, tensor in codes(wanted, config)]
    return float(torch.cat(different).float().mean())
