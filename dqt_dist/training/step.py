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
from dqt_dist.layers.attention import document_mask
from dqt_dist.optim.schedule import StepRates
from dqt_dist.parallel import megatron_device
from dqt_dist.parallel.groups import Groups

Batch = dict[str, Tensor]
"""One micro-batch: tokens and labels int64, loss_mask fp32, each [micro_batch_size, seq_length]; with document masking
also document_starts int32 [micro_batch_size, documents]."""

ForwardBackward = Callable[[list[Batch]], Tensor]
"""Runs the micro-batches of a step forward and backward, into the gradient buffers. Returns this rank's mean loss."""


@dataclass
class StepResult:
    """The results of a step. Tensors stay on the device; only a step that is logged copies them to the host."""

    loss: Tensor
    """Mean over this rank's micro-batches. 0 on ranks that are not in the last pipeline stage."""
    grad_norm: Tensor
    rates: StepRates


def _masked_mean(loss_mask: Tensor, loss_divisor: int, per_token_loss: Tensor) -> tuple[Tensor, Tensor]:
    """Megatron's loss function: the loss to differentiate, divided by `loss_divisor`, and the loss to report."""
    loss = (per_token_loss.float() * loss_mask).sum() / loss_mask.sum()
    # The schedule divides the first result, in place, by the number of micro-batches of the call.
    return loss / loss_divisor, loss.detach()


def _forward_step(
    batches: Iterator[Batch], model: nn.Module, config: Config, device: torch.device, loss_divisor: int
) -> tuple[Tensor, partial]:
    """Megatron's forward_step_func: runs one micro-batch through this stage. Every stage reads the batch."""
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
    tokens = batch["tokens"]
    position_ids = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    mask = document_mask(batch["document_starts"], config) if config.data.document_masking else None
    output = model(tokens, position_ids, mask, labels=batch["labels"])
    return output, partial(_masked_mean, batch["loss_mask"], loss_divisor)


def run_schedule(
    model_chunks: nn.ModuleList,
    batches: list[Batch],
    config: Config,
    groups: Groups,
    *,
    forward_only: bool,
    loss_divisor: int = 1,
) -> Tensor:
    """Runs `batches` forward and, unless `forward_only`, backward. Returns this rank's mean loss.

    Gradients are summed over the batches. They are the gradients of loss / `loss_divisor`. A step of several calls
    passes the number of calls as `loss_divisor`.
    """
    with megatron_device.cuda_or_cpu():
        losses: list[Tensor] = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, config=config, device=groups.device, loss_divisor=loss_divisor),
            data_iterator=[iter(batches) for _ in model_chunks],
            model=list(model_chunks),
            num_microbatches=len(batches),
            seq_length=config.model.seq_length,
            micro_batch_size=config.training.micro_batch_size,
            forward_only=forward_only,
        )
    # Only the last pipeline stage has losses.
    return torch.stack(losses).mean() if losses else torch.zeros((), device=groups.device)


def train_step(
    engine: Any, model_chunks: nn.ModuleList, batches: list[Batch], forward_backward: ForwardBackward
) -> StepResult:
    """One optimizer step: forward and backward of every micro-batch, then one update of codes and parameters."""
    if not model_chunks.training:  # in the first step, and in the step after an evaluation
        model_chunks.train()
    rates = engine.optimizer.begin_step()
    # Each weight gradient is summed over the micro-batches in the GradientBuffer of its weight.
    loss = engine.optimizer.loss = forward_backward(batches)
    # `CombinedOptimizer.step`: reduce, norm and clip, update with stochastic rounding, gather.
    engine.step()
    return StepResult(loss, engine.optimizer.grad_norm, rates)


def mean_over_data(loss: Tensor, groups: Groups) -> Tensor:
    """Mean loss of the global batch, on every rank. `loss` is 0 on ranks that are not in the last pipeline stage."""
    total = loss.clone()
    dist.all_reduce(total, group=groups.world)
    return total / (groups.data.size() * groups.tensor.size())


@torch.no_grad()
def evaluate(model_chunks: nn.ModuleList, batches: Iterator[list[Batch]], config: Config, groups: Groups) -> float:
    """Mean loss per token over `batches`. Each element is a global batch."""
    model_chunks.eval()
    losses = [run_schedule(model_chunks, batch, config, groups, forward_only=True) for batch in batches]
    return float(mean_over_data(torch.stack(losses).mean(), groups))
