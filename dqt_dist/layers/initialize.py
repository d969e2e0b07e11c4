"""Initial values, bit-identical in every layout, because a draw is a function of logical coordinates only."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqt_dist.config import Config
from dqt_dist.layers.parameters import low_bit_matrices, parameters
from dqt_dist.lowbit.coordinates import ShardLayout, normal
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.scale import WeightStatistics, choose_scale
from dqt_dist.parallel.groups import Group

# Weights drawn at once at initialisation, by device. A draw has a few int64 temporaries, of 32 MiB each on a CPU and
# 512 MiB each on a GPU. On a GPU smaller blocks would take millions of launches for a model of 40 B weights.
WEIGHTS_PER_DRAW = {"cpu": 1 << 22, "cuda": 1 << 26}


def _row_blocks(layout: ShardLayout, device: torch.device) -> Iterator[tuple[int, int]]:
    """[start, stop) of the rows that are drawn at once."""
    rows_at_once = max(1, WEIGHTS_PER_DRAW[device.type] // layout.columns)
    for start in range(0, layout.rows, rows_at_once):
        yield start, min(start + rows_at_once, layout.rows)


@torch.no_grad()
def initialize(model_chunks: nn.ModuleList, config: Config, group: Group) -> None:
    """Sets norms to 1 and all other weights to normal draws of standard deviation init_std.

    Low-bit weights are then quantised. All values are bit-identical in every layout.
    """
    seed, std = config.training.seed, config.model.init_std
    for parameter in parameters(model_chunks):
        if parameter.layout.columns == 1:
            parameter.tensor.fill_(1.0)
            continue
        for start, stop in _row_blocks(parameter.layout, parameter.tensor.device):
            parameter.tensor[start:stop] = normal(seed, parameter.layout, start, stop, parameter.tensor.device) * std
    for weight in low_bit_matrices(model_chunks):
        _initialize_low_bit(weight, config, group)


def _initialize_low_bit(weight: LowBitMatrix, config: Config, group: Group) -> None:
    layout, device = weight.layout, weight.codes.device
    assert layout is not None
    seed, std = config.training.seed, config.model.init_std
    statistics: list[WeightStatistics | None] = [None] * len(layout.matrices)
    for start, stop in _row_blocks(layout, device):
        weights = normal(seed, layout, start, stop, device) * std
        row_matrix = weight.row_matrix[start:stop]
        for index in range(len(layout.matrices)):
            part = WeightStatistics.of(weights[row_matrix == index], std)
            so_far = statistics[index]
            statistics[index] = part if so_far is None else so_far.merge(part)
    weight.scale.copy_(_scales([s for s in statistics if s is not None], weight, config, group))
    for start, stop in _row_blocks(layout, device):
        weights = normal(seed, layout, start, stop, device) * std
        weight.set_weights(weights, start)


def _scales(statistics: list[WeightStatistics], weight: LowBitMatrix, config: Config, group: Group) -> Tensor:
    """The scale of each logical matrix, from the statistics of all TP ranks.

    The sums are integers, so the order of the sum over ranks does not matter.
    """
    sums = torch.stack([torch.stack([s.count, s.abs_sum, s.square_sum]) for s in statistics])
    largest = torch.stack([s.abs_max for s in statistics])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    quantization = config.quantization
    complete = [
        WeightStatistics(statistics[0].unit, row[0], row[1], row[2], abs_max)
        for row, abs_max in zip(sums, largest, strict=True)
    ]
    scales = [
        choose_scale(
            s,
            weight.grid,
            quantization.scale_rule,
            sigmas=quantization.scale_sigmas,
            power_of_two=quantization.scale_power_of_two,
        )
        for s in complete
    ]
    return torch.tensor(scales, device=weight.codes.device)
