"""Initial values, bit-identical in every layout, because a draw is a function of logical coordinates only."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqt_dist.config import Config, ScaleRule
from dqt_dist.layers.parameters import low_bit_matrices, parameters
from dqt_dist.lowbit.coordinates import ShardLayout, normal
from dqt_dist.lowbit.grid import Grid
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.packing import new_packed, pack
from dqt_dist.lowbit.scale import WeightStatistics, choose_scale
from dqt_dist.parallel.groups import Group

# Weights drawn at once at initialisation, by device. A draw has a few int64 temporaries, of 32 MiB each on a CPU and
# 512 MiB each on a GPU. On a GPU smaller blocks would take millions of launches for a model of 40 B weights.
WEIGHTS_PER_DRAW = {"cpu": 1 << 22, "cuda": 1 << 26}


def _row_blocks(
    layout: ShardLayout, device: torch.device, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, int]]:
    """[low, high) of the rows that are drawn at once, of shard rows [start, stop). Default: all rows."""
    stop = layout.rows if stop is None else stop
    rows_at_once = max(1, WEIGHTS_PER_DRAW[device.type] // layout.columns)
    for low in range(start, stop, rows_at_once):
        yield low, min(low + rows_at_once, stop)


def _initial_weights(config: Config, layout: ShardLayout, start: int, stop: int, device: torch.device) -> Tensor:
    """Normal draws of standard deviation init_std for shard rows [start, stop), fp32."""
    return normal(config.training.seed, layout, start, stop, device) * config.model.init_std


@torch.no_grad()
def initialize(model_chunks: nn.ModuleList, config: Config, group: Group) -> None:
    """Sets norms to 1 and all other weights to normal draws of standard deviation init_std.

    Low-bit weights are then quantised. All values are bit-identical in every layout. On the meta device there are none.
    """
    if any(parameter.tensor.is_meta for parameter in parameters(model_chunks)):
        return
    for parameter in parameters(model_chunks):
        if parameter.layout.columns == 1:
            parameter.tensor.fill_(1.0)
            continue
        device = parameter.tensor.device
        for start, stop in _row_blocks(parameter.layout, device):
            parameter.tensor[start:stop] = _initial_weights(config, parameter.layout, start, stop, device)
    for weight in low_bit_matrices(model_chunks):
        _initialize_low_bit(weight, config, group)


@torch.no_grad()
def initial_latents(weight: LowBitMatrix, start: int, stop: int, config: Config) -> Tensor:
    """The packed latents of shard rows [start, stop), from the draws that gave their codes."""
    assert weight.layout is not None and weight.latent_grid is not None
    device = weight.codes.device
    latents = new_packed(stop - start, weight.columns, weight.latent_grid, device)
    if device.type == "meta":
        return latents
    for low, high in _row_blocks(weight.layout, device, start, stop):
        weights = _initial_weights(config, weight.layout, low, high, device)
        latents[low - start : high - start] = pack(weight.nearest_latents(weights, low), weight.latent_grid)
    return latents


def _initialize_low_bit(weight: LowBitMatrix, config: Config, group: Group) -> None:
    layout, device = weight.layout, weight.codes.device
    assert layout is not None
    statistics: list[WeightStatistics | None] = [None] * len(layout.matrices)
    for start, stop in _row_blocks(layout, device):
        weights = _initial_weights(config, layout, start, stop, device)
        row_matrix = weight.row_matrix[start:stop]
        for index in range(len(layout.matrices)):
            part = WeightStatistics.of(weights[row_matrix == index], config.model.init_std)
            so_far = statistics[index]
            statistics[index] = part if so_far is None else so_far.merge(part)
    complete = _complete([s for s in statistics if s is not None], group)
    quantization = config.quantization
    power_of_two = quantization.scale_power_of_two

    def scales(grid: Grid, rule: ScaleRule, sigmas: float) -> Tensor:
        chosen = [choose_scale(s, grid, rule, sigmas=sigmas, power_of_two=power_of_two) for s in complete]
        return torch.tensor(chosen, device=device)

    weight.scale.copy_(scales(weight.grid, quantization.scale_rule, quantization.scale_sigmas))
    if weight.latent_grid is not None:
        assert quantization.latent_sigmas is not None
        weight.latent_scale.copy_(scales(weight.latent_grid, "sigma", quantization.latent_sigmas))
    for start, stop in _row_blocks(layout, device):
        weight.set_weights(_initial_weights(config, layout, start, stop, device), start)


def _complete(statistics: list[WeightStatistics], group: Group) -> list[WeightStatistics]:
    """The statistics of each logical matrix over all TP ranks.

    The sums are integers, so the order of the sum over ranks does not matter.
    """
    sums = torch.stack([torch.stack([s.count, s.abs_sum, s.square_sum]) for s in statistics])
    largest = torch.stack([s.abs_max for s in statistics])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return [
        WeightStatistics(statistics[0].unit, row[0], row[1], row[2], abs_max)
        for row, abs_max in zip(sums, largest, strict=True)
    ]
