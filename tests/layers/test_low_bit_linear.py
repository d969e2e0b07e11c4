"""The low-bit linear against nn.Linear, and against itself under tensor and sequence parallelism.

Each case runs on gloo ranks (`run_linear`). The shards that the ranks return are put together here and compared
with the whole. All cases of one number of ranks go in one call (`run_linears`), because starting the ranks takes
longer than the cases.

There are two kinds of input. Dyadic inputs are small integers over 16, and each token has a maximum of 127 / 16, so its
int8 scale is exactly 1 / 16. Every product and every sum fits in 24 bits, and no order of summation can change a bit:
forward, dgrad and wgrad must be equal at every layout. Ordinary inputs are normal numbers. Here the forward with int8
activations must be equal, because its sums are still integers. Elsewhere a test states a bound and its cause.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqt_dist.config import Bits, Config
from dqt_dist.layers.low_bit_linear import ColumnParallelLowBitLinear, RowParallelLowBitLinear
from dqt_dist.layers.transformer_config import transformer_config
from dqt_dist.lowbit.activation import quantize_tokens, token_absmax
from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout
from dqt_dist.lowbit.grid import make_grid
from tests.distributed import run_distributed
from tests.small import small_config
from tests.tolerances import UNIT_ROUNDOFF, assert_within, product_bound

TOKENS, BATCH, IN, OUT = 8, 3, 48, 40
# Two logical matrices in one shard, as gate|up: an odd scale would be as right, powers of two keep the products exact.
SCALES = (2.0**-6, 2.0**-4)


@dataclass(frozen=True)
class Case:
    """One linear and how it is computed."""

    direction: str
    """column or row."""
    bits: Bits = "ternary"
    activation: str = "int8"
    compute: str = "fp32"
    sequence: bool = False
    dyadic: bool = True
    backwards: int = 1


def config_of(case: Case, world_size: int) -> Config:
    """The shared small configuration, with heads enough for TP 4."""
    quantization = {"bits": case.bits, "activation": case.activation, "compute": case.compute}
    parallel = {"tensor": world_size, "sequence": case.sequence}
    overrides = ["model.num_query_groups=4"]
    for section, values in (("quantization", quantization), ("parallel", parallel)):
        overrides += [f"{section}.{key}={json.dumps(value)}" for key, value in values.items()]
    return small_config(*overrides)


def whole_codes(case: Case) -> Tensor:
    grid = make_grid(case.bits)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(grid.qmin, grid.qmax + 1, (OUT, IN), dtype=torch.int8, generator=generator)


def whole_scale(case: Case) -> Tensor:
    """One scale per row [OUT]. The column direction stacks two matrices, the row direction has one."""
    if case.direction == "row":
        return torch.full((OUT,), SCALES[0])
    return torch.tensor(SCALES).repeat_interleave(OUT // 2)


def whole_input(case: Case) -> tuple[Tensor, Tensor]:
    """x [TOKENS, BATCH, IN] and dy [TOKENS, BATCH, OUT]."""
    generator = torch.Generator().manual_seed(2)
    if not case.dyadic:
        x = torch.randn(TOKENS, BATCH, IN, generator=generator)
        return x, torch.randn(TOKENS, BATCH, OUT, generator=generator)
    x = torch.randint(-127, 128, (TOKENS, BATCH, IN), generator=generator)
    x[..., 5] = 127
    return x / 16, torch.randint(-64, 65, (TOKENS, BATCH, OUT), generator=generator) / 16


def shard_layout(case: Case, rank: int, world_size: int) -> ShardLayout:
    if case.direction == "row":
        matrix = LogicalMatrix("down", OUT, IN)
        return ShardLayout((matrix,), (RowBlock(0, 0, OUT),), IN // world_size, rank * IN // world_size)
    gate, up = LogicalMatrix("gate", OUT // 2, IN), LogicalMatrix("up", OUT // 2, IN)
    share = OUT // 2 // world_size
    return ShardLayout((gate, up), (RowBlock(0, rank * share, share), RowBlock(1, rank * share, share)), IN)


def fused_rows(rank: int, world_size: int) -> Tensor:
    """The whole matrix's row of each row of a column-parallel shard: its part of gate, then its part of up."""
    share = OUT // 2 // world_size
    gate = torch.arange(rank * share, (rank + 1) * share)
    return torch.cat([gate, gate + OUT // 2])


def build_linear(case: Case, rank: int, world_size: int, group: Any) -> nn.Module:
    """The rank's shard of the linear, with its part of the whole codes."""
    megatron_config = transformer_config(config_of(case, world_size), on_cpu=True)
    kind = RowParallelLowBitLinear if case.direction == "row" else ColumnParallelLowBitLinear
    linear = kind(IN, OUT, config=megatron_config, tp_group=group)
    linear.weight.assign(shard_layout(case, rank, world_size))
    codes = whole_codes(case)
    if case.direction == "row":
        linear.weight.scale.fill_(SCALES[0])
        linear.weight.set_codes(codes.chunk(world_size, dim=1)[rank])
    else:
        linear.weight.scale.copy_(torch.tensor(SCALES))
        linear.weight.set_codes(codes[fused_rows(rank, world_size)])
    return linear


def local_part(x: Tensor, split: str, rank: int, world_size: int) -> Tensor:
    """What a rank holds of [tokens, batch, width]: everything, its tokens, its width, or its rows of a fused output."""
    if split == "none":
        return x
    if split == "fused":
        return x[..., fused_rows(rank, world_size)]
    return x.chunk(world_size, dim={"tokens": 0, "width": -1}[split])[rank]


def splits(case: Case) -> tuple[str, str]:
    """How input and output are split over the ranks."""
    replicated = "tokens" if case.sequence else "none"
    return ("width", replicated) if case.direction == "row" else (replicated, "fused")


def run_linear(rank: int, world_size: int, case: Case) -> dict[str, np.ndarray]:
    """Forward and backward of the rank's shard: y, dx, dw, each this rank's part, in fp32."""
    linear = build_linear(case, rank, world_size, dist.group.WORLD)
    input_split, output_split = splits(case)
    dtype = torch.bfloat16 if case.compute == "bf16" else torch.float32
    x, grad = (
        local_part(part, split, rank, world_size).to(dtype)
        for part, split in zip(whole_input(case), (input_split, output_split), strict=True)
    )
    results: dict[str, Tensor] = {}
    for _ in range(case.backwards):
        leaf = x.clone().requires_grad_()
        y, bias = linear(leaf)
        assert bias is None and y.dtype == dtype
        y.backward(grad)
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        results = {"y": y.detach(), "dx": leaf.grad}
    results["dw"] = linear.weight.gradient.local
    return {name: tensor.float().numpy() for name, tensor in results.items()}


def run_linears(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, np.ndarray]]:
    found = []
    for case in cases:
        try:
            found.append(run_linear(rank, world_size, case))
        except Exception as error:
            error.add_note(f"in {case}")
            raise
    return found


def assemble(parts: list[dict[str, np.ndarray]], case: Case) -> dict[str, Tensor]:
    """The whole y, dx and dw from every rank's part; replicated ones must be equal on all ranks."""
    world_size = len(parts)
    input_split, output_split = splits(case)
    weight_split = "width" if case.direction == "row" else "fused rows"
    whole = {}
    for name, split in (("y", output_split), ("dx", input_split), ("dw", weight_split)):
        tensors = [torch.from_numpy(part[name]) for part in parts]
        if split == "none":
            assert all(torch.equal(tensors[0], other) for other in tensors[1:]), f"{name} differs between ranks"
            whole[name] = tensors[0]
        elif split in ("fused", "fused rows"):
            dim = -1 if split == "fused" else 0
            order = torch.cat([fused_rows(rank, world_size) for rank in range(world_size)])
            whole[name] = torch.cat(tensors, dim=dim).index_select(dim, order.argsort())
        else:
            whole[name] = torch.cat(tensors, dim={"tokens": 0, "width": -1}[split])
    return whole


DIRECTIONS = ["column", "row"]
ALL_BITS: list[Bits] = ["ternary", 2, 3, 4, 5, 6, 7, 8]
BF16_BITS: list[Bits] = ["ternary", 8]
TENSOR_PARALLEL_BITS: list[Bits] = ["ternary", 4, 8]
ACTIVATIONS = ["none", "int8"]


def cases_of(world_size: int) -> list[Case]:
    """What the tests below ask for."""
    cases = [Case(d, dyadic=False) for d in DIRECTIONS]
    if world_size == 1:
        cases += [Case(d, bits=b, activation=a) for d in DIRECTIONS for b in ALL_BITS for a in ACTIVATIONS]
        cases += [Case(d, activation="none", dyadic=False) for d in DIRECTIONS]
        cases += [Case(d, bits=b, compute="bf16", dyadic=False) for d in DIRECTIONS for b in BF16_BITS]
        cases += [Case(d, backwards=2) for d in DIRECTIONS]
    else:
        cases += [Case(d, bits=b) for d in DIRECTIONS for b in TENSOR_PARALLEL_BITS]
        cases += [Case(d, activation="none") for d in DIRECTIONS]
        cases += [Case(d, activation=a, sequence=True) for d in DIRECTIONS for a in ACTIVATIONS]
        cases += [Case(d, dyadic=False, sequence=True) for d in DIRECTIONS]
    return cases


Results = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="module")
def run() -> Results:
    """run(case, world_size=1): the whole y, dx and dw of a case."""
    found = {}
    for world_size in (1, 2, 4):
        cases = cases_of(world_size)
        by_rank = run_distributed(run_linears, world_size, cases)
        for case, parts in zip(cases, zip(*by_rank, strict=True), strict=True):
            found[case, world_size] = assemble(list(parts), case)
    return lambda case, world_size=1: found[case, world_size]


def quantized_input(case: Case) -> Tensor:
    """The activation the linear really multiplies with."""
    x = whole_input(case)[0]
    if case.activation == "none":
        return x
    codes, scale = quantize_tokens(x, token_absmax(x))
    return codes * scale


def whole_weight(case: Case) -> Tensor:
    return whole_codes(case).float() * whole_scale(case)[:, None]


def with_nn_linear(case: Case) -> dict[str, Tensor]:
    """The reference: torch's nn.Linear that holds the dequantised weight, on the dequantised activation."""
    linear = nn.Linear(IN, OUT, bias=False)
    with torch.no_grad():
        linear.weight.copy_(whole_weight(case))
    x = quantized_input(case).requires_grad_()
    y = linear(x)
    y.backward(whole_input(case)[1])
    assert x.grad is not None and linear.weight.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dw": linear.weight.grad}


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def bounds(case: Case) -> dict[str, Tensor]:
    """How far forward, dgrad and wgrad may be from another order of the same sums."""
    x, grad, weight = quantized_input(case), whole_input(case)[1], whole_weight(case)
    return {
        "y": product_bound(flat(x), weight.t()).view(TOKENS, BATCH, OUT),
        "dx": product_bound(flat(grad), weight).view(TOKENS, BATCH, IN),
        "dw": product_bound(flat(grad).t(), flat(x)),
    }


def test_dyadic_inputs_are_what_this_file_says() -> None:
    """Their int8 scale is exactly 1/16 and quantisation changes nothing, so equality below is equality of the sums."""
    x = whole_input(Case("row"))[0]
    codes, scale = quantize_tokens(x, token_absmax(x))
    assert bool((scale == 1 / 16).all()) and torch.equal(codes * scale, x)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_nn_linear_on_the_dequantised_weight(run: Results, direction: str, bits: Bits, activation: str) -> None:
    """Forward, dgrad and wgrad, bit for bit. Controls: any wrong row scale or code order changes them."""
    case = Case(direction, bits=bits, activation=activation)
    ours, reference = run(case), with_nn_linear(case)
    for name in ("y", "dx", "dw"):
        assert torch.equal(ours[name], reference[name]), name


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ordinary_inputs_stay_within_the_order_of_sums(run: Results, direction: str, activation: str) -> None:
    """Normal inputs. nn.Linear adds scaled products; the low-bit linear scales integer sums.

    Control: the quantised activation differs from the float activation by far more than the bound.
    """
    case = Case(direction, activation=activation, dyadic=False)
    ours, reference = run(case), with_nn_linear(case)
    for name, bound in bounds(case).items():
        assert_within(ours[name], reference[name], bound)
    if activation == "int8":
        unquantised = with_nn_linear(replace(case, activation="none"))
        assert float((unquantised["y"] - ours["y"]).abs().max()) > 100 * float(bounds(case)["y"].max())


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tensor_parallel_gives_the_bits_of_one_rank(run: Results, direction: str, world_size: int) -> None:
    """Ternary codes and int8 activations. The forward is exact for ordinary inputs.

    dgrad and wgrad are within the rounding of another order of their sums. Control for the row direction:
    test_scaled_partial_sums_would_depend_on_the_split.
    """
    case = Case(direction, dyadic=False)
    one, many = run(case), run(case, world_size)
    assert torch.equal(many["y"], one["y"])
    for name, bound in bounds(case).items():
        assert_within(many[name], one[name], bound)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bits", TENSOR_PARALLEL_BITS)
def test_tensor_parallel_backward_is_exact_where_the_sums_are(
    run: Results, direction: str, bits: Bits, world_size: int
) -> None:
    case = Case(direction, bits=bits)
    one, many = run(case), run(case, world_size)
    for name in ("y", "dx", "dw"):
        assert torch.equal(many[name], one[name]), name


def test_scaled_partial_sums_would_depend_on_the_split(run: Results) -> None:
    """Why sums are reduced unscaled: the same halves, scaled before they are added, give other bits."""
    case = Case("row", dyadic=False)
    x, weight = quantized_input(case), whole_weight(case)
    halves = x[..., : IN // 2] @ weight[:, : IN // 2].t() + x[..., IN // 2 :] @ weight[:, IN // 2 :].t()
    assert not torch.equal(halves, run(case)["y"])


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sequence_parallel_equals_without(run: Results, direction: str, world_size: int, activation: str) -> None:
    """Same sums, other collectives; dyadic inputs, so bit for bit."""
    case = Case(direction, activation=activation)
    plain, sequence = run(case, world_size), run(replace(case, sequence=True), world_size)
    for name in ("y", "dx", "dw"):
        assert torch.equal(sequence[name], plain[name]), name


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sequence_parallel_keeps_each_token_with_its_scale(run: Results, direction: str, world_size: int) -> None:
    """Ordinary inputs, where every token has a scale of its own: the forward is still exact.

    Dyadic tokens all have the same scale, so they would not show that a token got the scale of another.
    """
    case = Case(direction, dyadic=False)
    plain, sequence = run(case, world_size), run(replace(case, sequence=True), world_size)
    assert torch.equal(sequence["y"], plain["y"])
    for name, bound in bounds(case).items():
        assert_within(sequence[name], plain[name], bound)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bits", BF16_BITS)
def test_bf16_rounds_results_only(run: Results, direction: str, bits: Bits) -> None:
    """Codes and int8 activations are exact in bf16.

    Forward: the product and the scaled result are rounded once each. dgrad: the product is rounded once. wgrad: x_q *
    s_x is rounded to bf16 before an fp32 product. Each rounding changes a number by up to u = 2^-8 of itself. The fp32
    sums have twice the bound of `bounds`, whose inputs are not yet rounded to bf16.
    """
    case = Case(direction, bits=bits, compute="bf16", dyadic=False)
    ours = run(case)
    x, grad = (part.bfloat16().float() for part in whole_input(case))
    weight, u = whole_weight(case).double(), UNIT_ROUNDOFF[torch.bfloat16]
    codes, scale = quantize_tokens(x, token_absmax(x))
    x_used = codes.double() * scale.double()
    fp32_sums = {name: 2 * bound for name, bound in bounds(case).items()}
    y, dx, dw = x_used @ weight.t(), grad.double() @ weight, flat(grad).double().t() @ flat(x_used)
    assert_within(ours["y"], y, ((1 + u) ** 2 - 1) * y.abs() + fp32_sums["y"])
    assert_within(ours["dx"], dx, u * dx.abs() + fp32_sums["dx"])
    assert_within(ours["dw"], dw, u * (flat(grad).double().t().abs() @ flat(x_used).abs()) + fp32_sums["dw"])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradient_of_two_backward_passes_is_their_sum(run: Results, direction: str) -> None:
    """Micro-batches add up in the gradient buffer; y and dx do not change."""
    case = Case(direction)
    once, twice = run(case), run(replace(case, backwards=2))
    assert torch.equal(twice["dw"], 2 * once["dw"])
    assert torch.equal(twice["y"], once["y"]) and torch.equal(twice["dx"], once["dx"])


def check_refusals(rank: int, world_size: int) -> None:
    linear = build_linear(Case("column"), rank, world_size, dist.group.WORLD)
    x = whole_input(Case("column"))[0]
    with pytest.raises(RuntimeError, match="must require a gradient"):
        linear(x)
    with torch.no_grad():
        without = linear(x)[0]
    assert torch.equal(without, linear(x.requires_grad_())[0].detach())
    config = transformer_config(config_of(Case("row"), 1), on_cpu=True)
    group = dist.group.WORLD
    with pytest.raises(ValueError, match="no bias"):
        RowParallelLowBitLinear(IN, OUT, config=config, tp_group=group, bias=True)
    with pytest.raises(ValueError, match="already split"):
        RowParallelLowBitLinear(IN, OUT, config=config, tp_group=group, input_is_parallel=False)
    with pytest.raises(ValueError, match="gather_output"):
        ColumnParallelLowBitLinear(IN, OUT, config=config, tp_group=group, gather_output=True)


def test_an_input_without_gradient_and_unsupported_arguments_are_refused() -> None:
    """Autograd would skip the backward of such an input without a message, and the weight would never learn."""
    run_distributed(check_refusals, 1)


def float_tensors_of(num_elements: int) -> int:
    """Live float tensors with that many elements, made since gc.freeze()."""
    gc.collect()
    return sum(
        isinstance(thing, Tensor) and thing.is_floating_point() and thing.numel() == num_elements
        for thing in gc.get_objects()
    )


def check_memory(rank: int, world_size: int, direction: str, activation: str) -> dict[str, Any]:
    """What one forward keeps for the backward, and how many float tensors of the weight's size live after each pass."""
    case = Case(direction, activation=activation)
    gc.freeze()  # leaves out everything but the linear and its passes
    linear = build_linear(case, rank, world_size, dist.group.WORLD)
    x = whole_input(case)[0].requires_grad_()
    saved: list[tuple[str, int]] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != x.data_ptr():
            saved.append((str(tensor.dtype), tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y, _ = linear(x)
    after_forward = float_tensors_of(OUT * IN)
    y.backward(torch.ones_like(y))
    after_backward = float_tensors_of(OUT * IN)
    gc.unfreeze()
    return {"saved": saved, "after forward": after_forward, "after backward": after_backward}


def check_all_memory(rank: int, world_size: int) -> None:
    tokens = TOKENS * BATCH
    for direction in DIRECTIONS:
        found = check_memory(rank, world_size, direction, "int8")
        assert found["saved"] == [("torch.float32", tokens)]
        assert (found["after forward"], found["after backward"]) == (0, 1)
        control = check_memory(rank, world_size, direction, "none")
        assert control["saved"] == []


def test_backward_keeps_scales_beside_its_input_and_nothing_of_the_weight() -> None:
    """The forward keeps the input itself, not a copy, and one scale per token.

    Control: without quantised activations there are no scales. The one float tensor of the weight's
    size is the gradient.
    """
    run_distributed(check_all_memory, 1)
