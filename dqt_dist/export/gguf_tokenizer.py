"""The tokenizer of a GGUF file: its keys, and an independent reading of them.

    tokenizer.ggml.model              "llama": llama.cpp's tokenizer for SentencePiece's byte-pair models
    .tokens .scores .token_type       the pieces by ids
    .add_space_prefix                 a space before the text
    .{bos,eos,unknown,padding}_token_id

llama.cpp's tokenizer differs from SentencePiece in what `sentencepiece_model.refuse` lists, and in one more thing: it
joins letters to any token that has their text, marks included. `GgufTokenizer` does what llama.cpp does
(llama-vocab.cpp of version 0c1e570: tokenizer_st_partition, llm_tokenizer_spm_session), so that verification finds
where this matters.
"""

from __future__ import annotations

import heapq
import re
from pathlib import Path
from typing import Any

from dqt_dist.export.sentencepiece_model import SPACE, PieceKind, SentencePieceModel

# llama.cpp changes the kinds of tokens with these texts, whatever the file says.
BECOME_CONTROL = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~["),
)
BECOME_USER_DEFINED = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def add_tokenizer(writer: Any, model: SentencePieceModel, vocab_size: int) -> None:
    """Writes the keys; rows of the embedding that no piece has are unused tokens."""
    unused = vocab_size - len(model.pieces)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.text for piece in model.pieces] + [f"[UNUSED{i}]" for i in range(unused)])
    writer.add_token_scores([piece.score for piece in model.pieces] + [0.0] * unused)
    writer.add_token_types([int(piece.kind) for piece in model.pieces] + [int(PieceKind.UNUSED)] * unused)
    # Where the key is missing llama.cpp takes id 1. </s> is what stands before each document of the training text.
    begin = model.eos_id if model.bos_id is None else model.bos_id
    assert begin is not None and model.eos_id is not None  # load_tokenizer asks for </s>
    writer.add_bos_token_id(begin)
    writer.add_eos_token_id(model.eos_id)
    writer.add_unk_token_id(model.unk_id)
    if model.pad_id is not None:
        writer.add_pad_token_id(model.pad_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(model.add_dummy_prefix)


class GgufTokenizer:
    """Text to ids by the keys of a file, as llama.cpp does it without special tokens."""

    def __init__(self, path: Path) -> None:
        import gguf

        fields = gguf.GGUFReader(path).fields

        def value(key: str) -> Any:
            return fields[f"tokenizer.ggml.{key}"].contents()

        self.texts: list[str] = value("tokens")
        self.scores: list[float] = value("scores")
        self.ids = {text: i for i, text in enumerate(self.texts)}
        self.prefix = " " if value("add_space_prefix") else ""
        kinds = map(_kind, self.texts, value("token_type"))
        apart = [text for text, kind in zip(self.texts, kinds, strict=True) if kind == PieceKind.USER_DEFINED]
        self._apart = sorted(apart, key=lambda text: len(text.encode()), reverse=True)

    def encode(self, text: str) -> list[int]:
        """Ids of the text. Raises KeyError for a byte without a token."""
        parts: list[str | int] = [text] if text else []
        # One user-defined token after another, not the longest at each place.
        for token in self._apart:
            parts = [new for part in parts for new in self._cut(part, token)]
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

    def _cut(self, part: str | int, token: str) -> list[str | int]:
        if isinstance(part, int):
            return [part]
        pieces = re.split(f"({re.escape(token)})", part)
        return [self.ids[token] if i % 2 else piece for i, piece in enumerate(pieces) if piece]

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


def _kind(text: str, stored: int) -> PieceKind:
    if text in BECOME_USER_DEFINED:
        return PieceKind.USER_DEFINED
    return PieceKind.CONTROL if text in BECOME_CONTROL else PieceKind(stored)
