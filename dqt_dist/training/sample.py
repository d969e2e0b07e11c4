"""A short continuation of a prompt by the model in training, in whatever layout it runs.

Each token is one forward pass of the pipeline over the whole window, padded to the training length: slow and simple, meant for
the few dozen tokens of a report. The draws are a function of the seed, so the sample is the same for the same weights.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from dqt_dist.config import Config
from dqt_dist.data.tokenizer import Tokenizer
from dqt_dist.parallel import megatron_cpu
from dqt_dist.parallel.groups import Groups

# Cool, so that the sample of a short run is made of words rather than of word pieces.
TEMPERATURE = 0.5
TOP_P = 0.8


def nucleus(logits: Tensor, generator: torch.Generator) -> int:
    """One token from logits [vocabulary] by temperature and top-p (arXiv 1904.09751)."""
    probabilities, order = torch.softmax(logits.double() / TEMPERATURE, dim=-1).sort(descending=True)
    probabilities[probabilities.cumsum(0) - probabilities > TOP_P] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def generate(chunks: nn.ModuleList, tokenizer: Tokenizer, config: Config, groups: Groups) -> str:
    """The prompt of the config and its continuation as text. A collective call; every rank returns the same."""
    chunks.eval()
    generator = torch.Generator().manual_seed(config.training.seed)
    window = config.model.seq_length
    tokens = tokenizer.encode(config.training.sample_prompt or "")[-window:] or [tokenizer.eod_id]
    for _ in range(config.training.sample_tokens):
        context = tokens[-window:]
        logits = _last_logits(chunks, context, config, groups)
        next_token = torch.zeros(1, dtype=torch.int64)
        if logits is not None:
            next_token[0] = nucleus(logits.cpu(), generator)
        # Only last-stage ranks drew, all of them the same; the others hold 0.
        dist.all_reduce(next_token, op=dist.ReduceOp.MAX)
        tokens.append(int(next_token))
        if tokens[-1] == tokenizer.eod_id:
            break
    return tokenizer.decode(tokens)


def _last_logits(chunks: nn.ModuleList, context: list[int], config: Config, groups: Groups) -> Tensor | None:
    """Logits [vocabulary] after the last token of `context`; None where the last pipeline stage is not."""
    padded = torch.zeros(1, config.model.seq_length, dtype=torch.int64, device=groups.device)
    padded[0, : len(context)] = torch.tensor(context)
    position_ids = torch.arange(padded.shape[1], device=groups.device)[None]

    def forward(_, model: nn.Module) -> tuple[Tensor, object]:
        return model(padded, position_ids, None), lambda output, non_loss_data: output

    with megatron_cpu.cuda_or_cpu():
        outputs: list[Tensor] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[None for _ in chunks],
            model=list(chunks),
            num_microbatches=1,
            seq_length=config.model.seq_length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not groups.is_last_stage:
        return None
    # GPTModel gives [batch, sequence, vocabulary / tp].
    return gather_from_tensor_model_parallel_region(
        outputs[0][0, len(context) - 1 : len(context)], group=groups.tensor
    )[0]
