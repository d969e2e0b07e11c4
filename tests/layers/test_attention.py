"""CausalAttention against softmax written out, its causality, and its documents."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dqt_dist.config import Config
from dqt_dist.layers.attention import CausalAttention, document_mask
from dqt_dist.layers.transformer_config import LlamaTransformerConfig
from tests.small import small_config
from tests.tolerances import ELEMENTWISE_FP32, Tolerance

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
    for position in range(len(query)):
        for head in range(query.shape[2]):
            group = head // share
            scores = torch.einsum("bd,sbd->sb", query[position, :, head], key[: position + 1, :, group]) * scale
            weights = scores.softmax(dim=0)
            out[position, :, head] = torch.einsum("sb,sbd->bd", weights, value[: position + 1, :, group])
    return out.flatten(2)


def assert_forward_and_gradients(
    ours: list[torch.Tensor], out: torch.Tensor, reference: list[torch.Tensor], expected: torch.Tensor
) -> None:
    """`out` of `ours` equals `expected` of `reference`, float64, and so do the gradients of query, key and value."""
    ELEMENTWISE_FP32.assert_close(out.detach(), expected.detach(), "forward")
    grad = torch.randn(out.shape)
    out.backward(grad)
    expected.backward(grad.double())
    for x, y, name in zip(ours, reference, ("query", "key", "value"), strict=True):
        assert x.grad is not None and y.grad is not None
        ELEMENTWISE_FP32.assert_close(x.grad, y.grad, name)


@pytest.mark.parametrize("query_groups", [6, 3, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_equals_softmax_written_out(query_groups: int, scale: float | None) -> None:
    """Forward and all three gradients, in float64 on the reference side."""
    ours = [x.requires_grad_() for x in inputs(query_groups)]
    reference = [x.detach().double().requires_grad_() for x in ours]
    out = attention(scale)(*ours, attention_mask=None)
    expected = written_out(*reference, scale=scale or 1 / math.sqrt(WIDTH))
    assert out.shape == (SEQUENCE, BATCH, HEADS * WIDTH)
    assert_forward_and_gradients(ours, out, reference, expected)


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


# ---- documents ----


def masked_config(*overrides: str) -> Config:
    return small_config(f"model.seq_length={SEQUENCE}", "data.document_masking=true", *overrides)


def test_documents_are_attended_to_one_by_one() -> None:
    """Forward and gradients equal those of each document alone, in float64. The last begins are those of no document,
    and one document of the second sample has a single position."""
    starts = torch.tensor([[0, 3, 7, 7], [0, 1, 2, 6]], dtype=torch.int32)
    ours = [x.requires_grad_() for x in inputs(2)]
    reference = [x.detach().double().requires_grad_() for x in ours]
    out = attention()(*ours, attention_mask=document_mask(starts, masked_config()))
    expected = torch.zeros(SEQUENCE, BATCH, HEADS * WIDTH, dtype=torch.float64)
    for sample, begins in enumerate(starts.tolist()):
        for begin, end in itertools.pairwise([*begins, SEQUENCE]):
            document = (x[begin:end, sample : sample + 1] for x in reference)
            expected[begin:end, sample : sample + 1] = written_out(*document, scale=1 / math.sqrt(WIDTH))
    assert_forward_and_gradients(ours, out, reference, expected)


def test_a_sample_that_is_one_document_is_attended_to_as_without_documents() -> None:
    query, key, value = inputs(3)
    mask = document_mask(torch.tensor([[0, SEQUENCE]] * BATCH, dtype=torch.int32), masked_config())
    masked, causal = (attention()(query, key, value, attention_mask=m) for m in (mask, None))
    ELEMENTWISE_FP32.assert_close(masked, causal)


BF16_ATTENTION = Tolerance(
    2.0**-5,
    "probabilities, their gradients and the results are rounded to bf16, 2^-8 each, before and after sums that cancel",
)


@pytest.mark.gpu
@pytest.mark.parametrize(("query_groups", "width"), [(8, 64), (2, 64), (4, 128), (8, 16), (8, 256)])
def test_attention_of_varying_length_is_attention_with_a_mask(query_groups: int, width: int) -> None:
    """Forward and gradients of the kernel against the mask in fp32. Documents of 1 to 300 positions, in blocks of which
    some end within a tile, and documents of length 0.

    Negative control: causal attention over the whole samples.
    """
    shape = [f"model.hidden_size={8 * width}", "model.num_attention_heads=8", f"model.num_query_groups={query_groups}"]
    bf16, fp32 = (
        small_config(*shape, "model.seq_length=300", f"quantization.compute={compute}") for compute in ("bf16", "fp32")
    )
    starts = [[0, 1, 5, 131, 300, 300], [0, 300, 300, 300, 300, 300], [0, 0, 128, 256, 299, 300]]
    document_starts = torch.tensor(starts, dtype=torch.int32, device="cuda")
    lengths = document_mask(document_starts, bf16)
    assert lengths.tolist() == [300 * sample + start for sample, row in enumerate(starts) for start in row] + [900]
    shapes = [(300, 3, heads, width) for heads in (8, query_groups, query_groups)]
    low = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    high = [x.detach().float().requires_grad_() for x in low]
    grad = torch.randn(300, 3, 8 * width, device="cuda", dtype=torch.bfloat16)
    out = attention()(*low, attention_mask=lengths)
    expected = attention()(*high, attention_mask=document_mask(document_starts, fp32))
    assert out.is_contiguous()
    found = (out, *torch.autograd.grad(out, low, grad))
    wanted = (expected, *torch.autograd.grad(expected, high, grad.float()))
    for x, y, name in zip(found, wanted, ("forward", "query", "key", "value"), strict=True):
        BF16_ATTENTION.assert_close(x.detach(), y.detach(), name)
    across = attention()(*low, attention_mask=None)
    assert float((across - expected).detach().abs().max()) > 10 * BF16_ATTENTION.relative * float(
        expected.detach().abs().max()
    )
    # Documents of length 0 change no bit.
    assert torch.equal(attention()(*low, attention_mask=lengths.unique()), out)


# ---- memory ----


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
