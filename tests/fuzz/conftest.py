"""Good input, made once: a tokenizer, indexed data of it, and a checkpoint. Tests damage copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dqt_dist.data.indexed import EncodedBatch, IndexedWriter, token_dtype
from dqt_dist.data.tokenizer import load_tokenizer, train_tokenizer
from tests.fuzz.damage import VOCAB_SIZE

TEXTS = [f"{number} {word} ends\nthe quick brown fox" for number in range(12) for word in ("alpha", "beta", "gamma")]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.model and train.{bin,idx,json}, as tools/prepare_data.py writes them."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "tokenizer.model").write_bytes(train_tokenizer(TEXTS, VOCAB_SIZE))
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    writer = IndexedWriter(folder / "train", tokenizer, request="fuzz")
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        document = np.array([*ids, tokenizer.eod_id], token_dtype(VOCAB_SIZE))
        writer.add_batch(EncodedBatch(document, [len(document)], [len(text)], [len(text.split())], [False]))
    writer.finish()
    return folder
