"""The loss of LlamaModel with a vocabulary split over ranks, against torch's cross-entropy in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from dqt_dist.launch import Launch
from dqt_dist.layers.build import build_model
from dqt_dist.layers.language_model import LlamaModel
from dqt_dist.parallel import groups as process_groups
from tests.distributed import run_distributed
from tests.small import small_config
from tests.tolerances import ELEMENTWISE_FP32, UNIT_ROUNDOFF

SEQUENCE, BATCH, VOCABULARY = 9, 3, 64
DTYPES = [torch.float32, torch.bfloat16]


def whole(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """logits [s, b, vocabulary], labels [b, s] and the gradient of each loss [b, s].

    No two tokens have the same loss or the same gradient.
    """
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(SEQUENCE, BATCH, VOCABULARY, generator=generator) * 4).to(dtype)
    labels = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    return logits, labels, torch.rand(BATCH, SEQUENCE, generator=generator)


def _losses(rank: int, world_size: int) -> dict[torch.dtype, tuple[list[Any], list[Any], bool, str]]:
    """By type of the logits: loss, gradient, whether the gradient reused their memory, error of a second backward."""
    config = small_config(f"parallel.tensor={world_size}", f"model.vocab_size={VOCABULARY}")
    groups = process_groups.initialize(config, Launch(rank, world_size, rank, world_size, "test", "", 0))
    (model,) = build_model(config, groups)
    assert isinstance(model, LlamaModel)
    found = {}
    for dtype in DTYPES:
        logits, labels, grad = whole(dtype)
        leaf = logits.chunk(world_size, dim=-1)[rank].contiguous().requires_grad_()
        made = leaf.clone()
        memory: list[int] = []
        made.register_hook(lambda gradient, memory=memory: memory.append(gradient.data_ptr()))
        loss = model.compute_language_model_loss(labels, made)
        loss.backward(grad, retain_graph=True)
        assert leaf.grad is not None and leaf.grad.dtype == dtype and loss.dtype == torch.float32
        gradient = leaf.grad.clone()
        try:
            loss.backward(grad)
            error = ""
        except RuntimeError as raised:
            error = str(raised)
        found[dtype] = loss.tolist(), gradient.tolist(), memory == [made.data_ptr()], error
    dist.barrier()
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_loss_and_gradient_are_torchs(world_size: int) -> None:
    """Negative control: with each label increased by one the loss is far away."""
    ranks = run_distributed(_losses, world_size)
    for dtype in DTYPES:
        logits, labels, grad = whole(dtype)
        exact = logits.double().requires_grad_()
        wanted = cross_entropy(exact.permute(1, 2, 0), labels, reduction="none")
        (wanted_gradient,) = torch.autograd.grad(wanted, exact, grad.double())
        loss = torch.tensor(ranks[0][dtype][0])
        ELEMENTWISE_FP32.assert_close(loss, wanted.detach(), "loss")
        shifted = cross_entropy(exact.permute(1, 2, 0), (labels + 1) % VOCABULARY, reduction="none")
        assert float((shifted.detach() - loss).abs().max()) > 1
        gradient = torch.cat([torch.tensor(rank[dtype][1]) for rank in ranks], dim=-1)
        # One rounding to the type of the logits. Before that, fp32 numbers of up to 16, with ulp 2^-20, are subtracted
        # and exponentiated.
        rounding = wanted_gradient.abs() * UNIT_ROUNDOFF[dtype] + 2.0**-20
        assert bool(((gradient - wanted_gradient).abs() <= rounding).all())
        for other_loss, _, in_place, error in (rank[dtype] for rank in ranks):
            assert other_loss == ranks[0][dtype][0], "ranks must agree on every bit"
            assert in_place, "a second tensor as large as the logits"
            assert "modified by an inplace operation" in error
