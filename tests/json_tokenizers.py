"""Small tokenizer.json files, trained here: byte level as GPT-2's and Llama 3's, and byte fallback as Llama 2's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

GPT2_END = "<|endoftext|>"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def gpt2(documents: Iterable[str], vocab_size: int = 400) -> dict[str, Any]:
    """Byte-level BPE with GPT-2's pattern; <|endoftext|> is the only special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained(tokenizer, documents, vocab_size, [GPT2_END])


def llama3(documents: Iterable[str], vocab_size: int = 400) -> dict[str, Any]:
    """Byte-level BPE as Llama 3 has it: its pattern, whole words before merges, and <|begin_of_text|> before a text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    values = _trained(tokenizer, documents, vocab_size, [])
    # As in Llama 3, special tokens come last and are no words of the model.
    begin, end, first = "<|begin_of_text|>", "<|end_of_text|>", len(values["model"]["vocab"])
    values["added_tokens"] = [special(begin, first), special(end, first + 1)]
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {begin: {"id": begin, "ids": [first], "tokens": [begin]}},
    }
    return values


def llama2(documents: Iterable[str], vocab_size: int = 500) -> dict[str, Any]:
    """BPE with byte fallback, as transformers makes it from a SentencePiece model."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Pieces of whole words, so that lines are not one piece.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581*[^\u2581\n]+|\n"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False, limit_alphabet=60
    )
    tokenizer.train_from_iterator((text.replace("\n", " ") for text in documents), trainer)
    tokenizer.pre_tokenizer = None
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = values["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(values))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(tokenizer.to_str())


def t5(documents: Iterable[str], vocab_size: int = 400) -> dict[str, Any]:
    """A unigram model, in which marks are pieces as others, and line ends become spaces."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return json.loads(tokenizer.to_str())


MAKERS = {"gpt2": gpt2, "llama3": llama3, "llama2": llama2}
"""Those from which any text comes back."""


def special(content: str, token_id: int, **fields: Any) -> dict[str, Any]:
    """An entry of added_tokens."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": True, **fields}


def write(path: Path, values: dict[str, Any]) -> Path:
    """The file as Hugging Face writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def _trained(tokenizer: Tokenizer, documents: Iterable[str], vocab_size: int, specials: list[str]) -> dict[str, Any]:
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return json.loads(tokenizer.to_str())
