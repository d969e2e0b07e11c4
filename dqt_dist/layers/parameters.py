"""The weights of a rank by kind: high-precision parameters, and low-bit matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dqt_dist.lowbit.coordinates import ShardLayout
from dqt_dist.lowbit.matrix import LowBitMatrix


@dataclass(frozen=True)
class Parameter:
    """A high-precision parameter and what it is of the model."""

    tensor: nn.Parameter
    layout: ShardLayout
    """Coordinates of its rows; a vector is a matrix with one column."""
    replicated: bool
    """The same values on every tensor-parallel rank (norms)."""


def low_bit_matrices(chunks: nn.Module) -> list[LowBitMatrix]:
    """All low-bit shards of this rank, in model order."""
    return [module for module in chunks.modules() if isinstance(module, LowBitMatrix)]


def parameters(chunks: nn.Module) -> list[Parameter]:
    """All high-precision parameters of this rank, in model order."""
    return [parameter.description for parameter in chunks.parameters()]  # type: ignore[attr-defined]
