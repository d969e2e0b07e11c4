"""BitNet b1.58: ternary values with the scale of the whole matrix, and straight-through gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dqt_dist.launch import Launch
from dqt_dist.layers.bitnet import (
    ColumnParallelBitLinear,
    RowParallelBitLinear,
    fake_quantize_tokens,
    ternarize,
)
from dqt_dist.layers.transformer_config import transformer_config
from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout
from dqt_dist.lowbit.scale import BITNET_SCALE_FLOOR
from dqt_dist.parallel import groups as process_groups
from tests.distributed import run_distributed
from tests.small import small_config

ROWS, COLUMNS = 12, 16


def whole_weight() -> Tensor:
    """Two matrices of ROWS / 2 rows, one ten times the other. Multiples of 2^-12, so every sum is exact."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4))
    weight[ROWS // 2 :] *= 10
    return (weight * 4096).round() / 4096


def by_formula(weight: Tensor) -> Tensor:
    """clamp(round(W / s), -1, 1) * s with s = mean|W|, for each of the two matrices."""
    parts = []
    for matrix in weight.chunk(2):
        scale = matrix.abs().mean()
        parts.append((matrix / scale).round().clamp(-1, 1) * scale)
    return torch.cat(parts)


def shard(split: str, rank: int, world_size: int) -> tuple[ShardLayout, Tensor]:
    """This rank's layout and the index of its elements: rows of the two matrices, or columns."""
    matrices = (LogicalMatrix("gate", ROWS // 2, COLUMNS), LogicalMatrix("up", ROWS // 2, COLUMNS))
    index = torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS)
    if split == "columns":
        width = COLUMNS // world_size
        blocks = (RowBlock(0, 0, ROWS // 2), RowBlock(1, 0, ROWS // 2))
        return ShardLayout(matrices, blocks, width, rank * width), index[:, rank * width : (rank + 1) * width]
    share = ROWS // 2 // world_size
    blocks = (RowBlock(0, rank * share, share), RowBlock(1, rank * share, share))
    rows = torch.arange(rank * share, (rank + 1) * share)
    return ShardLayout(matrices, blocks, COLUMNS), index[torch.cat([rows, rows + ROWS // 2])]


def run_ternarize(rank: int, world_size: int, split: str, dtype: str) -> dict[str, np.ndarray]:
    layout, index = shard(split, rank, world_size)
    weight = whole_weight().flatten()[index].to(getattr(torch, dtype)).requires_grad_()
    out = ternarize(weight, layout, dist.group.WORLD)
    grad = torch.arange(1.0, index.numel() + 1).view(index.shape).to(weight.dtype)
    out.backward(grad)
    assert weight.grad is not None and out.dtype == weight.dtype
    assert torch.equal(weight.grad, grad), "the gradient must pass unchanged"
    return {"values": out.detach().float().numpy(), "index": index.numpy()}


def assembled(split: str, world_size: int, dtype: str = "float32") -> Tensor:
    whole = torch.full((ROWS * COLUMNS,), float("nan"))
    for part in run_distributed(run_ternarize, world_size, split, dtype):
        whole[torch.from_numpy(part["index"])] = torch.from_numpy(part["values"])
    return whole.view(ROWS, COLUMNS)


def test_weights_become_ternary_and_gradients_pass() -> None:
    """Exactly three values per matrix. Control: the usual form x + (q - x) gives other values."""
    values, weight = assembled("rows", 1), whole_weight()
    assert torch.equal(values, by_formula(weight))
    assert [len(part.unique()) for part in values.chunk(2)] == [3, 3]
    assert not torch.equal(weight + (by_formula(weight) - weight), by_formula(weight))


def test_bf16_weights_become_ternary_too() -> None:
    values = assembled("rows", 1, "bfloat16")
    assert torch.equal(values, by_formula(whole_weight().bfloat16().float()).bfloat16().float())


@pytest.mark.parametrize("split", ["rows", "columns"])
def test_the_scale_is_that_of_the_whole_matrix_under_tensor_parallelism(split: str) -> None:
    """Bit-equal to one rank. Control: the scale of one half differs."""
    assert torch.equal(assembled(split, 2), by_formula(whole_weight()))
    half = whole_weight()[: ROWS // 2, : COLUMNS // 2]
    assert float(half.abs().mean()) != float(whole_weight()[: ROWS // 2].abs().mean())


def check_zeros(rank: int, world_size: int) -> None:
    layout, index = shard("rows", rank, world_size)
    assert not bool(ternarize(torch.zeros(index.shape), layout, dist.group.WORLD).any())


def test_a_matrix_of_zeros_stays_zero() -> None:
    """Control: without the floor 0 / 0 is nan."""
    assert BITNET_SCALE_FLOOR > 0
    run_distributed(check_zeros, 1)


def run_tokens(rank: int, world_size: int) -> np.ndarray:
    """This rank's features of tokens whose maximum lies on rank 1."""
    x = whole_tokens().chunk(world_size, dim=-1)[rank].clone().requires_grad_()
    out = fake_quantize_tokens(x, dist.group.WORLD)
    grad = torch.randn(x.shape)
    out.backward(grad)
    assert x.grad is not None and torch.equal(x.grad, grad)
    return out.detach().numpy()


def whole_tokens() -> Tensor:
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(5))
    x[..., -1] = 9.0
    return x


def test_activations_are_8_bit_over_the_full_width_and_gradients_pass() -> None:
    parts = run_distributed(run_tokens, 2)
    x = whole_tokens()
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert torch.equal(torch.cat([torch.from_numpy(part) for part in parts], dim=-1), (x / scale).round() * scale)


def check_linears(rank: int, world_size: int) -> None:
    config = small_config("quantization.method=bitnet")
    groups = process_groups.initialize(config, Launch(rank, world_size, rank, world_size, "test", "", 0))
    for kind, extra in (
        (ColumnParallelBitLinear, {"gather_output": False}),
        (RowParallelBitLinear, {"input_is_parallel": True}),
    ):
        linear = kind(
            COLUMNS,
            ROWS,
            config=transformer_config(config, on_cpu=True),
            init_method=torch.nn.init.zeros_,
            bias=False,
            skip_bias_add=False,
            tp_group=groups.tensor,
            **extra,
        )
        linear.layout, _ = shard("rows", 0, 1)
        linear.weight.data.copy_(whole_weight())
        x = whole_tokens().requires_grad_()
        y, _ = linear(x)
        grad = torch.randn(y.shape)
        y.backward(grad)
        scale = whole_tokens().abs().amax(-1, keepdim=True) / 127
        quantized_x, quantized_w = (whole_tokens() / scale).round() * scale, by_formula(whole_weight())
        assert torch.equal(y, quantized_x @ quantized_w.t())
        assert torch.equal(x.grad, grad @ quantized_w)  # type: ignore[arg-type]
        weight_gradient = grad.flatten(0, 1).t() @ quantized_x.flatten(0, 1)
        assert torch.equal(linear.weight.grad, weight_gradient)  # type: ignore[arg-type]


def test_linears_multiply_the_quantised_operands() -> None:
    """y = x_q @ W_q^T, dx = dy @ W_q, dW = dy^T @ x_q, by the same torch products."""
    run_distributed(check_linears, 1)
