"""The tokenizer of a GGUF file: its keys, and an independent reading of them.

    tokenizer.ggml.model              "llama": llama.cpp's tokenizer for SentencePiece's byte-pair models
                                      "gpt2": its tokenizer for byte-level BPE
    .tokens .token_type               the pieces by ids
    .scores .add_space_prefix         llama: which pair is joined first; a space before the text
    .merges .pre                      gpt2: the same, by rank; the name of the pre-tokenizer
    .{bos,eos,unknown,padding}_token_id

llama.cpp's tokenizers differ from those of training in what `tokenizer_model.refuse` lists, and in one more thing: they
join letters to any token that has their text, marks included. The readings here do what llama.cpp does (llama-vocab.cpp
of version 0c1e570: tokenizer_st_partition, llm_tokenizer_spm_session, llm_tokenizer_bpe_session), so that verification
finds where this matters.
"""

from __future__ import annotations

import heapq
import re
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from dqt_dist.export.sentencepiece_model import SPACE, PieceKind, SentencePieceModel
from dqt_dist.export.tokenizer_json_model import BYTE_OF_LETTER, LLAMA3_PATTERN, WHOLE_WORDS_FIRST, TokenizerJsonModel
from dqt_dist.export.tokenizer_model import TokenizerModel

# llama.cpp changes the kinds of tokens with these texts, whatever the file says.
BECOME_CONTROL = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~["),
)
BECOME_USER_DEFINED = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def add_tokenizer(writer: Any, model: TokenizerModel, vocab_size: int) -> None:
    """Writes the keys; rows of the embedding that no piece has are unused tokens."""
    unused = vocab_size - model.num_pieces
    if isinstance(model, TokenizerJsonModel):
        assert model.pre_tokenizer is not None  # refused otherwise
        name, pre = "gpt2", model.pre_tokenizer
        texts, kinds = _json_tokens(model)
    else:
        name, pre = "llama", "default"
        texts, kinds = [piece.text for piece in model.pieces], [int(piece.kind) for piece in model.pieces]
    writer.add_tokenizer_model(name)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts + [f"[UNUSED{i}]" for i in range(unused)])
    if isinstance(model, TokenizerJsonModel):
        writer.add_token_merges([" ".join(pair) for pair in model.merges])
    else:
        writer.add_token_scores([piece.score for piece in model.pieces] + [0.0] * unused)
    writer.add_token_types(kinds + [int(PieceKind.UNUSED)] * unused)
    # Where the key is missing llama.cpp takes an id of its own. The mark of an end is what stands before each document
    # of the training text.
    begin, end = model.marks["bos"], model.marks["eos"]
    assert end is not None  # load_tokenizer asks for it
    writer.add_bos_token_id(end if begin is None else begin)
    writer.add_eos_token_id(end)
    for add, mark in ((writer.add_unk_token_id, "unk"), (writer.add_pad_token_id, "pad")):
        if (token_id := model.marks[mark]) is not None:
            add(token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if isinstance(model, SentencePieceModel):
        writer.add_add_space_prefix(model.add_dummy_prefix)


def _json_tokens(model: TokenizerJsonModel) -> tuple[list[str], list[int]]:
    """Texts and kinds of all ids."""

    def kind(token_id: int, piece: str | None) -> PieceKind:
        if piece is None:
            return PieceKind.UNUSED
        if token_id not in model.added:
            return PieceKind.NORMAL
        return PieceKind.CONTROL if model.added[token_id].special else PieceKind.USER_DEFINED

    texts = [f"[NONE{i}]" if piece is None else piece for i, piece in enumerate(model.pieces)]
    return texts, [int(kind(i, piece)) for i, piece in enumerate(model.pieces)]


def gguf_tokenizer(path: Path) -> GgufTokenizer:
    """The tokenizer that the keys of a file describe."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    kind = fields["tokenizer.ggml.model"].contents()
    return {"llama": SentencePieceGguf, "gpt2": ByteLevelGguf}[kind](fields)


class GgufTokenizer(ABC):
    """Text to ids by the keys of a file, as llama.cpp does it without special tokens."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields
        self.texts: list[str] = self.value("tokens")
        self.ids = {text: i for i, text in enumerate(self.texts)}
        kinds = map(_kind, self.texts, self.value("token_type"))
        apart = [text for text, kind in zip(self.texts, kinds, strict=True) if kind == PieceKind.USER_DEFINED]
        self._apart = sorted(apart, key=lambda text: len(text.encode()), reverse=True)

    def value(self, key: str) -> Any:
        return self._fields[f"tokenizer.ggml.{key}"].contents()

    def encode(self, text: str) -> list[int]:
        """Ids of the text. Raises KeyError for a byte without a token."""
        parts: list[str | int] = [text] if text else []
        # One user-defined token after another, not the longest at each place.
        for token in self._apart:
            parts = [new for part in parts for new in self._cut(part, token)]
        return self._encode_parts(parts)

    @abstractmethod
    def _encode_parts(self, parts: list[str | int]) -> list[int]:
        """Ids of texts, and of tokens that were cut out."""

    def _cut(self, part: str | int, token: str) -> list[str | int]:
        if isinstance(part, int):
            return [part]
        pieces = re.split(f"({re.escape(token)})", part)
        return [self.ids[token] if i % 2 else piece for i, piece in enumerate(pieces) if piece]


class SentencePieceGguf(GgufTokenizer):
    """The tokenizer "llama"."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self.scores: list[float] = self.value("scores")
        self.prefix = " " if self.value("add_space_prefix") else ""

    def _encode_parts(self, parts: list[str | int]) -> list[int]:
        found: list[int] = []
        prefix = self.prefix
        for part in parts:
            if isinstance(part, int):
                found.append(part)
                prefix = self.prefix
            else:
                found += self._join((prefix + part).replace(" ", SPACE))
                prefix = ""
        return found

    def _join(self, text: str) -> list[int]:
        """Joins the neighbours whose joined text has the best score, of equal ones the leftmost, until none is left."""
        symbols, after, before = list(text), list(range(1, len(text) + 1)), list(range(-1, len(text) - 1))
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < len(symbols) and (joined := symbols[left] + symbols[right]) in self.ids:
                heapq.heappush(queue, (-self.scores[self.ids[joined]], left, right, joined))

        for i in range(1, len(symbols)):
            offer(i - 1, i)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != joined:
                continue
            symbols[left], symbols[right] = joined, ""
            after[left] = after[right]
            if after[left] < len(symbols):
                before[after[left]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [i for symbol in symbols if symbol for i in self._symbol_ids(symbol)]

    def _symbol_ids(self, symbol: str) -> list[int]:
        if symbol in self.ids:
            return [self.ids[symbol]]
        return [self.ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]


class ByteLevelGguf(GgufTokenizer):
    """The tokenizer "gpt2"."""

    PATTERNS: ClassVar = {
        "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        "llama-bpe": LLAMA3_PATTERN,
    }

    def __init__(self, fields: dict[str, Any]) -> None:
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import Split

        super().__init__(fields)
        pre = self.value("pre")
        self.whole_words_first = pre in WHOLE_WORDS_FIRST
        self.words = Split(Regex(self.PATTERNS[pre]), "isolated")
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(self.value("merges"))}
        self.letters = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}

    def _encode_parts(self, parts: list[str | int]) -> list[int]:
        found: list[int] = []
        for part in parts:
            if isinstance(part, int):
                found.append(part)
                continue
            for word, _ in self.words.pre_tokenize_str(part):
                found += self._merge("".join(self.letters[byte] for byte in word.encode()))
        return found

    def _merge(self, word: str) -> list[int]:
        """Joins the pair of the lowest rank, of equal ones the leftmost, until none has a rank."""
        symbols = [word] if self.whole_words_first and word in self.ids else list(word)
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            at = min(range(len(pairs)), key=lambda i: self.ranks.get(pairs[i], len(self.ranks)))
            if pairs[at] not in self.ranks:
                break
            symbols[at : at + 2] = ["".join(pairs[at])]
        return [self.ids[symbol] for symbol in symbols]


def _kind(text: str, stored: int) -> PieceKind:
    if text in BECOME_USER_DEFINED:
        return PieceKind.USER_DEFINED
    return PieceKind.CONTROL if text in BECOME_CONTROL else PieceKind(stored)
