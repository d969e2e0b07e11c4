"""CausalAttention against softmax written out, and its causality."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dqt_dist.layers.attention import CausalAttention
from dqt_dist.layers.transformer_config import LlamaTransformerConfig
from tests.tolerances import ELEMENTWISE_FP32

SEQUENCE, BATCH, HEADS, WIDTH = 7, 2, 6, 8


def attention(scale: float | None = None) -> CausalAttention:
    config = LlamaTransformerConfig(num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS)
    return CausalAttention(config, softmax_scale=scale)


def inputs(query_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """query [s, b, heads, d], key and value [s, b, groups, d]."""
    return (
        torch.randn(SEQUENCE, BATCH, HEADS, WIDTH),
        torch.randn(SEQUENCE, BATCH, query_groups, WIDTH),
        torch.randn(SEQUENCE, BATCH, query_groups, WIDTH),
    )


def written_out(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Computes one query position of one head at a time. Head h attends with group h // (heads / groups)."""
    share = query.shape[2] // key.shape[2]
    out = torch.zeros(query.shape, dtype=query.dtype)
    for position in range(SEQUENCE):
        for head in range(query.shape[2]):
            group = head // share
            scores = torch.einsum("bd,sbd->sb", query[position, :, head], key[: position + 1, :, group]) * scale
            weights = scores.softmax(dim=0)
            out[position, :, head] = torch.einsum("sb,sbd->bd", weights, value[: position + 1, :, group])
    return out.flatten(2)


@pytest.mark.parametrize("query_groups", [6, 3, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_equals_softmax_written_out(query_groups: int, scale: float | None) -> None:
    """Forward and all three gradients, in float64 on the reference side."""
    ours = [x.requires_grad_() for x in inputs(query_groups)]
    reference = [x.detach().double().requires_grad_() for x in ours]
    out = attention(scale)(*ours, attention_mask=None)
    expected = written_out(*reference, scale=scale or 1 / math.sqrt(WIDTH))
    assert out.shape == (SEQUENCE, BATCH, HEADS * WIDTH)
    ELEMENTWISE_FP32.assert_close(out.detach(), expected.detach(), "forward")
    grad = torch.randn(out.shape)
    out.backward(grad)
    expected.backward(grad.double())
    for x, y, name in zip(ours, reference, ("query", "key", "value"), strict=True):
        assert x.grad is not None and y.grad is not None
        ELEMENTWISE_FP32.assert_close(x.grad, y.grad, name)


def test_consecutive_heads_share_a_group() -> None:
    """Control of the test above: with head h on group h % groups, another convention, the result differs."""
    query, key, value = inputs(3)
    order = torch.arange(HEADS).view(2, 3).t().flatten()
    out = attention()(query, key, value, attention_mask=None)
    other = attention()(query[:, :, order], key, value, attention_mask=None)
    assert float((out - other).abs().max()) > 0.1


def test_no_position_sees_the_future() -> None:
    query, key, value = inputs(2)
    before = attention()(query, key, value, attention_mask=None)
    for x in (query, key, value):
        x[4:] += 1.0
    after = attention()(query, key, value, attention_mask=None)
    assert torch.equal(after[:4], before[:4])
    assert not bool((after[4:] == before[4:]).all(dim=-1).any())


@pytest.mark.gpu
@pytest.mark.parametrize("query_groups", [16, 4])
def test_nothing_is_copied_between_the_layouts(query_groups: int) -> None:
    """The kernel writes output and gradients in the memory layout of query, key and value, so permutations are views.

    Negative control: the output for a query that is stored as [b, n, s, d] must be copied.
    """
    shapes = [(256, 2, heads, 128) for heads in (16, query_groups, query_groups)]
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    out = attention()(q, k, v, attention_mask=None)
    assert out._base is not None and out.is_contiguous()
    for grad in torch.autograd.grad(out, (q, k, v), torch.randn_like(out)):
        assert grad.is_contiguous()
    other = q.detach().permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    assert attention()(other, k.detach(), v.detach(), attention_mask=None)._base is None
