"""Continues a prompt token by token, with a KV cache, and hands out the text as it comes.

transformers' `generate` does the work: temperature, then top-k, then top-p (arXiv 1904.09751), one draw per token.
The temperature is applied here, in fp64 and to differences from the best logit, so that any temperature above 0 is
right. Rows of the embedding that the tokenizer has no piece for are never drawn.
The same seed gives the same text on the same kind of device. Temperature 0 takes the best token and draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dqt_dist.errors import UserError
from dqt_dist.export.token_bytes import TextStream
from dqt_dist.inference.language_model import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.8
    """Divides the logits; 0 for the best token always."""
    top_p: float = 0.95
    """Draw from the fewest tokens that have this much probability together."""
    top_k: int | None = None
    """Draw from so many tokens at most."""
    seed: int = 0
    max_tokens: int = 128
    """Of the continuation, which also ends with a document or with the context."""


class _Listener:
    """What transformers calls a streamer: gets the prompt, then each token."""

    def __init__(self, text: TextStream, write: Callable[[str], None]) -> None:
        self.text, self.write = text, write

    def put(self, tokens: Tensor) -> None:
        for token in tokens.flatten().tolist():
            self.write(self.text.put(token))

    def end(self) -> None:
        self.write(self.text.end())


def encode_prompt(language_model: LanguageModel, prompt: str) -> list[int]:
    """Ids of the prompt, or the end-of-document mark for an empty one.

    Raises UserError when the prompt fills the context.
    """
    tokenizer = language_model.tokenizer
    ids = tokenizer.encode(prompt.encode("utf-8", "replace").decode("utf-8")) or [tokenizer.eod_id]
    if len(ids) >= language_model.context_length:
        raise UserError(
            f"--prompt: {len(ids)} tokens, the model's context has {language_model.context_length}; "
            "nothing can follow, shorten it"
        )
    return ids


@torch.no_grad()
def generate(language_model: LanguageModel, prompt: str, sampling: Sampling, write: Callable[[str], None]) -> list[int]:
    """Ids of the continuation, with </s> if the model ended the document.

    `write` gets the text of prompt and continuation, piece by piece.
    """
    ids = encode_prompt(language_model, prompt)
    draw: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        # top_k 0 is off; left out it would be 50.
        draw = {"do_sample": True, "temperature": 1.0, "top_p": sampling.top_p, "top_k": sampling.top_k or 0}
    num_pieces = language_model.tokenizer.vocab_size

    def scores_to_draw_from(_: Tensor, scores: Tensor) -> Tensor:
        """scores [batch, vocabulary] -> fp32, same shape; runs before top-k and top-p."""
        scores = scores.double()
        scores[:, num_pieces:] = -torch.inf
        if sampling.temperature > 0:
            scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature
        return scores.float()

    tokens = torch.tensor([ids], device=language_model.device)
    end = language_model.tokenizer.eod_id
    torch.manual_seed(sampling.seed)
    with torch.compiler.set_stance("force_eager"):  # see quiet_transformers
        found = language_model.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=min(sampling.max_tokens, language_model.context_length - len(ids)),
            eos_token_id=end,
            pad_token_id=end,
            use_cache=True,
            logits_processor=[scores_to_draw_from],
            streamer=_Listener(TextStream(language_model.tokenizer), write),
            **draw,
        )
    return found[0, len(ids) :].tolist()
