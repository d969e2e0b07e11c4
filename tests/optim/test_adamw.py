"""adamw_direction against torch.optim.AdamW."""

from __future__ import annotations

import pytest
import torch

from dqt_dist.optim.adamw import adamw_direction
from tests.tolerances import ELEMENTWISE_FP32


@pytest.mark.parametrize(("beta1", "beta2", "epsilon"), [(0.9, 0.95, 1e-8), (0.0, 0.999, 1e-3), (0.5, 0.0, 1e-6)])
def test_equals_torch_adamw_over_several_steps(beta1: float, beta2: float, epsilon: float) -> None:
    """Starting from zero, AdamW without decay is at minus the learning rate times the sum of the directions. Moments
    are compared too. Control: without the bias correction the first directions are off by (1 - beta1) and sqrt(1 -
    beta2)."""
    weight = torch.nn.Parameter(torch.zeros(7, 5))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(beta1, beta2), eps=epsilon, weight_decay=0.0, foreach=False)
    exp_avg, exp_avg_sq, total = torch.zeros(7, 5), torch.zeros(7, 5), torch.zeros(7, 5)
    for step in range(1, 7):
        gradient = torch.randn(7, 5) * 10.0 ** (step - 3)
        weight.grad = gradient.clone()
        optimizer.step()
        kept = gradient.clone()
        total += adamw_direction(gradient, exp_avg, exp_avg_sq, step=step, beta1=beta1, beta2=beta2, epsilon=epsilon)
        assert torch.equal(gradient, kept), "the gradient is read only"
        ELEMENTWISE_FP32.assert_close(-total, weight.detach(), f"step {step}")
        state = optimizer.state[weight]
        ELEMENTWISE_FP32.assert_close(exp_avg, state["exp_avg"], "exp_avg")
        ELEMENTWISE_FP32.assert_close(exp_avg_sq, state["exp_avg_sq"], "exp_avg_sq")


def test_first_direction_is_the_sign_of_the_gradient() -> None:
    """m / (1 - beta1) = g and sqrt(v / (1 - beta2)) = |g|: what bias correction is for. u = 2^-24, four roundings."""
    gradient = torch.randn(100)
    direction = adamw_direction(
        gradient, torch.zeros(100), torch.zeros(100), step=1, beta1=0.9, beta2=0.95, epsilon=1e-30
    )
    assert float((direction - gradient.sign()).abs().max()) <= 2.0**-20


def test_a_block_of_rows_gets_the_direction_it_has_in_the_whole() -> None:
    """What updating in chunks and sharding by rows rely on."""
    gradient, settings = torch.randn(6, 33), {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
    whole = [torch.zeros(6, 33), torch.zeros(6, 33)]
    parts = [torch.zeros(6, 33), torch.zeros(6, 33)]
    for step in (1, 2, 3):
        expected = adamw_direction(gradient, *whole, step=step, **settings)
        blocks = [
            adamw_direction(gradient[a:b], *(m[a:b] for m in parts), step=step, **settings) for a, b in [(0, 1), (1, 6)]
        ]
        assert torch.equal(torch.cat(blocks), expected)
    assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])
