"""The bytes of UTF-8 text that each token id stands for: for figures per byte, and for text that is shown at once.

    piece          bytes
    U+2581 t h e   " the"       SentencePiece writes a space as U+2581
    <0xE6>         E6           byte fallback: a character outside the vocabulary is one piece per byte
    U+0120 t h e   " the"       byte level: U+0120 is the letter of the byte 20
    <s> </s>       none

SentencePiece puts one space before a text (or after it, if the model says so), and so may a tokenizer.json. The space
is no part of the text: each document has one byte too many.
"""

from __future__ import annotations

import codecs

import numpy as np

from dqt_dist.data.tokenizer import Tokenizer
from dqt_dist.export.tokenizer_model import read_tokenizer


class ByteCounter:
    """Counts the bytes of text that lie in a stream of documents, each after an end-of-document mark."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eod_id = tokenizer.eod_id
        model = read_tokenizer(tokenizer)
        pieces = model.piece_bytes()
        self.lengths = np.array([len(piece) for piece in pieces])
        # No space is put before a piece that a tokenizer.json looks for before all else.
        self.added = np.array([model.space_added and (piece[:1] == b" " or not model.space_first) for piece in pieces])

    def count(self, stream: np.ndarray) -> int:
        """Bytes of text of `stream`, ids [tokens], whose first entry is a mark."""
        is_mark = stream == self.eod_id
        first_of_document = stream[1:][is_mark[:-1] & ~is_mark[1:]]
        return int(self.lengths[stream].sum()) - int(self.added[first_of_document].sum())


class TextStream:
    """Turns ids into text as they come. A character of several byte pieces appears with its last one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        model = read_tokenizer(tokenizer)
        self._pieces = model.piece_bytes()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._skip = model.space_first

    def put(self, token_id: int) -> str:
        """The text that this id completes, often its own, sometimes none; ids beyond the tokenizer's have none."""
        data = self._pieces[token_id] if token_id < len(self._pieces) else b""
        if data:
            data, self._skip = data.removeprefix(b" ") if self._skip else data, False
        return self._decoder.decode(data)

    def end(self) -> str:
        """U+FFFD for a character that was begun and not completed."""
        return self._decoder.decode(b"", final=True)
