"""The weights of a rank by kind: high-precision parameters, and low-bit matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dqt_dist.lowbit.coordinates import ShardLayout
from dqt_dist.lowbit.matrix import LowBitMatrix


@dataclass(frozen=True)
class Parameter:
    """A high-precision parameter and its place in the model."""

    tensor: nn.Parameter
    layout: ShardLayout
    """Logical coordinates. A vector is a matrix with one column."""
    replicated: bool
    """Whether every tensor-parallel rank holds the same values (norms)."""


def low_bit_matrices(model_chunks: nn.Module) -> list[LowBitMatrix]:
    """All low-bit shards of this rank, in model order."""
    return [module for module in model_chunks.modules() if isinstance(module, LowBitMatrix)]


def parameters(model_chunks: nn.Module) -> list[Parameter]:
    """All high-precision parameters of this rank, in model order."""
    return [parameter.description for parameter in model_chunks.parameters()]  # type: ignore[attr-defined]
