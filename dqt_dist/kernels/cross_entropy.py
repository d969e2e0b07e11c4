"""Cross-entropy over logits whose vocabulary may be split over ranks. The logits never exist in fp32 as a whole.

    loss = log(sum exp(logit)) - logit[label]        d loss / d logit = softmax - onehot(label)

The forward reads the logits once, in their own type. It keeps three fp32 numbers per token: the maximum, the sum of
exp(logit - maximum), and the label's logit. Ranks merge these numbers. The backward writes the gradient over the
logits, which are not needed any more. Triton on CUDA; elsewhere the definitions in this file, some tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Tokens whose fp32 logits exist at once on a CPU.
CHUNK = 256


def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 [tokens] each: maximum m, sum of exp(logit - m), the label's logit.

    The last is 0 where the label is not in [0, vocabulary). logits [tokens, vocabulary]; labels int64 [tokens], counted
    from the first column.
    """
    if logits.is_cuda:
        from dqt_dist.kernels import cross_entropy_triton

        return cross_entropy_triton.statistics(logits, labels)
    found = logits.new_empty(3, logits.shape[0], dtype=torch.float32)
    for rows in _chunks(logits.shape[0]):
        wide = logits[rows].float()
        here = (labels[rows] >= 0) & (labels[rows] < logits.shape[1])
        found[0, rows] = wide.amax(dim=1)
        found[1, rows] = (wide - found[0, rows, None]).exp_().sum(dim=1)
        own = wide.gather(1, labels[rows].clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        found[2, rows] = own.masked_fill(~here, 0.0)
    return found[0], found[1], found[2]


def gradient_(logits: Tensor, labels: Tensor, log_sum: Tensor, grad: Tensor) -> Tensor:
    """Overwrites logits with (softmax - onehot) * grad; log_sum = log(sum exp(logit)) and grad fp32 [tokens]."""
    if logits.is_cuda:
        from dqt_dist.kernels import cross_entropy_triton

        return cross_entropy_triton.gradient_(logits, labels, log_sum, grad)
    for rows in _chunks(logits.shape[0]):
        softmax = (logits[rows].float() - log_sum[rows, None]).exp_()
        here = ((labels[rows] >= 0) & (labels[rows] < logits.shape[1])).nonzero()[:, 0]
        softmax[here, labels[rows][here]] -= 1.0
        logits[rows] = (softmax * grad[rows, None]).to(logits.dtype)
    return logits


def _chunks(tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, CHUNK):
        yield slice(start, min(start + CHUNK, tokens))
