"""Tensors of the whole model, of which a rank holds some rectangles: what torch.distributed.checkpoint is given.

A checkpoint knows nothing of ranks. Each entry is one tensor of the logical model, for example
`codes/layers.3.mlp.up_proj`. Each rank says which rectangles of the tensor lie in its memory:

    shape [rows, columns]      chunks {(row, column): view of local memory [n, w]}

Writing takes every rectangle once: where several ranks hold equal copies, the planner picks one of them. Loading asks
for the rectangles of the NEW process grid. The planner finds the stored rectangles that overlap with these and reads
the common parts straight into the views. So the process grid may differ between save and load, and nothing is
converted. DTensor describes a grid of equal shards only. ZeRO cuts the rows of a fused qkv into unequal shards, hence
rectangles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Offset = tuple[int, int]


@dataclass
class LogicalTensor:
    """One 2-D tensor of the logical model and the rectangles of it that this rank holds."""

    shape: tuple[int, int]
    dtype: torch.dtype
    chunks: dict[Offset, Tensor] = field(default_factory=dict)

    def add(self, offset: Offset, view: Tensor) -> None:
        """Adds a rectangle; `view` must share memory with the live tensor, loading writes into it."""
        assert view.dtype == self.dtype and view.dim() == 2, (view.dtype, self.dtype, view.shape)
        self.chunks[offset] = view

    def size(self) -> torch.Size:
        return torch.Size(self.shape)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), view.size()) for offset, view in self.chunks.items()]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self.dtype), self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]


LogicalState = dict[str, LogicalTensor]


def _view(state: LogicalState, index: MetadataIndex) -> Tensor:
    assert index.offset is not None
    return state[index.fqn].chunks[tuple(index.offset)]  # type: ignore[index]


class LogicalSavePlanner(DefaultSavePlanner):
    """Finds a rectangle's memory by its offset."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return _view(self.state_dict, index)


class LogicalLoadPlanner(DefaultLoadPlanner):
    """Finds a rectangle's memory by its offset."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: LogicalState, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default one walks the state for meta tensors and would take a LogicalTensor apart into its fields.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _view(self.state_dict, index)
