"""The trainer's own model in one process, filled from a checkpoint: what exported models are compared with.

The model is the one that training runs (megatron-core's GPTModel from our layer spec), in fp32, with world size 1 and
no optimizer.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqt_dist.config import Config, ParallelConfig
from dqt_dist.export.weights import Weights

if TYPE_CHECKING:
    from dqt_dist.parallel.groups import Groups

Logits = Callable[[Tensor], Tensor]
"""Token ids int64 [batch, sequence] -> fp32 logits [batch, sequence, vocabulary] on the CPU."""


# What megatron-core's layers tell one another while one model is built and run.
BUILD_NOTES = ("MLP requires ffn_hidden_size", "Warning: tp_group is None")


class WeightSource(Protocol):
    """Where a model's weights come from: a checkpoint (Weights), or an export that is imported."""

    linears: dict[str, tuple[int, int]]

    @property
    def method(self) -> str: ...

    def codes(self, name: str) -> tuple[Tensor, Tensor]: ...

    def parameter(self, name: str) -> Tensor: ...

    def master(self, name: str) -> Tensor: ...


def alone(config: Config, activation: str) -> Config:
    """`config` for one process in fp32, with activations "int8", "e4m3" or "none"."""
    quantization = config.quantization.model_copy(update={"compute": "fp32", "activation": activation})
    return config.model_copy(update={"parallel": ParallelConfig(), "deepspeed": {}, "quantization": quantization})


@contextmanager
def world_of_one(config: Config) -> Iterator[Groups]:
    """Process groups of one process, left at the end; silences what megatron-core says to itself while building."""
    from dqt_dist.launch import Launch
    from dqt_dist.parallel.groups import finalize, initialize

    before = dict(os.environ)
    # DeepSpeed looks here for what its launcher sets.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore
    groups = initialize(config, Launch(0, 1, 0, 1, "export", "", 0))
    try:
        with warnings.catch_warnings():
            for note in BUILD_NOTES:
                warnings.filterwarnings("ignore", message=note)
            yield groups
    finally:
        finalize()
        # Nothing that this process starts later is to take itself for a rank of this world.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


@contextmanager
def trainer_model(weights: Weights, activation: str) -> Iterator[Logits]:
    """The model with the weights that are exported, rounded to the export's dtype. Makes and leaves a world of one."""
    from dqt_dist.layers.build import build_model
    from dqt_dist.parallel.megatron_device import cuda_or_cpu

    config = alone(weights.config, activation)
    with world_of_one(config) as groups:
        model_chunks = build_model(config, groups)
        fill(model_chunks, weights)
        model_chunks.eval()

        @torch.no_grad()
        def logits(tokens: Tensor) -> Tensor:
            tokens = tokens.to(groups.device)
            positions = torch.arange(tokens.shape[1], device=groups.device).expand_as(tokens)
            with cuda_or_cpu():
                return model_chunks[0](tokens, positions, None).float().cpu()

        yield logits


@torch.no_grad()
def fill(model_chunks: nn.ModuleList, weights: WeightSource) -> None:
    """Overwrites every weight of a model of one process by the exported values, a logical matrix at a time."""
    from dqt_dist.layers.low_bit_embedding import LowBitHead
    from dqt_dist.layers.parameters import low_bit_matrices, parameters

    for matrix in low_bit_matrices(model_chunks):
        assert matrix.layout is not None
        for index, logical in enumerate(matrix.layout.matrices):
            codes, matrix.scale[index] = weights.codes(logical.name)
            for part, row, local, count in matrix.layout.pieces(0, matrix.rows):
                if part == logical:
                    matrix.set_codes(codes[row : row + count].to(matrix.codes.device), local)
    for parameter in parameters(model_chunks):
        local_rows = parameter.tensor.view(parameter.layout.rows, parameter.layout.columns)
        for logical in parameter.layout.matrices:
            value = _trainer_value(weights, logical.name).view(logical.rows, logical.columns)
            for part, row, local, count in parameter.layout.pieces(0, parameter.layout.rows):
                if part == logical:
                    local_rows[local : local + count] = value[row : row + count]
    for module in model_chunks.modules():
        if isinstance(module, LowBitHead):
            # No export rounds the input of the head: engines keep it a float matrix.
            module.compute = replace(module.compute, activation_dtype=None)


def _trainer_value(weights: WeightSource, name: str) -> Tensor:
    """BitNet's float masters as they are, its forward makes the codes; everything else as it is exported."""
    if weights.method == "bitnet" and name in weights.linears:
        return weights.master(name)
    return weights.parameter(name)
