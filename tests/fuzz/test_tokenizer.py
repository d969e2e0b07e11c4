"""Any tokenizer file: it encodes and decodes within its vocabulary, or it is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from dqt_dist.data.tokenizer import load_tokenizer
from dqt_dist.export.tokenizer_model import read_tokenizer
from tests.fuzz.damage import budget, changed_bytes, held

TEXT = "the quick\n\n brown w\u00f6rld \u6f22\u5b57 \uff46\uff55 \0 \u2581"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "tokenizer.model"


def use(path: Path) -> None:
    """All that training, preparing, generating and exporting ask of a tokenizer."""
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(TEXT)
    everything = range(tokenizer.vocab_size)
    assert all(token_id in everything for token_id in (*ids, tokenizer.eod_id, tokenizer.unknown_id))
    assert isinstance(tokenizer.decode(ids), str) and tokenizer.decode_batch(tokenizer.encode_batch([TEXT, ""]))
    for token_id in everything:
        assert tokenizer.piece(token_id) is not None and tokenizer.decode([token_id]) is not None
    assert len(read_tokenizer(tokenizer).piece_bytes()) == tokenizer.vocab_size


def names(path: Path) -> Any:
    return lambda message: message.startswith(f"tokenizer {path}: ")


@budget(150, share=0.2)
@given(data=st.data())
def test_whatever_the_bytes(prepared: Path, path: Path, data: Any) -> None:
    path.write_bytes(data.draw(changed_bytes((prepared / "tokenizer.model").read_bytes())))
    held(lambda: use(path), names(path))


NUMBERS = st.sampled_from([-(2**31), -1, 0, 1, 2, 3, 5, 299, 300, 2**31 - 1])
FIELDS = {
    "unk_id": NUMBERS,
    "bos_id": NUMBERS,
    "eos_id": NUMBERS,
    "pad_id": NUMBERS,
    "vocab_size": NUMBERS,
    "eos_piece": st.sampled_from(["", "<s>", "the", "<0x41>"]),
    "model_type": st.sampled_from([1, 2, 3, 4]),
    "byte_fallback": st.booleans(),
}
PIECES = {
    "piece": st.sampled_from(["", "\0", "</s>", "<0x41>", "<0x", "\u2581", "x" * 10000]),
    "score": st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38]),
    "type": st.sampled_from([1, 2, 3, 4, 5, 6]),
}


@budget(150, share=0.2)
@given(
    fields=st.lists(
        st.sampled_from(sorted(FIELDS)).flatmap(lambda name: FIELDS[name].map(lambda v: (name, v))), max_size=2
    ),
    pieces=st.lists(
        st.tuples(
            st.integers(0, 6) | st.integers(0, 299),
            st.sampled_from(sorted(PIECES)).flatmap(lambda name: PIECES[name].map(lambda v: (name, v))),
        ),
        max_size=2,
    ),
    charsmap=st.none() | st.binary(max_size=64),
    left=st.none() | st.integers(0, 300),
)
def test_whatever_the_model_says(
    prepared: Path, path: Path, fields: list, pieces: list, charsmap: bytes | None, left: int | None
) -> None:
    """Well-formed files with other marks, pieces, kinds, scores and rules."""
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString((prepared / "tokenizer.model").read_bytes())
    for name, value in fields:
        setattr(model.trainer_spec, name, value)
    for place, (name, value) in pieces:
        setattr(model.pieces[place], name, value)
    if charsmap is not None:
        model.normalizer_spec.precompiled_charsmap = charsmap
    del model.pieces[left if left is not None else 300 :]
    path.write_bytes(model.SerializeToString())
    held(lambda: use(path), names(path))
