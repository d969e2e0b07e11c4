"""What a tokenizer.json says of itself, for exports.

Hugging Face formats get the file. GGUF gets byte-level BPE with one of the pre-tokenizers that llama.cpp has under a
name and that are known here to the letter:

    gpt-2        GPT-2's pattern, which the library has built in
    llama-bpe    Llama 3's pattern; whole words before merges

A pre-tokenizer cuts a text into words before merges; llama.cpp has its own code for each pattern.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from dqt_dist.data.tokenizer_json import SPACE, JsonTokenizer
from dqt_dist.export.sentencepiece_model import Limits, overlaps, some
from dqt_dist.json_files import parse_json

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
}
"""By llama.cpp's names, as the library writes them, without `trim_offsets`, which is not about ids."""
WHOLE_WORDS_FIRST = ("llama-bpe",)
"""Pre-tokenizers for which llama.cpp takes a word of the vocabulary as it is, without merges."""
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF_LETTER = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
"""GPT-2's letters for bytes: printable ones of Latin-1 stand for themselves, U+0100 and on for the rest."""


@dataclass(frozen=True)
class AddedToken:
    """An entry of added_tokens: a piece that is looked for before all else, or special, and never found in a text."""

    text: str
    special: bool
    changed: bool
    """Whether it takes spaces beside it, or stands for whole words alone."""


@dataclass(frozen=True)
class TokenizerJsonModel:
    """One tokenizer.json, read."""

    library: ClassVar = "the tokenizer.json"
    engine: ClassVar = "llama.cpp's tokenizer for byte-level BPE"
    path: Path
    form: dict[str, Any]
    """The file, in the form of tokenizer_json.py."""
    full: dict[str, Any]
    """The same as the library writes it, with every field."""
    pieces: list[str | None]
    """In the order of ids; None where an id has no piece."""
    added: dict[int, AddedToken]
    """By ids."""
    eos_id: int
    unk_id: int | None
    byte_level: bool
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]

    @property
    def num_pieces(self) -> int:
        """Ids are below it."""
        return len(self.pieces)

    @property
    def marks(self) -> dict[str, int | None]:
        """Ids of the marks by the names that Hugging Face gives them. Training puts no mark before a text."""
        return {"bos": None, "eos": self.eos_id, "unk": self.unk_id, "pad": None}

    @property
    def named(self) -> list[str]:
        """Added tokens, as a text may have them."""
        return [token.text for token in self.added.values()]

    @property
    def never_cut(self) -> list[str]:
        """Added tokens that a text can have."""
        return [token.text for token in self.added.values() if not token.special]

    @cached_property
    def space_first(self) -> bool:
        """Whether encoding puts a space before each text."""
        pieces = self.piece_bytes()
        return b"".join(pieces[i] for i in self.encode("a")).startswith(b" ")

    @property
    def space_added(self) -> bool:
        return self.space_first

    def piece_bytes(self) -> list[bytes]:
        """The bytes of text that each id stands for."""
        return [self._bytes_of(i, piece) for i, piece in enumerate(self.pieces)]

    def _bytes_of(self, token_id: int, piece: str | None) -> bytes:
        if piece is None or ((added := self.added.get(token_id)) is not None and added.special):
            return b""
        if self.byte_level:
            known = all(letter in BYTE_OF_LETTER for letter in piece)
            return bytes(BYTE_OF_LETTER[letter] for letter in piece) if known else piece.encode()
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()

    @property
    def pre_tokenizer(self) -> str | None:
        """llama.cpp's name of the pre-tokenizer; None for one that is not known."""
        found = self.full["pre_tokenizer"] or {}
        steps = found.get("pretokenizers", [found])
        about_ids = [{name: value for name, value in step.items() if name != "trim_offsets"} for step in steps]
        return next((name for name, known in PRE_TOKENIZERS.items() if known == about_ids), None)

    @property
    def merges(self) -> list[tuple[str, str]]:
        """Of byte-level BPE, best first."""
        return [(first, second) for first, second in self.full["model"]["merges"]]


def read_model(tokenizer: JsonTokenizer) -> TokenizerJsonModel:
    """Reads a loaded tokenizer.json."""
    added = {
        token_id: AddedToken(token.content, token.special, token.lstrip or token.rstrip or token.single_word)
        for token_id, token in sorted(tokenizer.fast.get_added_tokens_decoder().items())
    }
    return TokenizerJsonModel(
        path=tokenizer.path,
        form=tokenizer.form,
        full=parse_json(tokenizer.fast.to_str()),
        pieces=[tokenizer.fast.id_to_token(i) for i in range(tokenizer.vocab_size)],
        added=added,
        eos_id=tokenizer.eod_id,
        unk_id=tokenizer.unknown_id,
        byte_level=tokenizer.byte_level,
        encode=tokenizer.encode,
        decode=tokenizer.decode,
    )


def gguf_limits(model: TokenizerJsonModel) -> Limits:
    """Properties that a GGUF file cannot express."""
    rules = model.full["model"]
    if rules["type"] != "BPE":
        return [(True, f"its model is {rules['type']}, not byte-level BPE")]
    if not model.byte_level:
        return [(True, "it is not byte-level BPE (the SentencePiece .model that it was made from may fit)")]
    if model.pre_tokenizer is None:
        known = " and ".join(f"{name!r}" for name in PRE_TOKENIZERS)
        return [(True, f"its pre-tokenizer is none of those known by llama.cpp's names {known}")]
    changed = [token.text for token in model.added.values() if token.changed and not token.special]
    overlapping = [shared for first, second, shared in overlaps(model.never_cut) if len(second) >= len(first)]
    return [
        (model.full["normalizer"] is not None, "it has a normalizer"),
        (
            bool(rules["continuing_subword_prefix"] or rules["end_of_word_suffix"]),
            "its pieces have affixes",
        ),
        (not BYTE_OF_LETTER.keys() <= rules["vocab"].keys(), "some bytes have no piece"),
        (bool(changed), f"added tokens take spaces beside them, or are whole words: {some(changed)}"),
        (bool(overlapping), f"added tokens overlap: {some(overlapping)}"),
        (
            rules["ignore_merges"] != (model.pre_tokenizer in WHOLE_WORDS_FIRST) and not _merges_reach_all(model),
            f"ignore_merges is {str(rules['ignore_merges']).lower()}, and merges do not make all of its words",
        ),
    ]


def _merges_reach_all(model: TokenizerJsonModel) -> bool:
    """Whether merges make each word of the vocabulary, so that it does not matter if it is taken before them."""
    from tokenizers.models import BPE

    vocabulary: dict[str, int] = model.full["model"]["vocab"]
    merged = BPE(vocabulary, model.merges)
    words = (word for word, token_id in vocabulary.items() if token_id not in model.added)
    return all(len(merged.tokenize(word)) == 1 for word in words)
