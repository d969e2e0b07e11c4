"""megatron-core's GPTModel with a loss that never holds the logits in fp32."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.autograd.function import once_differentiable

from dqt_dist.kernels.cross_entropy import gradient_, statistics
from dqt_dist.parallel.collectives import Group, reduce_in_place


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """logits [s, b, vocabulary / tp], labels int64 [s, b] -> loss fp32 [s, b].

    The backward overwrites the logits with their gradient. This is safe because the output layer that made the logits
    does not need them in its backward, and nothing else uses them. Autograd refuses a second backward through the same
    graph, because a saved tensor has changed.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, group: Group) -> Tensor:
        flat, local = logits.view(-1, logits.shape[-1]), labels.reshape(-1)
        if group.size() > 1:
            local = local - group.rank() * logits.shape[-1]
        largest, sum_exp, label_logit = statistics(flat, local)
        if group.size() > 1:
            local_largest = largest.clone()
            reduce_in_place(largest, group, "activations", op=dist.ReduceOp.MAX)
            sums = torch.stack([sum_exp * torch.exp(local_largest - largest), label_logit])
            reduce_in_place(sums, group, "activations")
            sum_exp, label_logit = sums
        log_sum = largest + torch.log(sum_exp)
        ctx.save_for_backward(logits, local, log_sum)
        return (log_sum - label_logit).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, log_sum = ctx.saved_tensors
        gradient_(logits.view(-1, logits.shape[-1]), labels, log_sum, grad.reshape(-1).float())
        return logits, None, None


class LlamaModel(GPTModel):
    """One model chunk: the part of the model that one (virtual) pipeline stage holds."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss fp32 [b, s] of labels [b, s] and logits [s, b, vocabulary / tp]."""
        labels = labels.transpose(0, 1).contiguous()
        loss = _VocabParallelCrossEntropy.apply(logits.contiguous(), labels, self.pg_collection.tp)
        return loss.transpose(0, 1).contiguous()
