"""Text to token ids and back: a thin layer over SentencePiece and over Hugging Face's tokenizers.

    SentencePieceTokenizer    a SentencePiece .model                    in this file; `train_tokenizer` makes one
    JsonTokenizer             a tokenizer.json of Hugging Face          in tokenizer_json.py

Everything else speaks `Tokenizer`, and `load_tokenizer` tells the two apart by what the file holds.

The tokenizers trained here are of the kind LLaMA was trained with: byte-pair merges (BPE) with byte fallback. A
character that is not in the vocabulary becomes its UTF-8 bytes (<0xE6> <0xBC> ...), so every text can be encoded and
`decode(encode(text))` gives the text back, spaces and newlines included. Ids 0, 1 and 2 are <unk>, <s> and </s>; there
is no padding token, because documents are packed and nothing is padded. </s> ends each document in the prepared data
(`eod_id`).

Training is deterministic: the sample of text is chosen by a hash of each document, not by a random generator, so the
same documents give the same model file, byte for byte, whatever the order of the files or the number of workers. This
module imports neither torch nor megatron: the worker processes of tools/prepare_data.py start in a fraction of a
second.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from dqt_dist.command_line import as_typed
from dqt_dist.data.tokenizer_json import JsonTokenizer, looks_like_json
from dqt_dist.errors import UserError

# Text that the tokenizer is trained on, at most: SentencePiece keeps it in memory together with its counts of words.
TRAINING_SAMPLE_BYTES = 64 * 2**20
# Longer lines are cut, because SentencePiece drops what is above max_sentence_length; a cut may split one word.
_MAX_LINE_CHARACTERS = 4000


class Tokenizer(Protocol):
    """What a tokenizer is to everything else; `load_tokenizer` makes one.

    vocab_size: ids are in [0, vocab_size). eod_id: the id that ends a document; no text is encoded to it. unknown_id:
    the id that stands for whatever has no piece; None where there is none.
    model: the bytes that a folder keeps as `file_name`. sha256: of them, in hexadecimal; prepared data and checkpoints
    carry it, so that a wrong pair is noticed.
    """

    path: Path
    file_name: str
    model: bytes
    sha256: str
    vocab_size: int
    eod_id: int
    unknown_id: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without begin or end marks."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without begin or end marks."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; marks such as <s> and </s> give nothing."""
        ...

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        """The text of each list of token ids."""
        ...

    def piece(self, token_id: int) -> str:
        """The piece of one id as the vocabulary writes it (a leading space may be U+2581). Raises IndexError outside
        the vocabulary."""
        ...


class SentencePieceTokenizer:
    """A loaded SentencePiece model."""

    file_name = "tokenizer.model"

    def __init__(self, path: Path, model: bytes) -> None:
        import sentencepiece

        self.path = path
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        foreign = f"tokenizer {path}: neither a SentencePiece .model file nor a tokenizer.json ({len(model)} bytes)"
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size: int = self._processor.vocab_size()
            self.eod_id: int = self._processor.eos_id()
            self.unknown_id: int | None = self._processor.unk_id()
        except (RuntimeError, UnicodeDecodeError) as error:  # the second: SentencePiece's message quotes the file
            raise UserError(foreign) from error
        if self.vocab_size == 0:  # what SentencePiece makes of an empty file, without an error
            raise UserError(foreign)
        try:
            for token_id in range(self.vocab_size):
                self.piece(token_id)
        except UnicodeDecodeError as error:
            raise UserError(f"tokenizer {path}: piece {token_id} is no text in UTF-8; copy the file again") from error
        if (unknown_id := self._processor.unk_id()) < 0:
            raise UserError(f"tokenizer {path}: has no piece for what is unknown (unk_id is {unknown_id})")
        if self.eod_id < 0:
            raise UserError(
                f"tokenizer {path}: has no end-of-sentence piece (eos_id is {self.eod_id}), which has to mark the end"
                " of each document; train the model with eos_id >= 0"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without begin or end marks."""
        return self._processor.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without begin or end marks."""
        return self._processor.encode(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; <s> and </s> give nothing."""
        return self._processor.decode([int(i) for i in ids])

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        """The text of each list of token ids."""
        return self._processor.decode(ids) if ids else []

    def piece(self, token_id: int) -> str:
        """The piece of one id as SentencePiece writes it (a leading space is U+2581). Raises IndexError outside the
        vocabulary."""
        return self._processor.id_to_piece(int(token_id))


TOKENIZER_FILES = (SentencePieceTokenizer.file_name, JsonTokenizer.file_name)
"""Names under which a folder keeps its tokenizer. An export holds both where the second was made from the first."""


def kept_tokenizer(folder: Path) -> Path | None:
    """The file of the tokenizer that a folder of data, a run or a model keeps; None where there is none."""
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)


def drop_other_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Remove a tokenizer of the other kind: a folder of data or a run keeps one."""
    for name in TOKENIZER_FILES:
        if name != tokenizer.file_name:
            (folder / name).unlink(missing_ok=True)


def load_tokenizer(path: str | Path, end_of_text: str | None = None) -> Tokenizer:
    """Load a SentencePiece .model or a tokenizer.json, whatever its name.

    end_of_text: the special token of a tokenizer.json that ends a document, where the file does not say so. Raises
    UserError when the file is missing, is neither, or has no token to end a document.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"tokenizer {path}: no such file; it must be a SentencePiece .model file"
            f" ({as_typed('dqt-prepare-data')} makes one) or a tokenizer.json of Hugging Face"
        )
    model = path.read_bytes()
    if looks_like_json(model):
        return JsonTokenizer(path, model, end_of_text)
    tokenizer = SentencePieceTokenizer(path, model)
    if end_of_text is not None:
        raise UserError(
            f"--end-of-text {end_of_text}: tokenizer {path} is a SentencePiece model, which names its own"
            f" ({tokenizer.piece(tokenizer.eod_id)}); leave --end-of-text out"
        )
    return tokenizer


def document_hash(text: str) -> tuple[float, float]:
    """Two independent numbers in [0, 1) that depend on the text alone: the first chooses the validation split, the
    second the tokenizer's sample."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    # 53 bits each: what a float holds exactly.
    first, second = ((int.from_bytes(digest[i : i + 8], "little") >> 11) / 2**53 for i in (0, 8))
    return first, second


class HashSample:
    """A sample of documents of bounded size whose choice depends on the documents alone, not on their order or a
    generator.

    A document is kept while its hash is below `threshold`. Whenever the kept text outgrows `max_bytes` the threshold is
    halved and the sample thinned, so memory stays bounded for a stream of any length, and the sample is a fair one of
    all of it.
    """

    def __init__(self, max_bytes: int = TRAINING_SAMPLE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.threshold = 1.0
        self._kept: list[tuple[float, str]] = []
        self._bytes = 0

    def add(self, text: str) -> None:
        """Offer one document."""
        rank = document_hash(text)[1]
        if rank >= self.threshold:
            return
        self._kept.append((rank, text))
        self._bytes += len(text.encode("utf-8", "replace"))
        while self._bytes > self.max_bytes and len(self._kept) > 1:
            self.threshold /= 2
            self._kept = [(r, t) for r, t in self._kept if r < self.threshold]
            self._bytes = sum(len(t.encode("utf-8", "replace")) for _, t in self._kept)

    def documents(self) -> list[str]:
        """The kept documents, in an order that depends on them alone."""
        return [text for _, text in sorted(self._kept)]


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """Train a BPE model with byte fallback; returns the bytes of the .model file.

    Raises UserError when the text is empty or `vocab_size` is too large or too small for it; the message gives the
    bound.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,  # the rarest characters are left to byte fallback
            normalization_rule_name="identity",  # text comes back as it went in
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _MAX_LINE_CHARACTERS,  # bytes; a character has at most 4 in UTF-8
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # it is written into the model file, so it must not vary with the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _translated(error, vocab_size) from error
    return model.getvalue()


def _lines(documents: Iterable[str]) -> Iterator[str]:
    """Lines of at most _MAX_LINE_CHARACTERS. Newlines never enter the vocabulary: they are encoded as the byte
    <0x0A>."""
    for text in documents:
        for line in text.splitlines():
            # SentencePiece takes UTF-8, which has no lone surrogates, and it reserves NUL.
            line = line.encode("utf-8", "ignore").decode("utf-8").replace("\0", "")
            for start in range(0, len(line), _MAX_LINE_CHARACTERS):
                yield line[start : start + _MAX_LINE_CHARACTERS]


def _translated(error: RuntimeError, vocab_size: int) -> Exception:
    """SentencePiece's error in the words of our command line; an error we do not know is returned as it is."""
    message = str(error)
    if found := re.search(r"Vocabulary size too high \(\d+\).*<= (\d+)", message):
        return UserError(
            f"--vocab-size {vocab_size}: too large for this text, which yields at most {found[1]} pieces; "
            f"give --vocab-size {found[1]} or less, or more text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"--vocab-size {vocab_size}: too small; the 3 marks, the 256 bytes and the characters of this text need at"
            f" least {found[1]} pieces"
        )
    if "sentences_.empty()" in message:
        return UserError("the input holds no text to train a tokenizer on")
    return error
