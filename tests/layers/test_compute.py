"""The products of each compute precision against what they stand for, written out in fp64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dqt_dist.kernels.quantize import quantize
from dqt_dist.layers.compute import E4M3, make_compute
from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.matrix import LowBitMatrix
from tests.parallel.runs import fraction_of_codes_that_differ, recorded

TOKENS, IN, OUT = 64, 96, 80
SCALES = (2.0**-6, 2.0**-4)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def compute_of(compute: str, activation: str | None = None, weight_gradient: str = "fp8") -> Any:
    activation = activation or ("e4m3" if compute == "fp8" else "int8")
    return make_compute(SimpleNamespace(compute=compute, activation=activation, weight_gradient=weight_gradient))  # type: ignore[arg-type]


def made_weight(device: str, gradient_dtype: torch.dtype = torch.float32) -> LowBitMatrix:
    gate, up = LogicalMatrix("gate", OUT // 2, IN), LogicalMatrix("up", OUT // 2, IN)
    weight = LowBitMatrix(OUT, IN, make_grid("ternary"), torch.device(device))
    weight.assign(ShardLayout((gate, up), (RowBlock(0, 0, OUT // 2), RowBlock(1, 0, OUT // 2)), IN))
    weight.scale.copy_(torch.tensor(SCALES))
    weight.set_codes(torch.randint(-1, 2, (OUT, IN), generator=torch.Generator().manual_seed(1)).to(device))
    weight.gradient.dtype = gradient_dtype
    return weight


def inputs(device: str) -> tuple[Tensor, Tensor]:
    """x and dy in bf16; tokens of dy differ in size by 2^20, as those of a real gradient do."""
    generator = torch.Generator().manual_seed(2)
    sizes = 2.0 ** torch.linspace(-20, 0, TOKENS)[:, None]
    x, dy = torch.randn(TOKENS, IN, generator=generator), torch.randn(TOKENS, OUT, generator=generator) * sizes
    return x.bfloat16().to(device), dy.bfloat16().to(device)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compute", ["fp32", "bf16", "int8", "fp8"])
def test_forward_and_dgrad(compute: str, device: str) -> None:
    """Products of operands that are quantised already, so only the rounding of the products themselves counts.

    The result is rounded, by 2^-8 in bf16. fp8 products on tensor cores keep about 14 bits of a sum. dgrad in fp8
    rounds dy to 4 bits, by half a step or 2^-4.
    """
    products, weight, (x, dy) = compute_of(compute), made_weight(device), inputs(device)
    operand = quantize(x, products.activation_dtype)
    y = products.epilogue(products.product(weight)(operand), operand.scale, weight, torch.bfloat16)
    exact = (operand.values.double() * operand.scale.double()) @ weight.dequantize().double().t()
    assert relative(y, exact) < 2.0**-8
    if compute in ("fp32", "int8"):
        # The sum is an integer, which fp32 and int32 hold.
        codes = operand.values.double() @ weight.unpack().double().t()
        assert torch.equal(products.product(weight)(operand).double(), codes)
    dx = products.dgrad(weight)(products.gradient(dy, weight))
    wanted = dy.double() @ weight.dequantize().double()
    assert relative(dx, wanted) < (2.0**-4 if compute == "fp8" else 2.0**-8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "compute, weight_gradient", [("bf16", "fp8"), ("fp8", "bf16"), ("fp8", "fp8"), ("int8", "fp8")]
)
def test_weight_gradients_add_up(compute: str, weight_gradient: str, gradient_dtype: torch.dtype, device: str) -> None:
    """Two micro-batches. e4m3 rounds dy twice to 4 bits, by at most 2^-4 of a value each time.

    The errors have random signs, so the error of the sum is well below 2^-4.
    """
    products, weight = compute_of(compute, weight_gradient=weight_gradient), made_weight(device, gradient_dtype)
    x, dy = inputs(device)
    operand = quantize(x, products.activation_dtype)
    exact = dy.double().t() @ (operand.values.double() * operand.scale.double())
    for _ in range(2):
        products.wgrad(products.gradient(dy, weight), operand, weight)
    assert (
        weight.gradient.micro_batches == 2
        and weight.gradient.local is not None
        and weight.gradient.local.dtype == gradient_dtype
    )
    assert relative(weight.gradient.local, 2 * exact) < (
        2.0**-4 if (compute, weight_gradient) == ("fp8", "fp8") else 2.0**-7
    )


def test_fp8_gradient_is_e4m3_and_keeps_every_tokens_digits() -> None:
    """A token with a gradient of 2^-20 of another's has as many digits in dgrad, because it has a scale of its own.

    Control: with one scale for all tokens, no digit of the smallest is left.
    """
    products, weight, (_, dy) = compute_of("fp8"), made_weight("cpu"), inputs("cpu")
    gradient = products.gradient(dy, weight)
    assert gradient.values.dtype == E4M3
    smallest = (products.dgrad(weight)(gradient)[0], dy[0].double() @ weight.dequantize().double())
    assert relative(*smallest) < 2.0**-4
    one_scale = (dy.float() / dy.abs().max() * 448).to(E4M3)
    assert not one_scale[0].float().any()


# ---- whole models ----

SHAPES = ("model.ffn_hidden_size=64", "model.num_query_groups=4", "quantization.compute={}")


@pytest.mark.parametrize("compute", ["int8", "fp8"])
def test_layouts_train_alike(compute: str) -> None:
    """One step at TP 2 with sequence parallelism against one process.

    bf16 sums over ranks change the last digits of a gradient, and so a few draws; 2 % of the codes would be hundreds.
    The control is another seed.
    """
    overrides = [setting.format(compute) for setting in SHAPES]
    alone = recorded(1, 2, *overrides)
    split = recorded(2, 2, *overrides, "parallel.tensor=2", "parallel.sequence=true")
    other = recorded(1, 2, *overrides, "training.seed=7")
    assert fraction_of_codes_that_differ(split.final, alone.final, alone.config) < 0.02
    assert fraction_of_codes_that_differ(other.final, alone.final, alone.config) > 0.3
    # The mean over 12 x 16 tokens of losses, which bf16 activations change by 2^-8 of a logit.
    assert split.losses == pytest.approx(alone.losses, rel=2e-3)


def test_precisions_start_from_the_same_loss() -> None:
    """Same codes, same data: only the rounding of activations changes the first loss.

    e4m3 has 3 bits of mantissa, int8 has up to 7.
    """
    losses = {c: recorded(1, 1, *(s.format(c) for s in SHAPES)).losses[0] for c in ("fp32", "bf16", "int8", "fp8")}
    assert all(loss == pytest.approx(losses["fp32"], rel=2e-3) for loss in losses.values())
    assert losses["fp8"] != losses["int8"]
