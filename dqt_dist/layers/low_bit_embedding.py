"""Embedding and head as codes, for `quantization.embeddings`. The DQT authors' code quantises both like any linear.

embedding   y[token] = s * C[token]        dC adds dy at the row of each token; vocabulary split by rows over TP
head        a column-parallel low-bit linear, called the way GPTModel calls its output layer
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from dqt_dist.layers.low_bit_linear import ColumnParallelLowBitLinear
from dqt_dist.layers.transformer_config import LlamaTransformerConfig
from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.lowbit.packing import unpack
from dqt_dist.parallel.collectives import Group


class _LookUp(torch.autograd.Function):
    """tokens int64 [...] -> [..., hidden], zeros for tokens of other ranks.

    `anchor` requires a gradient, so that autograd calls the backward.
    """

    @staticmethod
    def forward(
        ctx, anchor: Tensor, tokens: Tensor, weight: LowBitMatrix, first_row: int, dtype: torch.dtype
    ) -> Tensor:
        rows = tokens.flatten() - first_row
        elsewhere = (rows < 0) | (rows >= weight.rows)
        rows = rows.masked_fill(elsewhere, 0)
        ctx.save_for_backward(rows, elsewhere)
        ctx.weight = weight
        codes = unpack(weight.whole()[rows], weight.grid, weight.columns)
        scale = weight.row_scale()[rows].masked_fill(elsewhere, 0.0)
        return (codes.float() * scale[:, None]).to(dtype).view(*tokens.shape, weight.columns)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None, None, None, None]:
        rows, elsewhere = ctx.saved_tensors
        grad = grad.flatten(0, -2).float().masked_fill(elsewhere[:, None], 0.0)
        # Unlike index_add, this operator sums the tokens of one row in a fixed order on every device.
        total = torch.ops.aten.embedding_dense_backward(grad, rows, ctx.weight.rows, -1, False)
        ctx.weight.gradient.add(total)
        return None, None, None, None, None


class LowBitEmbedding(nn.Module):
    """Stands in for megatron.core's VocabParallelEmbedding."""

    def __init__(self, config: LlamaTransformerConfig, vocab_size: int, group: Group, device: torch.device) -> None:
        super().__init__()
        self.group, self.dtype, self.sequence_parallel = group, config.params_dtype, config.sequence_parallel
        rows = vocab_size // group.size()
        self.first_row = group.rank() * rows
        self.weight = LowBitMatrix.of(config.quantization, rows, config.hidden_size, device)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [b, s] -> [b, s, hidden], or [s / tp, b, hidden] under sequence parallelism.

        LanguageModelEmbedding expects these two shapes.
        """
        anchor = torch.zeros((), device=tokens.device, requires_grad=torch.is_grad_enabled())
        embedded = _LookUp.apply(anchor, tokens, self.weight, self.first_row, self.dtype)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(embedded.transpose(0, 1).contiguous(), group=self.group)
        return reduce_from_tensor_model_parallel_region(embedded, group=self.group)


class LowBitHead(ColumnParallelLowBitLinear):
    """The output layer of GPTModel. It is given no weight, and its logits stay split over the vocabulary."""

    def forward(self, x: Tensor, weight: None = None, runtime_gather_output: bool | None = None, **_: Any):
        assert weight is None and not runtime_gather_output
        return super().forward(x)
