"""RMSNorm for the layer spec: one over a replicated width, one over a width that tensor parallelism splits.

    y = x / sqrt(mean(x^2) + eps) * weight

Megatron's own torch norm refuses sequence parallelism. Under sequence parallelism each rank normalises different tokens
with the same weight, so the weight's gradient is a sum over the TP group. The backward itself takes this sum
(`sum_gradient`), so the engine has nothing to add after the backward.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from dqt_dist.parallel.collectives import Group, sum_gradient, sum_partials


class RMSNorm(nn.Module):
    """Norm of [..., hidden_size] with a weight that is replicated over TP. The layer spec fixes the signature."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.group = parallel_state.get_tensor_model_parallel_group() if config.sequence_parallel else None
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight = sum_gradient(self.weight, self.group) if self.group is not None else self.weight
        # The view fixes the order in which gradients are added up. Where the norm consists of several operations, their
        # gradients are added up first, and then the gradient of the residual is added. Without the view the order would
        # change with ZeRO stage 3, which puts autograd nodes around the module.
        return nn.functional.rms_norm(x.view_as(x), self.weight.shape, weight, self.eps)


class ParallelRMSNorm(nn.Module):
    """Norm over a width of which a TP rank holds [..., hidden_size / tp]. Sums of squares are all-reduced."""

    def __init__(self, config: TransformerConfig, hidden_size: int, group: Group) -> None:
        super().__init__()
        self.eps, self.group, self.hidden_size = config.layernorm_epsilon, group, hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size // group.size(), dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        x_fp32 = x.float()
        # In fp64 the division of the width over ranks changes the sum by 1e-16 of its value. The fp32 value of the sum,
        # and the int8 activation that follows, are then the same at every TP degree.
        square_sum = sum_partials(x_fp32.square().sum(dim=-1, keepdim=True, dtype=torch.float64), self.group).float()
        normed = x_fp32 * torch.rsqrt(square_sum / self.hidden_size + self.eps)
        return normed.to(x.dtype) * self.weight
