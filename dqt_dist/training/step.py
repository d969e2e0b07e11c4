"""One optimizer step, and one evaluation pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqt_dist.config import Config
from dqt_dist.optim.schedule import StepRates
from dqt_dist.parallel.groups import Groups
from dqt_dist.training.forward_backward import Batch, ForwardBackward, run_schedule


@dataclass
class StepResult:
    """What a step leaves, as tensors on the device: nothing is copied to the host unless it is logged."""

    loss: Tensor
    """Mean over this rank's micro-batches; 0 on ranks that are not in the last pipeline stage."""
    grad_norm: Tensor
    rates: StepRates


def train_step(
    engine: Any, chunks: nn.ModuleList, batches: list[Batch], forward_backward: ForwardBackward
) -> StepResult:
    """Forward and backward of every micro-batch, then one update of codes and parameters (`CombinedOptimizer.step`)."""
    if not chunks.training:  # after an evaluation, and at first
        chunks.train()
    rates = engine.optimizer.begin_step()
    loss = forward_backward(batches)
    engine.step()
    return StepResult(loss, engine.optimizer.grad_norm, rates)


def mean_over_data(loss: Tensor, groups: Groups) -> Tensor:
    """Mean loss of the global batch, on every rank; `loss` is 0 where the last stage is not."""
    total = loss.clone()
    dist.all_reduce(total, group=groups.world)
    return total / (groups.data.size() * groups.tensor.size())


@torch.no_grad()
def evaluate(chunks: nn.ModuleList, batches: Iterator[list[Batch]], config: Config, groups: Groups) -> float:
    """Mean loss a token over `batches`, a global batch each."""
    chunks.eval()
    losses = [run_schedule(chunks, batch, config, groups, forward_only=True) for batch in batches]
    return float(mean_over_data(torch.stack(losses).mean(), groups))
