"""Metrics of the codes: flips, zeros, saturation and code histograms of every logical matrix, summed over all ranks.

    flip_rate          share of codes that the last step changed
    zero_fraction      share of codes that are 0 after the last step
    saturation         share of wanted weights that lay outside the grid and were clamped; with latents, their grid
    latent_flip_rate   share of latents that the last step changed; with latents only

Each rank fills its part of one table [logical matrices, ...]. One all-reduce completes the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dqt_dist.config import Config
from dqt_dist.lowbit.grid import Grid
from dqt_dist.lowbit.update import COUNTS, LATENT_COUNTS
from dqt_dist.optim.low_bit_optimizer import LowBitOptimizer
from dqt_dist.parallel.groups import Groups

METRIC_OF_COUNT = {
    "flips": "flip_rate",
    "zeros": "zero_fraction",
    "clamped": "saturation",
    "latent_flips": "latent_flip_rate",
}
"""The metric that each count of an update gives when it is divided by the number of weights."""


@dataclass(frozen=True)
class LowBitMetrics:
    """Metrics of each matrix and of the whole model, on the host."""

    names: tuple[str, ...]
    metric_names: tuple[str, ...]
    per_matrix: Tensor
    """fp64 [matrices, metrics], columns in the order of `metric_names`."""
    overall: dict[str, float]


class LowBitMetricsCollector:
    """Collects the metrics of one run. Built once per run."""

    def __init__(self, optimizer: LowBitOptimizer, config: Config, groups: Groups) -> None:
        self.optimizer, self.config, self.groups = optimizer, config, groups
        parts = config.model.linear_shapes()
        self.names = tuple(f"layers.{i}.{part}" for i in range(config.model.num_layers) for part in parts)
        if config.quantization.embeddings:
            self.names += ("embed_tokens", "lm_head")
        counts = COUNTS if config.quantization.latent_bits is None else LATENT_COUNTS
        self.metrics = {METRIC_OF_COUNT[name]: index for index, name in enumerate(counts) if name in METRIC_OF_COUNT}
        """Column of each metric among the counts of an update."""
        self.table_row = {name: row for row, name in enumerate(self.names)}
        # Without sharding every data-parallel rank updates the same rows, and only rank 0 counts them.
        self.counts_here = optimizer.sharded or groups.data.rank() == 0

    def collect(self) -> LowBitMetrics:
        """Metrics of the last update, which has counted them. A collective call."""
        assert self.optimizer.counted, f"the counts of step {self.optimizer.rates.step} were left out"
        columns = list(self.metrics.values())
        table = torch.zeros(len(self.names), len(columns) + 1, dtype=torch.int64, device=self.groups.device)
        if self.counts_here:
            for rows in self.optimizer.rows:
                assert rows.weight.layout is not None
                if not rows.row_counts:  # a rank may own no row
                    continue
                table_rows = torch.tensor(
                    [self.table_row[m.name] for m in rows.weight.layout.matrices], device=table.device
                )
                row_counts = torch.bincount(rows.row_matrix, minlength=len(table_rows))
                table[table_rows, :-1] += rows.counts()[:, columns]
                table[table_rows, -1] += row_counts * rows.weight.columns
        dist.all_reduce(table, group=self.groups.world)
        table = table.cpu().double()
        sums = table.sum(dim=0)
        overall = {name: float(sums[i] / sums[-1]) for i, name in enumerate(self.metrics)}
        return LowBitMetrics(self.names, tuple(self.metrics), table[:, :-1] / table[:, -1:], overall)

    def code_histograms(self, grid: Grid) -> Tensor:
        """Number of times each code of the grid occurs in each matrix: int64 [matrices, levels]. A collective call."""
        levels = grid.qmax - grid.qmin + 1
        table = torch.zeros(len(self.names), levels, dtype=torch.int64, device=self.groups.device)
        if self.counts_here:
            for rows in self.optimizer.rows:
                weight = rows.weight
                assert weight.layout is not None
                for matrix, _, row, count in weight.layout.pieces(rows.start, rows.stop):
                    codes = weight.unpack(row, row + count).flatten().long() - grid.qmin
                    table[self.table_row[matrix.name]] += torch.bincount(codes, minlength=table.shape[1])
        dist.all_reduce(table, group=self.groups.world)
        return table.cpu()
