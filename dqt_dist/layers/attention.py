"""Attention for the layer spec: causal and grouped-query, through torch's fused scaled_dot_product_attention.

The rotary embedding is applied in the pass that splits qkv. Megatron's local DotProductAttention materialises the S x S
scores; the fused attention never does. On CUDA cuDNN's kernel is preferred: 476 / 334 TFLOP/s forward / backward
against 278 / 200 for flash on one H200 (head 128, 8 x 16 x 2048, torch 2.11).

With document masking a position sees the positions before it in its own document. Positions need not restart for that:
RoPE turns queries and keys so that their product depends on the difference of their positions only, which is the same
wherever a document begins (RoFormer, arXiv 2104.09864, equation 16); only the rounding of the angles differs. On CUDA
flash attention for sequences of varying length does no work between documents. Elsewhere a mask is added to the scores.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.typed_torch import apply_module
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from dqt_dist.config import Config
from dqt_dist.dtypes import TORCH_DTYPES
from dqt_dist.kernels.rope import angles, split_and_rotate
from dqt_dist.layers.transformer_config import LlamaTransformerConfig

CUDA_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def document_mask(document_starts: Tensor, config: Config) -> Tensor:
    """What `CausalAttention` takes as the mask of samples that consist of documents. It is made once per micro-batch.

    document_starts: int32 [b, documents], where the documents of each sample begin, ascending from 0; what is left of a
    row is seq_length. Returns either of

        int32 [b * documents + 1]    cumulative lengths of all documents, sample after sample, for the kernels that take
                                     sequences of varying length; entries that are left are sequences of length 0
        float [b, 1, s, s]           of the run's dtype: 0 where a position sees another one, else -inf

    Both shapes depend on the shape of document_starts alone, as a CUDA graph needs.
    """
    b, s = document_starts.shape[0], config.model.seq_length
    if document_starts.is_cuda and config.has_variable_length_attention:
        sample = torch.arange(b, dtype=torch.int32, device=document_starts.device)[:, None]
        return pad((document_starts + s * sample).flatten(), (0, 1), value=b * s)
    position = torch.arange(s, dtype=torch.int32, device=document_starts.device)
    document = (document_starts[:, :, None] <= position).sum(1)
    sees = (document[:, :, None] == document[:, None, :]) & (position[:, None] >= position)
    mask = torch.zeros(b, 1, s, s, dtype=TORCH_DTYPES[config.quantization.dtype], device=position.device)
    return mask.masked_fill_(~sees[:, None], -torch.inf)


class RotarySelfAttention(SelfAttention):
    """megatron-core's self-attention, with the rotary embedding in the pass that splits qkv.

    The model is built without Megatron's position embedding, which rotates in half a dozen passes over q and k.
    """

    config: LlamaTransformerConfig

    def get_query_key_value_tensors(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [s, b, h] -> q [s, b, heads, d], k and v [s, b, groups, d], s being the whole sequence.

        heads and groups are those of this TP rank.
        """
        mixed = apply_module(self.linear_qkv)(hidden_states)[0]
        head = self.hidden_size_per_attention_head
        cos, sin = angles(mixed.shape[0], head, self.config.rope_base, mixed.device)
        groups, batch_major = self.num_query_groups_per_partition, self.config.batch_major_attention
        return split_and_rotate(mixed, groups, cos, sin, batch_major)


class CausalAttention(nn.Module):
    """Core attention with the signature of Megatron's. It is always causal. `attention_mask` is of `document_mask`."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d].

        heads and groups are those of this TP rank. attention_mask: None for samples that are one document.
        """
        if attention_mask is not None and not attention_mask.is_floating_point():
            return self._attend_in_documents(query, key, value, attention_mask)
        # [s, b, n, d] -> [b, n, s, d]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        if query.is_cuda:
            with sdpa_kernel(CUDA_BACKENDS, set_priority=True):
                out = self._attend(query, key, value, attention_mask, grouped)
        else:
            out = self._attend(query, key, value, attention_mask, grouped)
        return out.permute(2, 0, 1, 3).reshape(out.shape[2], out.shape[0], -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grouped: bool) -> Tensor:
        return scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=grouped
        )

    def _attend_in_documents(self, query: Tensor, key: Tensor, value: Tensor, cumulative_lengths: Tensor) -> Tensor:
        s, b = query.shape[:2]
        # [s, b, n, d] -> [b * s, n, d]; no copy of what is batch-major in memory
        query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        attend, arguments = _variable_length_attention()
        out = attend(
            query, key, value, cumulative_lengths, cumulative_lengths, s, s,
            scale=self.softmax_scale, window_size=(-1, 0), **arguments,
        )  # fmt: skip
        return out.view(b, s, -1).transpose(0, 1).contiguous()


@cache
def _variable_length_attention() -> tuple[Callable[..., Any], dict[str, bool]]:
    """torch's function, and arguments for fewer key than query heads. Importing it takes a second."""
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.12 there is no such argument, and grouped heads need none.
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if grouped else {}
