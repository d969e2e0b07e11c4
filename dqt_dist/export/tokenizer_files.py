"""Tokenizer files of an export: the SentencePiece model, and the same tokenizer for Hugging Face.

    tokenizer.model          the SentencePiece model as it is
    tokenizer.json           its pieces and merges, for the `tokenizers` library
    tokenizer_config.json    class and special tokens; no <s> is added, since training adds none

A BPE model of SentencePiece merges the pair whose result has the highest score. The merges of `tokenizers` are
therefore all ways to cut a piece into two pieces, in the order of the ids of the results.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from dqt_dist.data.tokenizer import Tokenizer

SPACE = "\u2581"


class PieceKind(IntEnum):
    """Kinds of pieces by SentencePiece's numbers, which GGUF took over."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float
    """Minus the rank of the merge that makes it; 0 for marks and bytes."""
    kind: PieceKind


def read_pieces(tokenizer: Tokenizer) -> list[Piece]:
    """The vocabulary in the order of ids."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(tokenizer.path))

    def kind(token_id: int) -> PieceKind:
        tests = {
            PieceKind.UNKNOWN: processor.is_unknown,
            PieceKind.CONTROL: processor.is_control,
            PieceKind.UNUSED: processor.is_unused,
            PieceKind.BYTE: processor.is_byte,
        }
        return next((found for found, test in tests.items() if test(token_id)), PieceKind.NORMAL)

    return [Piece(processor.id_to_piece(i), processor.get_score(i), kind(i)) for i in range(processor.vocab_size())]


def write_tokenizer(folder: Path, tokenizer: Tokenizer, sequence_length: int) -> None:
    """Writes the three files into `folder`."""
    from tokenizers import AddedToken, decoders, normalizers
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import BPE

    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    pieces = read_pieces(tokenizer)
    unknown, begin, end = (piece.text for piece in pieces[:3])
    vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
    fast = FastTokenizer(
        BPE(vocab=vocabulary, merges=_merges(pieces, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    # SentencePiece puts one space before the text and writes spaces as U+2581.
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in (unknown, begin, end)])
    fast.save(str(folder / "tokenizer.json"))
    config = _tokenizer_config(unknown, begin, end, sequence_length)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _merges(pieces: list[Piece], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for piece in (piece.text for piece in pieces if piece.kind == PieceKind.NORMAL):
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += sorted(
            (cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary),
            key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]),
        )
    return merges


def _tokenizer_config(unknown: str, begin: str, end: str, sequence_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
        "bos_token": begin,
        "eos_token": end,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
    }


def generation_config() -> dict[str, Any]:
    """generation_config.json: how a text begins and ends."""
    return {"bos_token_id": 1, "eos_token_id": 2}
