"""Activations in 8 bits: one scale per token, at most half a step of error, and zero stays zero."""

from __future__ import annotations

import torch

from dqt_dist.lowbit.activation import ABSMAX_FLOOR, ACTIVATION_QMAX, quantize_tokens, token_absmax


def test_codes_and_scales_equal_a_direct_formula() -> None:
    """In float64, token by token. The scale is the fp32 quotient. No element here lies on a rounding border."""
    x = torch.randn(3, 5, 17) * torch.logspace(-3, 3, 15).view(3, 5, 1)
    codes, scale = quantize_tokens(x, token_absmax(x))
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (3, 5, 1))
    for token, token_codes, token_scale in zip(x.view(-1, 17), codes.view(-1, 17), scale.view(-1), strict=True):
        assert float(token_scale) == float(token.abs().max() / ACTIVATION_QMAX)
        expected = (token.double() / token_scale.double()).round()
        assert torch.equal(token_codes.double(), expected)


def test_error_is_at_most_half_a_step() -> None:
    """The bound includes the roundings of division and product, 2^-24 each of a value of up to 127 steps."""
    x = torch.randn(64, 33)
    codes, scale = quantize_tokens(x, token_absmax(x))
    error = (x.double() - codes.double() * scale.double()).abs()
    assert bool((error <= scale * (0.5 + 127 * 2.0**-23)).all())


def test_the_largest_of_a_token_takes_the_end_of_the_range() -> None:
    x = torch.randn(64, 33)
    codes, _ = quantize_tokens(x, token_absmax(x))
    assert bool((codes.abs().amax(dim=-1) == ACTIVATION_QMAX).all())
    assert int(codes.min()) == -127  # symmetric: -128 is not used


def test_half_rounds_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_tokens(x, token_absmax(x))[0].tolist() == [[127, 0, 2, 2, 0, -2]]


def test_a_token_of_zeros_has_codes_of_zero_and_a_scale() -> None:
    """Control: without the floor the scale is 0 and 0 / 0 is nan."""
    x = torch.zeros(2, 8)
    codes, scale = quantize_tokens(x, token_absmax(x))
    assert not bool(codes.any())
    assert torch.equal(scale, torch.full((2, 1), ABSMAX_FLOOR) / ACTIVATION_QMAX)


def test_a_maximum_over_a_wider_token_sets_the_scale() -> None:
    """A rank sees a part of the features. With the maximum over all features its codes equal those of one rank."""
    x = torch.randn(7, 24)
    whole, scale = quantize_tokens(x, token_absmax(x))
    left, left_scale = quantize_tokens(x[:, :12], token_absmax(x))
    assert torch.equal(left, whole[:, :12]) and torch.equal(left_scale, scale)
    assert not torch.equal(quantize_tokens(x[:, :12], token_absmax(x[:, :12]))[0], whole[:, :12])


def test_bf16_tokens_are_quantised_in_fp32() -> None:
    x = torch.randn(7, 24).bfloat16()
    codes, scale = quantize_tokens(x, token_absmax(x))
    wide_codes, wide_scale = quantize_tokens(x.float(), token_absmax(x.float()))
    assert torch.equal(codes, wide_codes) and torch.equal(scale, wide_scale)
