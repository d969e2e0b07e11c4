"""8-bit blocks: values of the format are exact, others right on average, at every magnitude and in every layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dqt_dist.config import STATE_BLOCK
from dqt_dist.lowbit.block_float import (
    decode_signed,
    decode_unsigned,
    encode_signed,
    encode_unsigned,
    noise_of,
)

# (encode, decode, codes of the largest of a block, sign bit, exponent fields of blocks)
SIGNED = (encode_signed, decode_signed, (0x70, 0x77), 0x80, (8, 246))
UNSIGNED = (encode_unsigned, decode_unsigned, (240, 247), 0, (30, 253))
FORMATS = pytest.mark.parametrize("form", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])


def noise(rows: int, columns: int) -> Tensor:
    return noise_of(torch.randint(0, 2**32, (rows, columns)))


@FORMATS
def test_every_code_at_every_exponent_is_kept_whatever_the_noise(form: tuple) -> None:
    """All codes that can occur beside the largest. Control: a bit below the three kept bits is lost for some noise."""
    encode, decode, (low, high), sign, (first, last) = form
    exponents = torch.arange(first, last + 1, dtype=torch.uint8)[:, None].expand(-1, 8)
    codes = torch.randint(0, high + 1, (len(exponents), 8, STATE_BLOCK)) | sign * torch.randint(
        0, 2, (1, 8, STATE_BLOCK)
    )
    codes[..., 5] = torch.randint(low, high + 1, codes.shape[:-1])
    codes = codes.to(torch.uint8).flatten(1)
    values = decode(codes, exponents)
    assert values.isfinite().all()
    found, found_exponents = encode(values, noise(*values.shape))
    assert torch.equal(found, codes) and torch.equal(found_exponents, exponents)
    between = values * (1 + 2.0**-5)
    found, _ = encode(between, noise(*values.shape))
    assert not torch.equal(decode(found, exponents), between)


@FORMATS
def test_the_mean_over_all_noise_is_the_value(form: tuple) -> None:
    """With 4096 evenly spaced values of noise the mean is within 1/4096 of a step, and only the two neighbours occur.

    Control: without noise (half a step everywhere) the mean is off by up to half a step.
    """
    encode, decode, _, sign, _ = form
    # The signed format's normal numbers: down to 2^-13 of the maximum.
    x = (0.5 + torch.rand(16, STATE_BLOCK) / 2) * 2.0 ** torch.randint(-12, 1, (16, STATE_BLOCK))
    x[:, 0] = 1.0
    if sign:
        x *= torch.randn(x.shape).sign()
    every = noise_of(torch.arange(128, 2**20, 256) | 0xFFF00000)[:, None, None].expand(-1, *x.shape)
    decoded = torch.stack([decode(*encode(x, n)) for n in every]).double()
    step = 2.0 ** (x.abs().log2().floor() - 3)
    assert ((decoded - x).abs() < step).all() and (decoded[0] != decoded[-1]).any()
    assert ((decoded.mean(0) - x).abs() <= step / 4096).all()
    nearest = decode(*encode(x, torch.full_like(every[0], 1 << 19)))
    assert ((nearest - x).abs() > step / 4).any()


@FORMATS
def test_a_small_change_is_not_lost_over_many_steps(form: tuple) -> None:
    """A value that falls by 1 % per step is at 0.366 after 100 steps. Control: rounding to nearest never changes it."""
    encode, decode, *_ = form
    x, stuck = torch.ones(64, 256), torch.ones(64, 256)
    for _ in range(100):
        x = decode(*encode(x * 0.99, noise(64, 256)))
        stuck = decode(*encode(stuck * 0.99, torch.full((64, 256), 1 << 19, dtype=torch.int32)))
    # Each rounding adds a variance of at most (1/16)^2 / 4 of the square. That gives 0.3 in all, and 0.005 over 16,384
    # elements. The tolerance is about five times that.
    assert float(x.mean()) == pytest.approx(0.366, abs=0.02)
    assert (stuck == 1).all()


@FORMATS
def test_blocks_of_any_magnitude_have_a_place(form: tuple) -> None:
    """From denormals to 2^119, zeros among them: finite, of the same sign, and the largest within one step of 1/8."""
    encode, decode, _, sign, _ = form
    magnitudes = 2.0 ** torch.arange(-149, 120, dtype=torch.float64)
    x = (torch.rand(len(magnitudes), STATE_BLOCK, dtype=torch.float64) * magnitudes[:, None]).float()
    x[7] = 0.0
    if sign:
        x *= torch.randn(x.shape).sign()
    codes, exponents = encode(x, noise(*x.shape))
    decoded = decode(codes, exponents)
    assert decoded.isfinite().all() and (decoded * x >= 0).all()
    assert int(exponents[7]) == 0 and not decoded[7].any()
    ordinary = magnitudes > 2.0**-96  # below, the formats lose their last bits: see their docstring
    largest = x.abs().amax(1)
    error = (decoded.abs().amax(1) - largest).abs()
    assert (error[ordinary] <= largest[ordinary] / 8).all()


def test_a_second_moment_is_never_lost() -> None:
    """Beside an element of 1 the smallest code stands for 2^-30. A first moment may become 0."""
    x = torch.full((1, STATE_BLOCK), 1e-30)
    x[0, 3] = 1.0
    assert float(decode_unsigned(*encode_unsigned(x, noise(*x.shape))).min()) == 2.0**-30
    assert float(decode_signed(*encode_signed(x, noise(*x.shape))).min()) == 0.0


@FORMATS
def test_blocks_of_a_shard_are_those_of_the_whole(form: tuple) -> None:
    """Any rows, and columns from a multiple of 32 on. Control: blocks from column 16 on have other maxima."""
    encode, *_ = form
    x, n = torch.rand(6, 256) ** 8, noise(6, 256)
    codes, exponents = encode(x, n)
    part, part_exponents = encode(x[2:5, 64:192].contiguous(), n[2:5, 64:192].contiguous())
    assert torch.equal(part, codes[2:5, 64:192]) and torch.equal(part_exponents, exponents[2:5, 2:6])
    shifted, _ = encode(x[:, 16:240].contiguous(), n[:, 16:240].contiguous())
    assert not torch.equal(shifted, codes[:, 16:240])


def test_an_average_of_squares_stays_right() -> None:
    """v of 16,384 weights after 200 steps at beta2 = 0.95, against fp32 from the same gradients: equal on average.

    Control: with a stored, rounded root v is 2 % too large.
    """
    beta2 = 0.95
    exact, v, root = (torch.ones(64, 256) for _ in range(3))
    for _ in range(200):
        new = (1 - beta2) * torch.randn(64, 256).square()
        exact = beta2 * exact + new
        v = decode_unsigned(*encode_unsigned(beta2 * v + new, noise(64, 256)))
        root = decode_unsigned(*encode_unsigned((beta2 * root.square() + new).sqrt(), noise(64, 256)))
    assert float((v - exact).std()) < 0.2
    standard_error = float((v - exact).std()) / 128
    assert abs(float((v - exact).mean())) < 5 * standard_error
    assert float((root.square() - exact).mean()) > 0.01
