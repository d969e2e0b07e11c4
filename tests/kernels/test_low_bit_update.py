"""The Triton kernels of the rounding update, alone and with AdamW, against their definitions, on a CUDA device."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from dqt_dist.config import STATE_BLOCK
from dqt_dist.kernels.low_bit_update import AdamW, update_rows
from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout
from dqt_dist.lowbit.grid import make_grid
from dqt_dist.lowbit.latent import codes_of_latents
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.packing import pack, unpack
from dqt_dist.lowbit.update import RoundingKey, update_rows_reference
from dqt_dist.optim.adamw import (
    Moments,
    adamw_update_rows,
    adamw_update_rows_reference,
    new_moments,
)
from tests.kernels.runners import INTERPRETED, Runner

ALL_BITS = ["ternary", 2, 3, 4, 5, 6, 8]
# Columns: less than the kernel's block of 256, whole blocks, blocks and a rest; one part of a row and several. All are
# whole Philox groups.
COLUMNS = [4, 100, 1024, 1028, 2500]
# Rows of the three blocks of a shard; at least 5 in all.
BLOCK_ROWS = (6, 5, 6)
# Columns of a row that is divided over two programs or more.
DIVIDED = 2500
# Steps of AdamW. From the second step on the moments are not zero.
STEPS = 3
if INTERPRETED:
    ALL_BITS, COLUMNS, BLOCK_ROWS = ["ternary", 3, 6, 8], [100, 256, 260], (2, 2, 1)
    DIVIDED, STEPS = 1060, 2


# Whole blocks, blocks and a rest.
UNCOUNTED_COLUMNS = [256, 260]

# (bits of the codes, bits of the latents): fields of every size, ternary codes and others.
LATENT_BITS = [("ternary", 4), ("ternary", 6), ("ternary", 8), (2, 3), (4, 5)]
if INTERPRETED:
    LATENT_BITS = [("ternary", 4), ("ternary", 6), (3, 8)]


def fused_pair(
    bits, columns: int, device: str, column_offset: int = 0, latent_bits=None
) -> tuple[LowBitMatrix, LowBitMatrix]:
    """Two equal shards that interleave two logical matrices, as qkv does, with random codes."""
    in_features = columns + column_offset + 8
    matrices = (LogicalMatrix("a", 64, in_features), LogicalMatrix("b", 32, in_features))
    first, second, third = BLOCK_ROWS
    blocks = (RowBlock(0, 8, first), RowBlock(1, 3, second), RowBlock(0, 14, third))
    layout = ShardLayout(matrices, blocks, columns, column_offset)
    grid = make_grid(bits)
    pair = []
    codes = torch.randint(grid.qmin, grid.qmax + 1, (layout.rows, columns), device=device)
    for _ in range(2):
        latent_grid = None if latent_bits is None else make_grid(latent_bits)
        weight = LowBitMatrix(layout.rows, columns, grid, torch.device(device), latent_grid)
        weight.assign(layout)
        weight.scale.copy_(torch.tensor([2.0**-6, 2.0**-5]))
        if latent_grid is not None:
            weight.latent_scale.copy_(torch.tensor([2.0**-7, 2.0**-5 / 3]))
        weight.set_codes(codes)
        pair.append(weight)
    return pair[0], pair[1]


@pytest.mark.parametrize("mode", ["stochastic", "nearest"])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_kernel_equals_definition_where_arithmetic_is_exact(run: Runner, bits, columns: int, mode) -> None:
    """Directions are multiples of 2^-10 and rate / scale a power of two, so t has no rounding error: bits must agree.

    Negative control: another seed gives other codes (asserted below for the stochastic mode).
    """
    device = run.device
    ours, reference = fused_pair(bits, columns, device, column_offset=12)
    direction = torch.randint(-2048, 2049, (ours.rows, columns), device=device).float() / 1024
    key = RoundingKey(seed=2**31 + 7, step=1, mode=mode)
    counts = run(update_rows, ours, direction, 0, 2.0**-6, 0.0, key)
    expected = update_rows_reference(reference, direction, 0, 2.0**-6, 0.0, key)
    assert torch.equal(ours.codes, reference.codes)
    assert torch.equal(counts.sum(dim=1), expected.sum(dim=1).cpu())
    if mode == "stochastic" and columns >= 100:
        other, _ = fused_pair(bits, columns, device, column_offset=12)
        other.codes.copy_(reference.codes)
        run(update_rows, other, direction, 0, 2.0**-6, 0.0, RoundingKey(7, 1, mode))
        run(update_rows, ours, direction, 0, 2.0**-6, 0.0, key)
        assert not torch.equal(other.codes, ours.codes)


def random_latents(weight: LowBitMatrix) -> Tensor:
    """Packed latents of all rows."""
    grid = weight.latent_grid
    assert grid is not None
    latents = torch.randint(grid.qmin, grid.qmax + 1, (weight.rows, weight.columns), device=weight.codes.device)
    return pack(latents, grid)


@pytest.mark.parametrize("kernel", ["direction", "adamw"])
@pytest.mark.parametrize("columns", UNCOUNTED_COLUMNS)
@pytest.mark.parametrize(("bits", "latent_bits"), [*LATENT_BITS, ("ternary", None), (8, None)])
def test_an_update_that_is_not_counted_has_the_same_bits(
    run: Runner, bits, latent_bits: int | None, columns: int, kernel: str
) -> None:
    """Only its counts are 0, but for the sums of |L|, which refits read."""
    given = torch.randn(sum(BLOCK_ROWS), columns, device=run.device)
    first, second = fused_pair(bits, columns, run.device, latent_bits=latent_bits)
    latents = None if latent_bits is None else random_latents(first)
    found = []
    for weight, counted in ((first, True), (second, False)):
        state = {} if latents is None else {"latent": latents.clone()}
        key = RoundingKey(3, 1, "stochastic")
        if kernel == "direction":
            update = partial(update_rows, latents=state.get("latent"), counted=counted)
            counts = run(update, weight, given, 0, 2e-2, 0.1, key)
        else:
            state |= new_moments(*given.shape, 32, torch.device(run.device))
            clip = torch.tensor(0.5, device=run.device)
            update = partial(adamw_update_rows, counted=counted)
            counts = run(update, weight, given, state, 0, clip, 2e-2, LIKE_PAPER, key)
        found.append((weight.codes, state, counts))
    (codes, state, counts), (other_codes, other_state, other_counts) = found
    assert torch.equal(codes, other_codes) and int(counts[..., 0].sum()) > 0
    assert all(torch.equal(tensor, other_state[name]) for name, tensor in state.items())
    assert not other_counts[..., :4].any() and torch.equal(counts[..., 4:], other_counts[..., 4:])


@pytest.mark.parametrize("mode", ["stochastic", "nearest"])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("bits", "latent_bits"), LATENT_BITS)
def test_kernel_equals_definition_with_latents(run: Runner, bits, latent_bits: int, columns: int, mode) -> None:
    """Latents, codes and all counts, where arithmetic is exact: matrix a, whose latent scale is a power of two.

    Codes of matrix b follow from its latents by another ratio. Its latents may differ by contraction.
    """
    ours, reference = fused_pair(bits, columns, run.device, column_offset=12, latent_bits=latent_bits)
    first = random_latents(ours)
    before, second = first.clone(), first.clone()
    direction = torch.randint(-2048, 2049, (ours.rows, columns), device=run.device).float() / 1024
    key = RoundingKey(seed=2**31 + 7, step=1, mode=mode)
    counts = run(partial(update_rows, latents=first), ours, direction, 0, 2.0**-6, 0.0, key)
    expected = update_rows_reference(reference, direction, 0, 2.0**-6, 0.0, key, latents=second)
    exact = ours.row_matrix == 0
    assert torch.equal(first[exact], second[exact]) and not torch.equal(first, before)
    assert torch.equal(ours.codes[exact], reference.codes[exact])
    assert torch.equal(counts.sum(dim=1)[exact.cpu()], expected.sum(dim=1)[exact].cpu())
    assert ours.latent_grid is not None
    latents = unpack(first, ours.latent_grid, columns)
    assert torch.equal(ours.unpack(), codes_of_latents(latents, ours.row_codes_per_latent(), ours.grid))
    assert torch.equal(counts[..., 4].sum(1), latents.int().abs().sum(1).cpu())


@pytest.mark.parametrize("bits", ["ternary", 4, 6, 8])
def test_kernel_differs_by_contraction_only(run: Runner, bits) -> None:
    """Any direction, rate and decay.

    t may differ by 2^-16, an ulp of a number below 2^8. So about one draw in 2^16 or fewer has another outcome. The
    bound is four times this rate.
    """
    device = run.device
    ours, reference = fused_pair(bits, DIVIDED, device)
    torch.manual_seed(1)
    direction = torch.randn(ours.rows, DIVIDED, device=device)
    key = RoundingKey(3, 16, "stochastic")
    run(update_rows, ours, direction, 0, 1.7e-3, 0.1, key)
    update_rows_reference(reference, direction, 0, 1.7e-3, 0.1, key)
    differing = (ours.unpack() != reference.unpack()).double().mean()
    assert differing <= 4 * 2.0**-16


def test_rows_in_parts_equal_rows_at_once(run: Runner) -> None:
    device = run.device
    whole, parts = fused_pair("ternary", 1028, device)
    direction = torch.randn(whole.rows, 1028, device=device)
    key = RoundingKey(3, 2, "stochastic")
    run(update_rows, whole, direction, 0, 1e-2, 0.0, key)
    cut = BLOCK_ROWS[0] + 1  # inside a block
    for start, stop in ((0, cut), (cut, whole.rows)):
        run(update_rows, parts, direction[start:stop].contiguous(), start, 1e-2, 0.0, key)
    assert torch.equal(whole.codes, parts.codes)


def test_not_finite_direction_keeps_the_codes(run: Runner) -> None:
    device = run.device
    ours, reference = fused_pair("ternary", 1024, device)
    direction = torch.full((ours.rows, 1024), float("nan"), device=device)
    direction[:, ::2] = float("inf")
    counts = run(update_rows, ours, direction, 0, 1e-2, 0.0, RoundingKey(3, 2, "stochastic"))
    assert torch.equal(ours.codes, reference.codes)
    assert int(counts[..., 0].sum()) == 0


# ---- with AdamW ----

# (columns, bits of the moments): whole blocks of the kernel and rests. Columns are multiples of 4 with 32
# bits, of 32 with 8.
SHAPES = [(4, 32), (100, 32), (2500, 32), (32, 8), (288, 8), (1024, 8), (2528, 8)]
if INTERPRETED:
    SHAPES = [(100, 32), (288, 8)]
# The other grids differ in packing only, which the update by a direction shares.
ADAMW_BITS = ["ternary"] if INTERPRETED else ["ternary", 4, 6, 8]
LIKE_PAPER = AdamW(beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
HALF = 0.5  # a clip factor


def stepped(
    run: Runner,
    bits,
    columns: int,
    state_bits: int,
    gradients: list[Tensor],
    adamw: AdamW,
    rate: float,
    mode="stochastic",
    factor: float | None = HALF,
    latent_bits: int | None = None,
) -> list[tuple[LowBitMatrix, Moments, Tensor]]:
    """Codes, moments and last counts of the kernel and of its definition, from the same start and gradients."""
    device = run.device
    results = []
    clip = None if factor is None else torch.tensor(factor, device=device)
    pair = fused_pair(bits, columns, device, 32, latent_bits)
    latents = None if latent_bits is None else random_latents(pair[0])
    for weight, update in zip(pair, (partial(run, adamw_update_rows), adamw_update_rows_reference), strict=True):
        moments = new_moments(weight.rows, columns, state_bits, torch.device(device))
        if latents is not None:
            moments["latent"] = latents.clone()
        for step, gradient in enumerate(gradients, start=1):
            key = RoundingKey(2**31 + 7, step, mode)
            counts = update(weight, gradient, moments, 0, clip, rate, adamw, key)
        results.append((weight, moments, counts.cpu()))
    return results


def fraction(a: Tensor, b: Tensor) -> float:
    """Share of elements that differ."""
    return float((a != b).double().mean())


def assert_moments_follow(moments: dict[str, Tensor], wanted: dict[str, Tensor], few: float) -> None:
    """Moments of the kernel against the definition's; at most a share `few` of the 8-bit codes differs."""
    for name, moment in moments.items():
        scale = f"{name}_scale"
        if name.endswith("_scale"):
            # A block whose maximum lies an ulp from a power of two may take another exponent, and then other codes.
            assert (moment != wanted[name]).sum() <= 2 + few * moment.numel(), name
        elif scale in moments:
            alike = (moments[scale] == wanted[scale]).repeat_interleave(STATE_BLOCK, dim=1)
            assert fraction(moment[alike], wanted[name][alike]) <= few, name
        else:
            # Five roundings of 2^-24 of the two numbers that are added. The two may cancel, so the bound is relative to
            # the largest moment of the column: numbers of a column are of one magnitude.
            bound = 2.0**-20 * wanted[name].abs().amax(dim=0)
            assert ((moment - wanted[name]).abs() <= bound).all(), name


@pytest.mark.parametrize("mode", ["stochastic", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "state_bits"), SHAPES)
@pytest.mark.parametrize("factor", [HALF, None])
@pytest.mark.parametrize("bits", ADAMW_BITS)
def test_adamw_kernel_follows_its_definition(
    run: Runner, bits, columns: int, state_bits: int, dtype: torch.dtype, mode, factor: float | None
) -> None:
    """Some steps of any gradient. Some elements are zero and, without a clip factor, some are not finite.

    The kernel contracts moments to fused multiply-adds, and its roots and reciprocals are approximate to 2^-21. So at
    most a few draws in 2^16 have another outcome.
    """
    device = run.device
    sizes = torch.logspace(-6, 1, columns, device=device)
    gradients = [torch.randn(sum(BLOCK_ROWS), columns, device=device) * sizes for _ in range(STEPS)]
    for gradient in gradients:
        gradient[2, : columns // 2] = 0.0
        if factor is None:
            gradient[3, 1], gradient[4, 2] = float("nan"), float("inf")
    gradients = [gradient.to(dtype) for gradient in gradients]
    (ours, moments, counts), (reference, wanted, wanted_counts) = stepped(
        run, bits, columns, state_bits, gradients, LIKE_PAPER, 3e-3, mode, factor
    )
    few = 2.0**-12 + 2 / ours.numel
    assert fraction(ours.unpack(), reference.unpack()) <= few
    assert_moments_follow(moments, wanted, few)
    # Where the definition hits the end of the grid exactly, the kernel may be an ulp beyond it and count
    # a clamped weight.
    assert ((counts.sum(1) - wanted_counts.sum(1)).abs().sum(0) <= 2 + few * ours.numel).all()
    assert int(counts[..., 1].sum()) == int((ours.unpack() == 0).sum())
    start, _ = fused_pair(bits, columns, device, column_offset=32)
    assert fraction(ours.unpack(), start.unpack()) > 0 or mode == "nearest"


@pytest.mark.parametrize(("bits", "latent_bits"), LATENT_BITS)
@pytest.mark.parametrize(("columns", "state_bits"), SHAPES)
def test_adamw_kernel_with_latents_follows_its_definition(
    run: Runner, bits, latent_bits: int, columns: int, state_bits: int
) -> None:
    """As above; codes and counts follow exactly from the kernel's own latents."""
    gradients = [torch.randn(sum(BLOCK_ROWS), columns, device=run.device) for _ in range(STEPS)]
    (ours, moments, counts), (_, wanted, wanted_counts) = stepped(
        run, bits, columns, state_bits, gradients, LIKE_PAPER, 3e-2, latent_bits=latent_bits
    )
    assert ours.latent_grid is not None
    found, expected = (unpack(m["latent"], ours.latent_grid, columns) for m in (moments, wanted))
    few = 2.0**-12 + 2 / ours.numel
    assert fraction(found, expected) <= few
    assert torch.equal(ours.unpack(), codes_of_latents(found, ours.row_codes_per_latent(), ours.grid))
    totals = counts.sum(1).sum(0)
    assert int(totals[1]) == int((ours.unpack() == 0).sum()) and int(totals[4]) == int(found.int().abs().sum())
    assert ((totals - wanted_counts.sum(1).sum(0)).abs() <= 2 + few * ours.numel * 2**latent_bits).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "state_bits"), SHAPES)
def test_adamw_kernel_with_a_factored_second_moment_follows_its_definition(
    run: Runner, columns: int, state_bits: int, dtype: torch.dtype
) -> None:
    """Row factors and column means are given and stay as they are. Codes and the first moment as above."""
    device = run.device
    weight, reference = fused_pair("ternary", columns, device)
    few = 2.0**-12 + 2 / weight.numel
    means = {
        "row_factor": torch.rand(weight.rows, device=device) * 4,
        "column_mean": torch.rand(len(weight.scale), columns, device=device) * 4,
    }
    results = []
    for each, update in ((weight, partial(run, adamw_update_rows)), (reference, adamw_update_rows_reference)):
        moments = new_moments(each.rows, columns, state_bits, torch.device(device), second=False)
        moments |= {name: tensor.clone() for name, tensor in means.items()}
        generator = torch.Generator(device).manual_seed(3)
        for step in range(1, STEPS + 1):
            gradient = torch.randn(each.rows, columns, device=device, generator=generator).to(dtype)
            clip, key = torch.tensor(HALF, device=device), RoundingKey(7, step, "stochastic")
            update(each, gradient, moments, 0, clip, 3e-3, LIKE_PAPER, key)
        results.append(moments)
    assert fraction(weight.unpack(), reference.unpack()) <= few
    assert fraction(weight.unpack(), fused_pair("ternary", columns, device)[0].unpack()) > 0
    found, wanted = results
    assert set(found) == {"exp_avg", *means, *(["exp_avg_scale"] if state_bits == 8 else [])}
    assert all(torch.equal(found[name], tensor) for name, tensor in means.items())
    assert_moments_follow({name: moment for name, moment in found.items() if name not in means}, wanted, few)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [288] if INTERPRETED else [288, 1024])
def test_adamw_kernel_gives_the_same_8_bit_moments_where_arithmetic_is_exact(
    run: Runner, columns: int, dtype: torch.dtype
) -> None:
    """beta1 = beta2 = 1/2, and gradients that are small integers times powers of two.

    Every sum is exact in fp32, so codes and exponents of both moments are equal. Control: with another
    seed they differ.
    """
    device, rows = run.device, sum(BLOCK_ROWS)
    gradients = [
        torch.randint(-8, 9, (rows, columns), device=device) * 2.0 ** torch.randint(-3, 4, (rows, 1), device=device)
        for _ in range(STEPS)
    ]
    adamw = AdamW(beta1=0.5, beta2=0.5, epsilon=1e-8, weight_decay=0.0)
    (_, moments, _), (_, wanted, _) = stepped(run, "ternary", columns, 8, [g.to(dtype) for g in gradients], adamw, 1e-3)
    assert all(torch.equal(moment, wanted[name]) for name, moment in moments.items())
    again, *_ = fused_pair("ternary", columns, device, column_offset=32)
    other = new_moments(again.rows, columns, 8, torch.device(device))
    for step, gradient in enumerate(gradients, start=1):
        clip = torch.tensor(HALF, device=device)
        key = RoundingKey(8, step, "stochastic")
        run(adamw_update_rows, again, gradient.to(dtype), other, 0, clip, 1e-3, adamw, key)
    assert not torch.equal(other["exp_avg"], moments["exp_avg"])


@pytest.mark.parametrize("state_bits", [8, 32])
def test_adamw_of_rows_in_parts_equals_rows_at_once(run: Runner, state_bits: int) -> None:
    device = run.device
    whole, parts = fused_pair("ternary", 1056, device)
    gradient = torch.randn(whole.rows, 1056, device=device)
    key, clip = RoundingKey(3, 2, "stochastic"), torch.ones((), device=device)
    moments = new_moments(whole.rows, 1056, state_bits, torch.device(device))
    run(adamw_update_rows, whole, gradient, moments, 0, clip, 1e-2, LIKE_PAPER, key)
    cut = BLOCK_ROWS[0] + 1  # inside a block
    for start, stop in ((0, cut), (cut, whole.rows)):
        own = new_moments(stop - start, 1056, state_bits, torch.device(device))
        run(adamw_update_rows, parts, gradient[start:stop], own, start, clip, 1e-2, LIKE_PAPER, key)
        assert all(torch.equal(own[name], moments[name][start:stop]) for name in own)
    assert torch.equal(whole.codes, parts.codes)


@pytest.mark.parametrize("state_bits", [8, 32])
def test_a_clip_of_zero_moves_no_code_on_the_device(run: Runner, state_bits: int) -> None:
    """Not even the first moment moves a code, and the host does not wait. Control: a clip of one moves codes."""
    device, columns = run.device, 256 if INTERPRETED else 1024
    weight, reference = fused_pair("ternary", columns, device)
    moments = new_moments(weight.rows, columns, state_bits, torch.device(device))
    adamw = AdamW(0.9, 0.95, 1e-8, 0.0)
    gradient = torch.randn(weight.rows, columns, device=device)
    nothing, one = torch.zeros((), device=device), torch.ones((), device=device)
    run(adamw_update_rows, weight, gradient, moments, 0, one, 1e-2, adamw, RoundingKey(3, 1, "stochastic"))
    assert not torch.equal(weight.codes, reference.codes)
    moved = weight.codes.clone()
    bad = torch.full_like(gradient, float("nan"))
    with run.without_waiting():
        counts = run.on_device(
            adamw_update_rows, weight, bad, moments, 0, nothing, 1e-2, adamw, RoundingKey(3, 2, "stochastic")
        )
    assert torch.equal(weight.codes, moved) and int(counts[..., 0].sum()) == 0
