"""A tokenizer.json, the file of Hugging Face's `tokenizers`, as a tokenizer of documents.

Such a file also says things that are not about text and ids: how a prompt is cut and padded, which marks are put around
it, how much chance there is in its merges. None of it takes effect here. On the other hand it need not say which token
ends a document. So a file is brought into one form, and this form is what a folder keeps and what has a SHA-256:

    truncation, padding    null
    model.dropout          null
    model.vocab            of a unigram model: special tokens have a score that no text takes
    added_tokens           as they are; the token that ends a document is special
    post_processor         TemplateProcessing "$A END": the text, then the token that ends a document

The form of the form is the form itself, byte for byte. The token that ends a document is, in this order, the given one
(--end-of-text), the one of such a post-processor, eos_token of a tokenizer_config.json or special_tokens_map.json
beside the file, eos_token_id of a generation_config.json beside it, or the only special token with one of the usual
names.

The text of a special token is text, as it is for SentencePiece: "</s>" in a document does not end it.

Two ways of writing bytes as pieces are known, by the decoder of the file. Others are refused, since figures per byte
and text that is shown as it comes need the bytes of each token:

    byte level        every byte is a letter of its own: GPT-2, Llama 3
    byte fallback     U+2581 is a space, <0xE6> a byte: what is made from a SentencePiece model
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dqt_dist.command_line import as_typed
from dqt_dist.errors import UserError
from dqt_dist.json_files import parse_json, read_json_object, why_not_json

SPACE = "\u2581"
MOST_IDS = 2**31
"""The largest type of ids in prepared data is int32."""
USUAL_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "<EOS>", "[EOS]")
"""LLaMA and T5, GPT-2, Llama 3, Gemma and others."""
# Characters of every width, marks and line ends: what a damaged rule of a file would meet first.
_PROBE = "The quick  brown\tfox\r\n\n caf\u00e9 e\u0301 \u4f60\u597d \u0915\u093c \uff46 \U0001f600 123 </s> <0x41> \0"
NO_TEXT_SCORE = -1e5
"""Below any sum of log probabilities of a few pieces."""
# What is not about text and ids.
_SETTINGS = {"truncation": None, "padding": None, "post_processor": None}


def looks_like_json(content: bytes) -> bool:
    """Whether a file is a JSON object. A SentencePiece model may begin with the bytes of a line end and a brace, but no
    quote follows them."""
    return re.match(rb'\s*\{\s*["}]', content) is not None


class JsonTokenizer:
    """A loaded tokenizer.json.

    fast: the library's tokenizer. form: the values of `model`. byte_level: whether pieces are written byte by byte.
    """

    file_name = "tokenizer.json"

    def __init__(self, path: Path, content: bytes, end_of_text: str | None = None) -> None:
        self.path = path
        values = _parsed(path, content)
        with _quiet(), _refusals(path):
            # First the library, which looks at every field that is then read here.
            self.fast = _loaded(values | _SETTINGS)
            vocabulary: dict[str, int] = self.fast.get_vocab(with_added_tokens=True)
            _refuse_vocabulary(path, values, vocabulary)
            self.vocab_size = max(vocabulary.values()) + 1
            end = _end_of_document(path, values, self.fast, end_of_text)
            self.eod_id = vocabulary[end]
            self.form = _form(values, end, self.eod_id)
            self.fast = _loaded(self.form)
            # As for SentencePiece: the text of a mark is no mark.
            self.fast.encode_special_tokens = True
            self.unknown_id = _unknown_id(self.form["model"], vocabulary)
            self.byte_level = _is_byte_level(path, self.form.get("decoder"))
            self.decode(self.encode(_PROBE))
            self._refuse_ends_in_text(end)
        self.model = _dumped(self.form).encode()
        self.sha256 = hashlib.sha256(self.model).hexdigest()

    def _refuse_ends_in_text(self, end: str) -> None:
        """A model that knows whole words may know the mark as one of them."""
        for text in (end, f"a {end} b", f"a{end}b", f"{end}\n{end}{end}"):
            if self.eod_id in self.encode(text):
                raise UserError(
                    f"tokenizer {self.path}: the text {text!r} has the id {self.eod_id} of {end}, which has to end"
                    " documents and nothing else; take another token by --end-of-text of"
                    f" {as_typed('dqt-prepare-data')}"
                )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without begin or end marks."""
        with _refusals(self.path):
            return self.fast.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without begin or end marks."""
        with _refusals(self.path):
            return [encoding.ids for encoding in self.fast.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens give nothing."""
        with _refusals(self.path):
            return self.fast.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        """The text of each list of token ids."""
        with _refusals(self.path):
            return self.fast.decode_batch(ids, skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        """The piece of one id as the file writes it, "" for an id without one. Raises IndexError outside the
        vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise IndexError(f"piece id {token_id} is out of range")
        return self.fast.id_to_token(int(token_id)) or ""


# ---- reading the file ----


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    try:
        values = parse_json(content.decode())
    except ValueError as error:
        why = why_not_json(error)
    else:
        if isinstance(values, dict) and isinstance(values.get("model"), dict):
            return values
        why = 'not a tokenizer.json of Hugging Face: it has no "model"'
    raise UserError(f"tokenizer {path}: {why} ({len(content)} bytes)")


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """What the library raises of a file that it cannot use, as UserError. Its panics are no `Exception`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"tokenizer {path}: the library `tokenizers` cannot use it ({error})") from error
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """The library writes its panics to the file of stderr before it raises them."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _dumped(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def _loaded(values: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(_dumped(values))


def _refuse_vocabulary(path: Path, values: dict[str, Any], vocabulary: dict[str, int]) -> None:
    """Raises UserError for ids that cannot be ids, mean two tokens, or are not those that the file gives."""
    if not vocabulary:
        raise UserError(f"tokenizer {path}: its vocabulary is empty")
    largest = max(vocabulary.values())
    if largest >= MOST_IDS:
        raise UserError(f"tokenizer {path}: holds token id {largest}; ids must be below {MOST_IDS}")
    if len(set(vocabulary.values())) < len(vocabulary):
        tokens: dict[int, str] = {}
        first, second, both = next(
            (tokens[i], token, i) for token, i in vocabulary.items() if tokens.setdefault(i, token) != token
        )
        raise UserError(f"tokenizer {path}: the tokens {first!r} and {second!r} have the same id {both}")
    for token in values.get("added_tokens") or ():
        if (loaded := vocabulary.get(token["content"])) != token["id"]:
            raise UserError(
                f"tokenizer {path}: the added token {token['content']!r} has id {token['id']}, but the library"
                f" `tokenizers` gives it {loaded}; added tokens have their id in the vocabulary, or the next ones in"
                " the order of the file"
            )


# ---- the token that ends a document ----


def _end_of_document(path: Path, values: dict[str, Any], fast: Any, given: str | None) -> str:
    """The token that ends a document. Raises UserError where none or several may be meant, and for one that the file
    does not have."""
    special = [token["content"] for token in values.get("added_tokens") or ()]
    found = [("--end-of-text", given)] if given is not None else [*_ends_in_file(values), *_ends_beside(path, fast)]
    usual = [token for token in special if token in USUAL_ENDS]
    if not found and len(usual) == 1:
        return usual[0]
    if not found:
        why = f"{_some(usual)} may all be meant" if usual else f"it has the special tokens {_some(special)}"
        raise UserError(
            f"tokenizer {path}: cannot tell which token ends a document; {why}. Name it by --end-of-text of"
            f' {as_typed("dqt-prepare-data")}, or as "eos_token" in a tokenizer_config.json beside the file'
        )
    where, end = found[0]
    if end not in special:
        raise UserError(
            f"tokenizer {path}: {where} names {end!r} as the end of a document, which is none of its special tokens"
            f" {_some(special)}"
        )
    return end


def _ends_in_file(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    match values.get("post_processor"):
        case {"type": "TemplateProcessing", "single": [{"Sequence": _}, {"SpecialToken": {"id": str(end)}}]}:
            yield "post_processor", end


def _ends_beside(path: Path, fast: Any) -> Iterator[tuple[str, str]]:
    """(file, token) of the files beside a tokenizer.json that name an end of text."""
    for name, key in (
        ("tokenizer_config.json", "eos_token"),
        ("special_tokens_map.json", "eos_token"),
        ("generation_config.json", "eos_token_id"),
    ):
        file = path.with_name(name)
        if not file.is_file():
            continue
        match read_json_object(file, "copy it again").get(key):
            case str(token) | {"content": str(token)} | [str(token)]:
                yield str(file), token
            case int(token_id) | [int(token_id)] if 0 <= token_id < MOST_IDS:
                yield str(file), fast.id_to_token(token_id) or f"id {token_id}"


def _form(values: dict[str, Any], end: str, end_id: int) -> dict[str, Any]:
    """The one form of a file."""
    first = {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [first, {"SpecialToken": {"id": end, "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {end: {"id": end, "ids": [end_id], "tokens": [end]}},
    }
    added = [token | {"special": True} if token["content"] == end else token for token in values["added_tokens"]]
    model = dict(values["model"])
    if "dropout" in model:
        model["dropout"] = None
    if isinstance(model["vocab"], list):  # unigram: pairs of a piece and its score
        special = {token["content"] for token in added if token["special"]}
        model["vocab"] = [[piece, NO_TEXT_SCORE if piece in special else score] for piece, score in model["vocab"]]
    return values | _SETTINGS | {"added_tokens": added, "post_processor": template, "model": model}


# ---- what the pieces mean ----


def _unknown_id(model: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    """The id for what has no piece; a unigram model has its number, others its text."""
    if isinstance(unknown := model.get("unk_id"), int):
        return unknown
    return vocabulary.get(model.get("unk_token") or "")


def _is_byte_level(path: Path, decoder: dict[str, Any] | None) -> bool:
    """Whether pieces have a letter for every byte. Raises UserError for a decoder of neither known kind."""
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return True
    replaced = [step for step in steps if step["type"] == "Replace"]
    if (
        kinds & {"Metaspace", "Replace"}
        and kinds <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
        and all(step.get("replacement", SPACE) == SPACE for step in steps)
        and all(step["pattern"] == {"String": SPACE} for step in replaced)
        and all(step.get("content", " ") == " " for step in steps)
    ):
        return False
    named = " and ".join(sorted(kinds)) or "none"
    raise UserError(
        f"tokenizer {path}: its decoder ({named}) is not one whose tokens have bytes of their own; known are ByteLevel,"
        " and U+2581 for a space (Metaspace, or Replace with ByteFallback)"
    )


def _some(tokens: list[str]) -> str:
    shown = ", ".join(map(repr, tokens[:5])) or "none"
    return shown if len(tokens) <= 5 else f"{shown} and {len(tokens) - 5} more"
