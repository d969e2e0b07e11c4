"""The two RMSNorms against the formula in float64, whole and split by sequence or by width."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dqt_dist.launch import Launch
from dqt_dist.layers.norm import ParallelRMSNorm, RMSNorm
from dqt_dist.layers.transformer_config import transformer_config
from dqt_dist.parallel import groups as process_groups
from tests.distributed import run_distributed
from tests.small import small_config
from tests.tolerances import ELEMENTWISE_FP32

TOKENS, BATCH, WIDTH, EPSILON = 6, 3, 32, 1e-5


def whole() -> tuple[Tensor, Tensor, Tensor]:
    """x and dy [tokens, batch, width] of very different magnitudes, weight [width]."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, BATCH, WIDTH, generator=generator)
    x *= torch.logspace(-3, 2, TOKENS)[:, None, None]
    return x, torch.randn(x.shape, generator=generator), torch.randn(WIDTH, generator=generator)


def by_formula() -> dict[str, Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * weight with its gradients, in float64."""
    x, grad, weight = (part.double() for part in whole())
    x.requires_grad_()
    weight.requires_grad_()
    y = x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight
    y.backward(grad)
    assert x.grad is not None and weight.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dw": weight.grad}


def run_norm(rank: int, world_size: int, kind: str, sequence: bool) -> dict[str, np.ndarray]:
    """One norm on this rank's part of `whole`; returns y, dx and the weight's gradient."""
    config = small_config(f"parallel.tensor={world_size}", f"parallel.sequence={str(sequence).lower()}")
    groups = process_groups.initialize(config, Launch(rank, world_size, rank, world_size, "test", "", 0))
    megatron_config = transformer_config(config, on_cpu=True)
    x, grad, weight = whole()
    if kind == "width":
        norm: Any = ParallelRMSNorm(megatron_config, WIDTH, groups.tensor)
        x, grad, weight = (part.chunk(world_size, dim=-1)[rank] for part in (x, grad, weight))
    else:
        norm = RMSNorm(megatron_config, WIDTH, EPSILON)
        if sequence:
            x, grad = (part.chunk(world_size, dim=0)[rank] for part in (x, grad))
    norm.weight.data.copy_(weight)
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(grad)
    return {"y": y.detach().numpy(), "dx": x.grad.numpy(), "dw": norm.weight.grad.numpy()}  # type: ignore[union-attr]


def together(parts: list[dict[str, np.ndarray]], name: str, dim: int) -> Tensor:
    return torch.cat([torch.from_numpy(part[name]) for part in parts], dim=dim)


@pytest.mark.parametrize("kind", ["replicated", "width"])
def test_norm_of_one_rank_equals_the_formula(kind: str) -> None:
    found = run_distributed(run_norm, 1, kind, False)[0]
    for name, expected in by_formula().items():
        ELEMENTWISE_FP32.assert_close(torch.from_numpy(found[name]), expected, name)


def test_norm_of_a_split_width_equals_the_whole() -> None:
    """Control: the mean over the local half alone differs by far more than the tolerance."""
    parts, expected = run_distributed(run_norm, 2, "width", False), by_formula()
    for name, value in expected.items():
        ELEMENTWISE_FP32.assert_close(together(parts, name, -1), value, name)
    x, _, weight = whole()
    local = torch.nn.functional.rms_norm(x[..., : WIDTH // 2], (WIDTH // 2,), weight[: WIDTH // 2], EPSILON)
    assert float((local - expected["y"][..., : WIDTH // 2]).abs().max()) > 0.01


def test_norm_under_sequence_parallelism_sums_the_gradient_of_its_weight() -> None:
    """Each rank normalises its own tokens. Every rank has the weight gradient of all tokens, with equal bits.

    Control: the gradient of one half of the tokens differs.
    """
    parts, expected = run_distributed(run_norm, 2, "replicated", True), by_formula()
    ELEMENTWISE_FP32.assert_close(together(parts, "y", 0), expected["y"], "y")
    ELEMENTWISE_FP32.assert_close(together(parts, "dx", 0), expected["dx"], "dx")
    first, second = (torch.from_numpy(part["dw"]) for part in parts)
    ELEMENTWISE_FP32.assert_close(first, expected["dw"], "dw")
    assert torch.equal(first, second)


def test_replicated_norm_without_sequence_parallelism_sums_nothing() -> None:
    """Every rank sees every token, so the gradient is complete. A sum over TP would double it."""
    parts, expected = run_distributed(run_norm, 2, "replicated", False), by_formula()
    for part in parts:
        for name, value in expected.items():
            ELEMENTWISE_FP32.assert_close(torch.from_numpy(part[name]), value, name)
