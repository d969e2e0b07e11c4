# pyright: reportMissingImports=false, reportIndexIssue=false
"""Triton forms of `cross_entropy.py`: one program per token.

Floor for bf16 logits: 2 bytes read in the forward, 2 read and 2 written in the backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from dqt_dist.kernels.launch import launch

BLOCK = 2048
NUM_WARPS = 8


@triton.jit
def _statistics_kernel(logits, labels, largest, sum_exp, own, vocabulary, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * vocabulary
    block = tl.arange(0, BLOCK)
    # Online softmax in each lane (Milakov and Gimelshein, arXiv 1805.02867). The lanes are merged at the end.
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    z = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        offsets = start + block
        x = tl.load(row + offsets, mask=offsets < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(m, x)
        # A lane past the end of the first block has seen no logit yet, and -inf - -inf is no number.
        z = tl.where(higher == float("-inf"), 0.0, z * tl.exp(m - higher) + tl.exp(x - higher))
        m = higher
    top = tl.max(m)
    tl.store(largest + token, top)
    tl.store(sum_exp + token, tl.sum(z * tl.exp(m - top)))
    label = tl.load(labels + token)
    here = (label >= 0) & (label < vocabulary)
    tl.store(own + token, tl.load(row + label, mask=here, other=0.0).to(tl.float32))


@triton.jit
def _gradient_kernel(logits, labels, log_sum, grad, vocabulary, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * vocabulary
    label = tl.load(labels + token)
    log_z = tl.load(log_sum + token)
    factor = tl.load(grad + token)
    for start in range(0, vocabulary, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < vocabulary
        softmax = tl.exp(tl.load(row + offsets, mask=inside, other=0.0).to(tl.float32) - log_z)
        value = (softmax - tl.where(offsets == label, 1.0, 0.0)) * factor
        tl.store(row + offsets, value.to(logits.dtype.element_ty), mask=inside)


def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See cross_entropy.py."""
    assert logits.is_contiguous() and labels.is_contiguous()
    tokens, vocabulary = logits.shape
    found = torch.empty(3, tokens, device=logits.device)
    launch(
        _statistics_kernel,
        (tokens,),
        logits,
        labels,
        found[0],
        found[1],
        found[2],
        vocabulary,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return found[0], found[1], found[2]


def gradient_(logits: Tensor, labels: Tensor, log_sum: Tensor, grad: Tensor) -> Tensor:
    """See cross_entropy.py."""
    tokens, vocabulary = logits.shape
    launch(
        _gradient_kernel,
        (tokens,),
        logits,
        labels,
        log_sum.contiguous(),
        grad.contiguous(),
        vocabulary,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    # Autograd counts writes by torch, but not writes by a kernel.
    increment_version(logits)
    return logits
