"""What a SentencePiece model file says of itself: its pieces and kinds, its marks, and how it treats text.

    pieces          every id's text, score and kind
    marks           ids of <s>, </s>, <unk> and <pad>, wherever the model has them; None where it has none
    normalisation   the rules (a compiled table; empty for "identity") and the treatment of spaces

Exports write tokenizers for other programs from this and from nothing else. `limits` names what a format cannot
express.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from dqt_dist.data.tokenizer import SentencePieceTokenizer

SPACE = "\u2581"
BYTES = 256
Limits = list[tuple[bool, str]]
"""Whether a tokenizer has a property, and its name."""
# The normalisation rules of SentencePiece, by the names that its trainer takes; the rules of another name are a
# user's own.
NFKC_RULES = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf")


class PieceKind(IntEnum):
    """Kinds of pieces by SentencePiece's numbers, which GGUF took over."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(IntEnum):
    """How text is cut into pieces, by SentencePiece's numbers."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float
    """BPE: minus the rank of the merge that makes it. Unigram: log probability. 0 for marks and bytes."""
    kind: PieceKind

    @property
    def bytes(self) -> bytes:
        """The bytes of text that the piece stands for; none for marks."""
        if self.kind in (PieceKind.NORMAL, PieceKind.USER_DEFINED, PieceKind.UNUSED):
            return self.text.replace(SPACE, " ").encode()
        if self.kind == PieceKind.BYTE:
            return bytes([int(self.text[1:-1], 16)])  # <0xE6>
        return b""


@dataclass(frozen=True)
class SentencePieceModel:
    """One model file, read."""

    library: ClassVar = "SentencePiece"
    engine: ClassVar = "llama.cpp's tokenizer for SentencePiece"
    path: Path
    pieces: list[Piece]
    """In the order of ids."""
    algorithm: Algorithm
    byte_fallback: bool
    unk_id: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    rule: str
    """Name of the normalisation rules."""
    charsmap: bytes
    """The rules, compiled; empty when text stays as it is."""
    denormalizes: bool
    """Whether decoding changes text by rules of its own."""
    add_dummy_prefix: bool
    """A space is put before the text, or after it with `whitespace_as_suffix`."""
    whitespace_as_suffix: bool
    remove_extra_whitespaces: bool
    """No spaces at both ends of a text, and single ones inside."""
    escape_whitespaces: bool
    """Spaces become U+2581."""
    normalize: Callable[[str], str]
    """SentencePiece's own normalisation of a text."""
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]

    @cached_property
    def index(self) -> dict[str, int]:
        """Ids by texts."""
        return {piece.text: i for i, piece in enumerate(self.pieces)}

    @property
    def marks(self) -> dict[str, int | None]:
        """Ids of the marks by the names that Hugging Face gives them."""
        return {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "pad": self.pad_id}

    @property
    def num_pieces(self) -> int:
        """Ids are below it."""
        return len(self.pieces)

    @property
    def named(self) -> list[str]:
        """Marks and user-defined pieces as a text may have them."""
        found = self.of_kind(PieceKind.UNKNOWN, PieceKind.CONTROL, PieceKind.USER_DEFINED)
        return [text.replace(SPACE, " ") for text in found]

    @property
    def never_cut(self) -> list[str]:
        """User-defined pieces."""
        return self.of_kind(PieceKind.USER_DEFINED)

    @property
    def space_added(self) -> bool:
        """Whether encoding adds a space to each text, and `space_first`, whether it does so before the text."""
        return self.add_dummy_prefix

    @property
    def space_first(self) -> bool:
        return self.add_dummy_prefix and not self.whitespace_as_suffix

    def piece_bytes(self) -> list[bytes]:
        """The bytes of text that each id stands for."""
        return [piece.bytes for piece in self.pieces]

    @cached_property
    def user_defined(self) -> list[str]:
        """User-defined pieces that a text can have, longest first; one with plain spaces is never met."""
        found = self.of_kind(PieceKind.USER_DEFINED)
        return sorted((text for text in found if self.index[text] in self.encode(text)), key=len, reverse=True)

    def of_kind(self, *kinds: PieceKind) -> list[str]:
        """Texts of the pieces of these kinds, in the order of ids."""
        return [piece.text for piece in self.pieces if piece.kind in kinds]


def read_model(tokenizer: SentencePieceTokenizer) -> SentencePieceModel:
    """Reads the file of a tokenizer that SentencePiece has loaded, so the file is known to be good."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(tokenizer.model)
    processor = SentencePieceProcessor(model_proto=tokenizer.model)

    def mark(token_id: int) -> int | None:
        return token_id if token_id >= 0 else None

    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    return SentencePieceModel(
        path=tokenizer.path,
        pieces=[Piece(piece.piece, piece.score, PieceKind(piece.type)) for piece in proto.pieces],
        algorithm=Algorithm(trainer.model_type),
        byte_fallback=trainer.byte_fallback,
        unk_id=processor.unk_id(),
        bos_id=mark(processor.bos_id()),
        eos_id=mark(processor.eos_id()),
        pad_id=mark(processor.pad_id()),
        rule=rules.name,
        charsmap=rules.precompiled_charsmap,
        denormalizes=bool(proto.denormalizer_spec.precompiled_charsmap),
        add_dummy_prefix=rules.add_dummy_prefix,
        whitespace_as_suffix=trainer.treat_whitespace_as_suffix,
        remove_extra_whitespaces=rules.remove_extra_whitespaces,
        escape_whitespaces=rules.escape_whitespaces,
        normalize=processor.normalize,
        encode=processor.encode,
        decode=processor.decode,
    )


# ---- what the formats can express ----


def limits(model: SentencePieceModel) -> tuple[Limits, Limits]:
    """Properties that no format expresses, and those that GGUF does not."""
    user_defined = model.of_kind(PieceKind.USER_DEFINED)
    changed = [text for text in user_defined if model.charsmap and _rules_change(model, text)]
    nowhere = [
        (model.algorithm == Algorithm.WORD, 'model_type is "word"'),
        (bool(model.charsmap) and model.rule not in NFKC_RULES, f"normalisation rules of your own ({model.rule!r})"),
        (model.denormalizes, "it has rules for decoding (denormalizer_spec)"),
        (bool(model.of_kind(PieceKind.UNUSED)), "it has pieces of type UNUSED"),
        (bool(changed), f"its normalisation changes the text of the user-defined pieces {changed}"),
    ]
    few_bytes = len(model.of_kind(PieceKind.BYTE)) < BYTES
    spaced = [text for text in user_defined if SPACE in text or " " in text]
    # SentencePiece reads from the left. llama.cpp cuts out one user-defined piece after another, most bytes first.
    overlapping = [
        f"in {shared!r} {first!r} comes first and {second!r} is no shorter"
        for first, second, shared in overlaps(user_defined)
        if len(second.encode()) >= len(first.encode())
    ]
    only_gguf = [
        (model.algorithm == Algorithm.UNIGRAM, 'model_type is "unigram"'),
        (bool(model.charsmap), f'normalization_rule_name is "{model.rule}", not "identity"'),
        (model.remove_extra_whitespaces, "remove_extra_whitespaces is true"),
        (not model.escape_whitespaces, "escape_whitespaces is false"),
        (model.whitespace_as_suffix, "treat_whitespace_as_suffix is true"),
        (not model.byte_fallback or few_bytes, "byte_fallback is false"),
        # llama.cpp puts a space after every user-defined piece and none before one that begins the text.
        (
            bool(user_defined) and model.add_dummy_prefix,
            f"add_dummy_prefix is true beside user-defined pieces {some(user_defined)}",
        ),
        (bool(spaced), f"user-defined pieces hold spaces: {some(spaced)}"),
        (bool(overlapping), f"user-defined pieces overlap: {overlapping[0]}" if overlapping else ""),
    ]
    return nowhere, only_gguf


def overlaps(texts: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(first, second, shared) of pieces that may want the same letters: `second` begins with the end of `first`, and
    the text `shared` holds both. SentencePiece takes the first there."""
    begin_with = defaultdict(list)
    for text in texts:
        for stop in range(1, len(text)):
            begin_with[text[:stop]].append(text)
    for first in texts:
        for start in range(1, len(first)):
            for second in begin_with.get(first[start:], ()):
                if second != first:
                    yield first, second, first[:start] + second


def _rules_change(model: SentencePieceModel, text: str) -> bool:
    """Whether the rules alone would change the text, which SentencePiece keeps them from."""
    from tokenizers.normalizers import Precompiled

    return Precompiled(model.charsmap).normalize_str(text) != text


def some(texts: list[str]) -> str:
    """The first texts, and how many more."""
    shown = ", ".join(map(repr, texts[:3]))
    return shown if len(texts) <= 3 else f"{shown} and {len(texts) - 3} more"
