"""Prologue and quantisation in one pass: definitions against torch's autograd, Triton kernels against definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dqt_dist.kernels import quantize as kernels
from dqt_dist.lowbit.activation import codes_at, token_absmax, token_scale
from tests.kernels.runners import INTERPRETED, Runner

E4M3 = torch.float8_e4m3fn
CODES = [torch.int8, E4M3, None]
# Below, at and above the kernels' block of 2048 features, and widths that fill no power of two.
FEATURES = [16, 1000, 2064, 8208] if INTERPRETED else [16, 1000, 2048, 5632]
EPS = 1e-5
# More than the programs of the norm's backward, so that some programs have several.
TOKENS = 11 if INTERPRETED else 33


def made(tokens: int, features: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(features)).to(dtype)


# ---- the definitions ----


def test_norm_and_its_backward_equal_autograd() -> None:
    """In fp64-free fp32: both sides round each of about ten operations once, 2^-20 is 16 roundings."""
    x, weight = made(7, 48, torch.float32).requires_grad_(), (torch.rand(48) + 0.5).requires_grad_()
    expected = functional.rms_norm(x, (48,), weight, EPS)
    operand, inverse_rms = kernels.rms_norm_quantize(x.detach(), weight.detach(), EPS, None)
    torch.testing.assert_close(operand.values, expected.detach(), rtol=2.0**-20, atol=2.0**-20)
    dh = made(7, 48, torch.float32).flip(0)
    dx, dweight = kernels.rms_norm_backward(dh, x.detach(), weight.detach(), inverse_rms)
    wanted = torch.autograd.grad(expected, (x, weight), dh)
    torch.testing.assert_close(dx, wanted[0], rtol=2.0**-18, atol=2.0**-18)
    torch.testing.assert_close(dweight, wanted[1], rtol=2.0**-18, atol=2.0**-18)


def test_swiglu_and_its_backward_equal_autograd() -> None:
    gate_up = made(7, 96, torch.float32).requires_grad_()
    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
    expected = functional.silu(gate) * up
    assert torch.equal(kernels.swiglu_quantize(gate_up.detach(), None).values, expected.detach())
    dh = made(7, 48, torch.float32)
    gradient, h = kernels.swiglu_backward(dh, gate_up.detach(), None, None, None)
    torch.testing.assert_close(
        gradient.values, torch.autograd.grad(expected, gate_up, dh)[0], rtol=2.0**-19, atol=2.0**-19
    )
    torch.testing.assert_close(h.values, expected.detach(), rtol=2.0**-20, atol=2.0**-20)


@pytest.mark.parametrize("operand_dtype", [torch.int8, E4M3])
def test_codes_are_those_of_the_prologue(operand_dtype: torch.dtype) -> None:
    """The one pass is prologue, then quantisation. At the forward's scale the backward computes the forward's codes."""
    gate_up = made(5, 2 * 48)
    h = kernels.swiglu_quantize(gate_up.float(), None).values
    operand = kernels.swiglu_quantize(gate_up, operand_dtype)
    scale = token_scale(token_absmax(h), operand_dtype)
    assert operand.scale is not None and torch.equal(operand.scale, scale)
    assert torch.equal(operand.values.float(), codes_at(h, scale, operand_dtype).float())
    assert torch.equal(kernels.swiglu_scale(gate_up, operand_dtype), scale)
    halves = [kernels.operand_scale(half, operand_dtype) for half in h.chunk(2, dim=1)]
    assert torch.equal(torch.maximum(*halves), scale) and not torch.equal(halves[0], scale)
    _, again = kernels.swiglu_backward(made(5, 48), gate_up, operand.scale, operand_dtype, None)
    assert torch.equal(again.values.float(), operand.values.float())
    other = kernels.swiglu_quantize(gate_up, operand_dtype, operand.scale * 2)
    assert not torch.equal(other.values.float(), operand.values.float())


def test_tiny_gradients_keep_their_digits() -> None:
    """Activations have BitNet's floor of 1e-5 under the maximum; gradients of 1e-9 must not vanish under it."""
    grad = made(4, 32, torch.float32) * 1e-9
    operand = kernels.quantize(grad, E4M3, feature_scale=torch.ones(32))
    # e4m3 has 3 bits of mantissa: half a unit of 2^-3, relative, for all but values 2^-14 of the largest.
    torch.testing.assert_close(operand.dequantized(torch.float32), grad, rtol=2.0**-4, atol=1e-12)
    assert kernels.quantize(grad, E4M3).values.float().abs().max() < 1


# ---- the kernels ----


def equal_or_close(found: Tensor, wanted: Tensor, ulps: int) -> None:
    """8-bit codes are equal but for a few that differ by one step: their fp32 values, at a border, differ by an ulp.

    Other numbers are equal within `ulps`.
    """
    if found.dtype in (torch.int8, E4M3):
        steps = (found.view(torch.int8).int() - wanted.view(torch.int8).int()).abs()
        opposite_zeros = (found.float() == 0) & (wanted.float() == 0)
        steps = steps.masked_fill(opposite_zeros, 0)
        assert steps.max() <= 1 and (steps > 0).double().mean() <= 2e-4
    else:
        unit = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}[found.dtype]
        torch.testing.assert_close(found, wanted, rtol=ulps * unit, atol=ulps * unit * 1e-2)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("operand_dtype", [torch.int8, E4M3])
def test_quantize_kernel_equals_definition(run: Runner, operand_dtype: torch.dtype, features: int) -> None:
    """Without a prologue the arithmetic is the same operation for operation: bits must agree."""
    x = made(TOKENS, features)
    found, wanted = run(kernels.quantize, x, operand_dtype), kernels.quantize(x, operand_dtype)
    assert found.scale is not None and wanted.scale is not None
    assert torch.equal(found.scale, wanted.scale)
    assert torch.equal(found.values.view(torch.int8), wanted.values.view(torch.int8))
    feature_scale = torch.tensor([2.0**-6, 2.0**-5]).repeat(features // 2)
    found = run(kernels.quantize, x, operand_dtype, feature_scale=feature_scale)
    wanted = kernels.quantize(x, operand_dtype, feature_scale=feature_scale)
    assert torch.equal(found.values.view(torch.int8), wanted.values.view(torch.int8))


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("operand_dtype", CODES)
def test_norm_kernels_equal_definition(run: Runner, operand_dtype: torch.dtype | None, features: int) -> None:
    """Sums over features in another order: r differs by some ulps, and with it codes at a border."""
    x, weight = made(TOKENS, features), (torch.rand(features) + 0.5).bfloat16()
    found, found_r = run(kernels.rms_norm_quantize, x, weight, EPS, operand_dtype)
    wanted, wanted_r = kernels.rms_norm_quantize(x, weight, EPS, operand_dtype)
    torch.testing.assert_close(found_r, wanted_r, rtol=2.0**-20, atol=0)
    equal_or_close(found.values, wanted.values, 2)
    dh = made(TOKENS, features).flip(0).contiguous()
    found_dx, found_dw = run(kernels.rms_norm_backward, dh, x, weight, found_r)
    wanted_dx, wanted_dw = kernels.rms_norm_backward(dh, x, weight, wanted_r)
    equal_or_close(found_dx, wanted_dx, 2)
    torch.testing.assert_close(found_dw, wanted_dw, rtol=2.0**-16, atol=2.0**-16)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("operand_dtype", CODES)
@pytest.mark.parametrize("as_codes", [True, False])
def test_swiglu_kernels_equal_definition(
    run: Runner, operand_dtype: torch.dtype | None, features: int, as_codes: bool
) -> None:
    """exp differs by an ulp between devices."""
    gate_up, dh = made(TOKENS, 2 * features), made(TOKENS, features)
    found, wanted = (
        run(kernels.swiglu_quantize, gate_up, operand_dtype),
        kernels.swiglu_quantize(gate_up, operand_dtype),
    )
    equal_or_close(found.values, wanted.values, 2)
    torch.testing.assert_close(run(kernels.swiglu_scale, gate_up, E4M3), kernels.swiglu_scale(gate_up, E4M3))
    assert torch.equal(run(kernels.operand_scale, gate_up, E4M3), kernels.operand_scale(gate_up, E4M3))
    row_scale = torch.tensor([2.0**-6, 2.0**-5]).repeat_interleave(features) if as_codes else None
    gradient, h = run(kernels.swiglu_backward, dh, gate_up, found.scale, operand_dtype, row_scale)
    wanted_gradient, wanted_h = kernels.swiglu_backward(dh, gate_up, wanted.scale, operand_dtype, row_scale)
    equal_or_close(gradient.values, wanted_gradient.values, 4)
    equal_or_close(h.values, wanted_h.values, 2)
    assert torch.equal(h.values.view(torch.uint8), found.values.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bfloat16, E4M3])
def test_scaled_kernel_equals_definition(run: Runner, dtype: torch.dtype) -> None:
    x = (made(9, 1000, torch.float32) * 20).to(dtype)
    token, feature = torch.rand(9, 1), torch.rand(1000)
    for scales in ((token, feature), (token, None), (None, feature)):
        found = run(kernels.scaled, x, *scales, torch.bfloat16)
        assert torch.equal(found, kernels.scaled(x, *scales, torch.bfloat16))
