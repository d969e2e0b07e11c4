"""One optimizer step, and one evaluation pass, as Megatron's pipeline schedule runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from dqt_dist.config import Config
from dqt_dist.optim.schedule import StepRates
from dqt_dist.parallel import megatron_cpu
from dqt_dist.parallel.groups import Groups

Batch = dict[str, Tensor]
"""tokens and labels int64, loss_mask fp32, each [micro_batch_size, seq_length]."""

ForwardBackward = Callable[[list[Batch]], Tensor]
"""Runs the micro-batches of a step forward and backward, leaves their gradients, returns this rank's mean loss."""


@dataclass
class StepResult:
    """What a step leaves, as tensors on the device: nothing is copied to the host unless it is logged."""

    loss: Tensor
    """Mean over this rank's micro-batches; 0 on ranks that are not in the last pipeline stage."""
    grad_norm: Tensor
    rates: StepRates


def _loss(mask: Tensor, parts: int, per_token_loss: Tensor) -> tuple[Tensor, Tensor]:
    loss = (per_token_loss.float() * mask).sum() / mask.sum()
    # The schedule divides what it is given by the number of its micro-batches, in place.
    return loss / parts, loss.detach()


def _forward(batches: Iterator[Batch], model: nn.Module, device: torch.device, parts: int) -> tuple[Tensor, partial]:
    """Megatron's forward_step_func: one micro-batch through this stage."""
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
    tokens = batch["tokens"]
    position_ids = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    output = model(tokens, position_ids, None, labels=batch["labels"])
    return output, partial(_loss, batch["loss_mask"], parts)


def run_schedule(
    chunks: nn.ModuleList, batches: list[Batch], config: Config, groups: Groups, *, forward_only: bool, parts: int = 1
) -> Tensor:
    """All micro-batches forward (and backward); gradients are left summed. Returns this rank's mean loss.

    `parts` is in how many calls the micro-batches of a step come: gradients are those of the loss divided by it.
    """
    with megatron_cpu.cuda_or_cpu():
        losses: list[Tensor] = get_forward_backward_func()(
            forward_step_func=partial(_forward, device=groups.device, parts=parts),
            data_iterator=[iter(batches) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=config.model.seq_length,
            micro_batch_size=config.training.micro_batch_size,
            forward_only=forward_only,
        )
    # Only the last pipeline stage has losses.
    return torch.stack(losses).mean() if losses else torch.zeros((), device=groups.device)


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
