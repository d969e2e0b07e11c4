"""Bytes of tokens: they add up to the text, and text streamed token by token is the text."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dqt_dist.data.tokenizer import Tokenizer, load_tokenizer
from dqt_dist.export.token_bytes import ByteCounter, TextStream
from dqt_dist.export.tokenizer_model import read_tokenizer

# SentencePiece takes UTF-8, which has no lone surrogates, and reserves NUL and its own mark of a space.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_file)


def stream_of(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    return np.array([i for text in texts for i in (tokenizer.eod_id, *tokenizer.encode(text))])


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=3))
@example([" leading", "", "two  spaces \n\t"])
@example(["\U0001f600 \u4f60\u597d na\u00efve", "<s> </s> <0x41>"])
def test_bytes_of_tokens_add_up_to_the_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    counted = ByteCounter(tokenizer).count(stream_of(tokenizer, texts))
    assert counted == sum(len(text.encode()) for text in texts)


def test_a_tokenizer_may_put_nothing_before_a_text(tmp_path: Path) -> None:
    """Without the dummy prefix nothing is subtracted, and a space at the start belongs to the text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab ab abc"] * 50),
        model_writer=model,
        vocab_size=270,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "plain.model").write_bytes(model.getvalue())
    plain = load_tokenizer(tmp_path / "plain.model")
    assert ByteCounter(plain).count(stream_of(plain, [" ab", "abc"])) == 6
    stream = TextStream(plain)
    assert "".join(stream.put(i) for i in plain.encode(" ab")) == " ab"


@settings(max_examples=60, deadline=None)
@given(text=TEXT)
@example(" leading")
@example("\U0001f600 \u4f60\u597d na\u00efve")
def test_streamed_text_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    stream = TextStream(tokenizer)
    parts = [stream.put(i) for i in tokenizer.encode(text)]
    assert "".join(parts) + stream.end() == text


def test_a_character_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\U0001f600b")
    stream = TextStream(tokenizer)
    assert [stream.put(i) for i in ids][-5:] == ["", "", "", "\U0001f600", "b"]
    cut = TextStream(tokenizer)
    assert [cut.put(i) for i in ids[:-2]][-3:] == ["", "", ""] and cut.end() == "\ufffd"


def test_marks_and_rows_beyond_the_pieces_have_no_text(tokenizer: Tokenizer) -> None:
    """A vocabulary may have more rows than the tokenizer has pieces, and a model may choose such rows."""
    stream = TextStream(tokenizer)
    assert [stream.put(i) for i in (0, 1, 2, tokenizer.vocab_size)] == [""] * 4
    assert read_tokenizer(tokenizer).piece_bytes()[:4] == [b"", b"", b"", b"\0"]
