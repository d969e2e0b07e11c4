"""Codes of latents, scales refitted from latents, and the update that moves latents."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.latent import codes_of_latents, codes_per_latent, latents_of_codes, refit_scale, scale_multiple
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.packing import pack, unpack
from dqt_dist.lowbit.update import LATENT_COUNTS, RoundingKey, update_rows_reference

TERNARY = make_grid("ternary")


def ratio_of(scale: float, latent_scale: float, threshold: int | None = None) -> Tensor:
    return codes_per_latent(torch.tensor([scale]), torch.tensor([latent_scale]), threshold)


def all_latents(bits: int) -> Tensor:
    grid = make_grid(bits)
    return torch.arange(grid.qmin, grid.qmax + 1)[None]


# ---- the map ----


@pytest.mark.parametrize(("scale", "latent_scale", "threshold"), [(2**-6, 2**-10, 8), (1.0, 0.6, 1), (1.0, 0.3, 2)])
def test_a_ternary_code_is_the_sign_from_half_a_code_on(scale: float, latent_scale: float, threshold: int) -> None:
    latents = all_latents(8)
    codes = codes_of_latents(latents, ratio_of(scale, latent_scale), TERNARY)
    assert torch.equal(codes, (latents.sign() * (latents.abs() >= threshold)).to(torch.int8))


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
def test_a_given_threshold_holds_whatever_the_scales(bits: int) -> None:
    latents = all_latents(bits)
    for threshold in range(1, 2 ** (bits - 1)):
        codes = codes_of_latents(latents, ratio_of(0.37, 0.011, threshold), TERNARY)
        assert torch.equal(codes != 0, latents.abs() >= threshold)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("latent_scale", [0.11, 0.25, 1 / 3])
def test_codes_of_n_bits_are_nearest(bits, latent_scale: float) -> None:
    """Nearest to the weight of the latent, up to the rounding of r to 8 bits. Ends of the grid are clamped."""
    grid, latents = make_grid(bits), all_latents(8)
    codes = codes_of_latents(latents, ratio_of(1.0, latent_scale), grid)
    weights = (latents * latent_scale).clamp(grid.qmin, grid.qmax)
    assert float((codes - weights).abs().max()) <= 0.5 + 128 * latent_scale * 2.0**-7


@pytest.mark.parametrize("latent_scale", [0.011, 0.06, 0.25, 1.0])
def test_the_product_that_decides_is_exact(latent_scale: float) -> None:
    """So a fused multiply-add, an fp64 product and an fp32 product give the same code."""
    ratio = ratio_of(1.0, latent_scale)
    latents = all_latents(8)
    assert torch.equal((latents.float() * ratio).double(), latents.double() * ratio.double())


@pytest.mark.parametrize(("bits", "latent_bits"), [("ternary", 3), ("ternary", 8), (2, 6), (4, 8)])
def test_a_code_has_a_latent_that_gives_it_back(bits, latent_bits: int) -> None:
    grid, latent_grid = make_grid(bits), make_grid(latent_bits)
    codes = torch.arange(grid.qmin, grid.qmax + 1)[None]
    ratio = ratio_of(1.0, -grid.qmin / -latent_grid.qmin)
    latents = latents_of_codes(codes, ratio, latent_grid)
    assert torch.equal(codes_of_latents(latents, ratio, grid), codes.to(torch.int8))


# ---- the scale ----


def test_a_refit_is_the_mean_magnitude() -> None:
    """BitNet's rule to the 8 bits of bf16; from the sum and the number of weights only. Zeros keep the old scale."""
    latents = torch.randint(-128, 128, (3, 64, 96))
    latents[1] = 0
    sums, counts = latents.abs().sum((1, 2)), torch.tensor([64 * 96] * 3)
    latent_scale, scale = torch.tensor([0.01, 0.02, 0.003]), torch.tensor([1.0, 2.0, 3.0])
    fitted = refit_scale(sums, counts, latent_scale, scale, scale_multiple(TERNARY, 3.0))
    wanted = (latents.abs().double().mean((1, 2)) * latent_scale.double()).tolist()
    assert fitted.tolist() == [pytest.approx(wanted[0], rel=2**-8), 2.0, pytest.approx(wanted[2], rel=2**-8)]
    assert torch.equal(fitted, fitted.bfloat16().float())


def test_the_multiple_of_n_bits_is_the_sigma_rule_of_a_normal_distribution() -> None:
    weights = torch.randn(1 << 20, dtype=torch.float64)
    grid = make_grid(4)
    wanted = 3.0 * float(weights.std()) / grid.qmax
    assert scale_multiple(grid, 3.0) * float(weights.abs().mean()) == pytest.approx(wanted, rel=0.01)


# ---- the update ----


def matrix(latent_bits: int, rows: int, columns: int, latent_scale: float) -> LowBitMatrix:
    weight = LowBitMatrix(rows, columns, TERNARY, latent_grid=make_grid(latent_bits))
    weight.assign(ShardLayout((LogicalMatrix("m", rows, columns),), (RowBlock(0, 0, rows),), columns))
    weight.scale.fill_(0.5)
    weight.latent_scale.fill_(latent_scale)
    weight.set_codes(torch.zeros(rows, columns, dtype=torch.int8))
    return weight


def test_what_does_not_suffice_for_a_flip_is_remembered() -> None:
    """Steps of a sixteenth of a code: after 8 steps codes are at the threshold, after 16 steps latents are one code
    away. Rounding is exact here because each step is one latent. The control is a matrix without latents, whose codes
    stay at 0 when rounded to nearest."""
    weight = matrix(8, 4, 8, 0.5 / 16)
    assert weight.latent_grid is not None
    latents = pack(torch.zeros(4, 8, dtype=torch.int8), weight.latent_grid)
    plain = LowBitMatrix(4, 8, TERNARY)
    plain.assign(weight.layout)  # type: ignore[arg-type]
    plain.set_codes(torch.zeros(4, 8, dtype=torch.int8))
    plain.scale.fill_(0.5)
    down = torch.full((4, 8), -1.0)
    for step in range(1, 17):
        key = RoundingKey(1, step, "nearest")
        counts = update_rows_reference(weight, down, 0, 0.5 / 16, 0.0, key, latents=latents)
        update_rows_reference(plain, down, 0, 0.5 / 16, 0.0, key)
        assert bool((weight.unpack() == (step >= 8)).all())
        totals = dict(zip(LATENT_COUNTS, counts.sum((0, 1)).tolist(), strict=True))
        assert totals == {
            "flips": 32 * (step == 8),
            "zeros": 32 * (step < 8),
            "clamped": 0,
            "latent_flips": 32,
            "latent_abs_sum": 32 * step,
        }
    assert not plain.unpack().any()


def test_latents_end_at_their_grid_and_count_as_clamped() -> None:
    weight = matrix(8, 1, 4, 1.0)
    assert weight.latent_grid is not None
    latents = pack(torch.tensor([[127, -128, 0, 5]]), weight.latent_grid)
    direction = torch.tensor([[-1.0, 1.0, math.nan, 0.0]])
    counts = update_rows_reference(weight, direction, 0, 1.0, 0.0, RoundingKey(1, 1, "stochastic"), latents=latents)
    assert unpack(latents, weight.latent_grid, 4).tolist() == [[127, -128, 0, 5]]
    assert counts.flatten().tolist()[2:] == [2, 0, 127 + 128 + 5]


def test_a_decay_shrinks_latents_on_average() -> None:
    weight = matrix(8, 64, 64, 1.0)
    assert weight.latent_grid is not None
    latents = pack(torch.full((64, 64), 100), weight.latent_grid)
    key = RoundingKey(1, 1, "stochastic")
    update_rows_reference(weight, torch.zeros(64, 64), 0, 0.5, 0.01, key, latents=latents)
    mean = float(unpack(latents, weight.latent_grid, 64).float().mean())
    assert mean == pytest.approx(99.5, abs=5 * 0.5 / 64)
