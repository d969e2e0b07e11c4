"""Perplexity of the exported weights beside that of the trained codes, for `--bits ternary` and `--weights latent`.

The trainer's own model is measured on windows of the run's validation data, or on a short built-in text where these
files are missing. The figures show roughly what the difference costs. tools/evaluate.py measures exactly, with a
sliding window.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dqt_dist.config import Config
from dqt_dist.data.tokenizer import Tokenizer
from dqt_dist.export.text import SAMPLE
from dqt_dist.export.trainer_model import trainer_model
from dqt_dist.export.weights import Weights

MAX_WINDOWS = 16


def held_out_windows(config: Config, tokenizer: Tokenizer) -> tuple[Tensor, str]:
    """Token ids [windows, seq_length + 1] (shorter for the built-in text), and where they are from."""
    length = config.model.seq_length + 1
    path = config.data.valid[0].path if config.data.valid else None
    if path is not None and Path(f"{path}.bin").is_file():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        documents, tokens = IndexedDataset(path), np.zeros(0, dtype=np.int64)
        for index in range(len(documents)):
            if len(tokens) >= MAX_WINDOWS * length:
                break
            tokens = np.concatenate([tokens, np.asarray(documents[index], np.int64)])
        if windows := min(MAX_WINDOWS, len(tokens) // length):
            return torch.from_numpy(tokens[: windows * length]).view(windows, length), f"{windows} windows of {path}"
    return torch.tensor([tokenizer.encode(SAMPLE)[:length]]), "the built-in text"


def perplexity(weights: Weights, windows: Tensor) -> float:
    """exp of the mean loss per token, in fp32 and with the activations of the run."""
    with trainer_model(weights, weights.config.quantization.activation) as trainer:
        losses = [
            torch.nn.functional.cross_entropy(trainer(window[None, :-1])[0], window[1:], reduction="none")
            for window in windows
        ]
    return math.exp(float(torch.cat(losses).mean()))


def compare_with_trained(weights: Weights, tokenizer: Tokenizer) -> tuple[dict[str, float], str]:
    """Figures of the trained codes and of the exported weights, and a line that tells them."""
    windows, where = held_out_windows(weights.config, tokenizer)
    bits = weights.stored_grid.bits
    trained = perplexity(Weights(weights.reader, weights.dtype), windows)
    exported = perplexity(weights, windows)
    codes = bits if isinstance(bits, str) else f"{bits}-bit"
    kind = "latent" if weights.of_latents else "ternary"
    line = f"perplexity on {where}: {trained:.4g} with the {codes} weights, {exported:.4g} with {kind} ones"
    names = (f"perplexity_with_{name}_weights" for name in (codes.replace("-", "_"), kind))
    return dict(zip(names, (trained, exported), strict=True)), line
