"""Loss, perplexity and bits per byte of a text, by a sliding window.

The text is one stream of token ids in which every document follows an end-of-document mark, as in training:

    </s> d o c u m e n t </s> d o c u m e n t          every token after the first is scored, exactly once

A window is a sequence of at most `length` tokens that the model reads. The first window scores all of its predictions.
Each next window ends `stride` tokens later and scores its last `stride` predictions, each made from at least length -
stride + 1 tokens. The default, stride = length, reads every token once, as lm-eval's rolling windows do. A smaller
stride costs length / stride times as much, and no prediction after the first window is made from few tokens.

    loss            mean of -ln p(token), in nats per token          perplexity = exp(loss)
    bits_per_byte   sum of -log2 p(token) / bytes of the text in UTF-8: comparable between tokenizers
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dqt_dist.data.indexed import check_indexed, quiet_megatron_import
from dqt_dist.data.ingest import local_source, read_documents
from dqt_dist.data.tokenizer import Tokenizer
from dqt_dist.errors import UserError
from dqt_dist.export.token_bytes import ByteCounter
from dqt_dist.inference.language_model import LanguageModel
from dqt_dist.progress_line import ProgressLine


@dataclass(frozen=True)
class Figures:
    """What an evaluation finds."""

    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float
    tokens: int
    """Tokens that were scored."""
    text_bytes: int
    """Bytes of text that they are; end-of-document marks are scored and have none."""
    window: int
    stride: int


@dataclass(frozen=True)
class Window:
    """Reads stream[start:stop] and scores its last `scored` predictions.

    The scored tokens are stream[stop - scored + 1 : stop + 1].
    """

    start: int
    stop: int
    scored: int


def windows(num_scored: int, length: int, stride: int) -> Iterator[Window]:
    """The windows over a stream of num_scored + 1 tokens; 1 <= stride <= length."""
    done = min(length, num_scored)
    yield Window(0, done, done)
    while done < num_scored:
        scored = min(stride, num_scored - done)
        done += scored
        yield Window(done - length, done, scored)


# ---- the stream ----


def read_stream(data: str, tokenizer: Tokenizer, vocab_size: int, text_key: str, max_tokens: int | None) -> np.ndarray:
    """Ids [scored tokens + 1] of a text file or of a prepared prefix, at most max_tokens of them scored.

    The mark that ends the last document of prepared data stands before the first one instead, so that a text and its
    preparation are the same stream. Raises UserError for a missing or damaged file, and for one without text.
    """
    if os.path.isfile(f"{data}.idx") or os.path.isfile(f"{data}.bin"):
        ids = _prepared(data, tokenizer, vocab_size)
    else:
        ids = _encoded(data, tokenizer, text_key, max_tokens)
    if len(ids) and ids[-1] == tokenizer.eod_id:
        ids = ids[:-1]
    ids = ids[:max_tokens]
    if len(ids) == 0:
        raise UserError(f"--data {data}: holds no text")
    if wrong := [i for i in (ids.min(), ids.max()) if not 0 <= i < tokenizer.vocab_size]:
        raise UserError(f"--data {data}: holds token id {wrong[0]}, the tokenizer has {tokenizer.vocab_size} pieces")
    return np.concatenate([np.array([tokenizer.eod_id], dtype=np.int32), ids])


def _prepared(prefix: str, tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    check_indexed(prefix, where="--data", vocab_size=vocab_size, tokenizer=tokenizer)
    with quiet_megatron_import():
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    # Documents lie one after another, each with its mark: the file is the stream.
    return np.memmap(f"{prefix}.bin", dtype=IndexedDataset(prefix).index.dtype, mode="r")


def _encoded(data: str, tokenizer: Tokenizer, text_key: str, max_tokens: int | None) -> np.ndarray:
    if not Path(data).exists():
        raise UserError(f"--data {data}: no such file, nor {data}.bin and {data}.idx")
    parts, count = [], 0
    try:
        documents = read_documents(local_source([data], text_key))
        for text in ProgressLine(documents, "tokens", unit=" documents"):
            parts.append(np.array([*tokenizer.encode(text), tokenizer.eod_id], dtype=np.int32))
            count += len(parts[-1])
            if max_tokens is not None and count > max_tokens:
                break
    except UserError as error:  # the reader speaks to the user of another command
        raise UserError(str(error).replace("--input", "--data")) from error
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


# ---- the score ----


def evaluate(
    language_model: LanguageModel, stream: np.ndarray, window: int | None, stride: int | None, batch_size: int
) -> Figures:
    """Figures of `stream` (read_stream). window: default the model's context; stride: default the window.

    Raises UserError for a window beyond the context and a stride beyond the window.
    """
    length = window or language_model.context_length
    if length > language_model.context_length:
        raise UserError(
            f"--window {length}: the model was trained on {language_model.context_length} tokens; give at most so many"
        )
    step = stride or length
    if step > length:
        raise UserError(
            f"--stride {step}: larger than the window of {length}, tokens between two windows would be left out"
        )
    num_scored = len(stream) - 1
    nats = 0.0
    with (
        torch.compiler.set_stance("force_eager"),  # see quiet_transformers
        ProgressLine(desc="evaluate", total=num_scored, unit=" tokens") as progress,
    ):
        for batch in _batches(windows(num_scored, length, step), batch_size):
            nats += _score(language_model, stream, batch)
            progress.update(sum(w.scored for w in batch))
    loss, text_bytes = nats / num_scored, ByteCounter(language_model.tokenizer).count(stream)
    if text_bytes == 0:
        raise UserError("--data: the scored tokens hold no text")
    perplexity = math.exp(loss)
    return Figures(loss, perplexity, nats / math.log(2) / text_bytes, num_scored, text_bytes, length, step)


def _batches(all_windows: Iterator[Window], batch_size: int) -> Iterator[list[Window]]:
    """Neighbouring windows of one shape, at most batch_size together."""
    for _, alike in groupby(all_windows, key=lambda w: (w.stop - w.start, w.scored)):
        same = list(alike)
        yield from (same[i : i + batch_size] for i in range(0, len(same), batch_size))


@torch.no_grad()
def _score(language_model: LanguageModel, stream: np.ndarray, batch: list[Window]) -> float:
    """Sum of -ln p over the scored tokens of windows of one shape."""
    scored = batch[0].scored

    def ids(starts_and_stops: list[tuple[int, int]]) -> Tensor:
        rows = np.stack([stream[start:stop] for start, stop in starts_and_stops]).astype(np.int64)
        return torch.from_numpy(rows).to(language_model.device)

    read = ids([(w.start, w.stop) for w in batch])
    targets = ids([(w.stop - scored + 1, w.stop + 1) for w in batch])
    logits = language_model.model(read, use_cache=False, logits_to_keep=scored).logits
    losses = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return float(losses.double().sum())
