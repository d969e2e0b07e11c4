"""RMSNorm for the layer spec: one over a replicated width, one over a width that tensor parallelism has split.

    y = x / sqrt(mean(x^2) + eps) * weight

Megatron's own torch norm refuses sequence parallelism. Under it each rank normalises other tokens with the same weight, so
the weight's gradient is a sum over the TP group; it is taken in the backward itself (`sum_gradient`), which leaves nothing
for the engine to remember after it.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from dqt_dist.parallel.collectives import Group, sum_gradient, sum_partials


class RMSNorm(nn.Module):
    """Norm of [..., hidden_size], weight replicated over TP; the signature is the one the layer spec calls."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.group = parallel_state.get_tensor_model_parallel_group() if config.sequence_parallel else None
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight = sum_gradient(self.weight, self.group) if self.group is not None else self.weight
        # A view of its own: where the norm is made of several operations their gradients are then added up before they meet the
        # residual's, in the same order whether or not ZeRO stage 3 has put nodes of its own around the module.
        return nn.functional.rms_norm(x.view_as(x), self.weight.shape, weight, self.eps)


class ParallelRMSNorm(nn.Module):
    """Norm over a width of which each TP rank holds a slice [..., hidden_size / tp]: sums of squares are all-reduced."""

    def __init__(self, config: TransformerConfig, hidden_size: int, group: Group) -> None:
        super().__init__()
        self.eps, self.group, self.hidden_size = config.layernorm_epsilon, group, hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size // group.size(), dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        # In fp64 the way the width is divided moves the sum by 1e-16 of itself, so that its fp32 value, and with it the int8
        # activation that follows, is the same at every TP degree.
        square_sum = sum_partials(wide.square().sum(dim=-1, keepdim=True, dtype=torch.float64), self.group).float()
        normed = wide * torch.rsqrt(square_sum / self.hidden_size + self.eps)
        return normed.to(x.dtype) * self.weight
