# pyright: reportMissingImports=false, reportIndexIssue=false
"""Triton form of `transpose.py`: square tiles through shared memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqt_dist.kernels.launch import launch

# Whole 128-byte lines on both sides.
TILE = 128


@triton.jit
def _transpose_kernel(codes, token_factor, out, tokens, features, FACTOR: tl.constexpr, TILE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    feature = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (token < tokens)[:, None] & (feature < features)[None, :]
    value = tl.load(codes + token[:, None] * features + feature[None, :], mask=inside, other=0.0)
    if FACTOR:
        factor = tl.load(token_factor + token, mask=token < tokens, other=0.0)
        value = (value.to(tl.float32) * factor[:, None]).to(tl.float8e4nv)
    tl.store(out + feature[:, None] * tokens + token[None, :], tl.trans(value), mask=tl.trans(inside))


def transpose(codes: Tensor, token_factor: Tensor | None) -> Tensor:
    """See transpose.py."""
    tokens, features = codes.shape
    out = torch.empty(features, tokens, dtype=codes.dtype, device=codes.device)
    # Without a factor the codes only move, as bytes.
    source, target = (codes, out) if token_factor is not None else (codes.view(torch.uint8), out.view(torch.uint8))
    grid = (triton.cdiv(tokens, TILE), triton.cdiv(features, TILE))
    launch(
        _transpose_kernel,
        grid,
        source,
        token_factor,
        target,
        tokens,
        features,
        FACTOR=token_factor is not None,
        TILE=TILE,
        num_warps=8,
    )
    return out
