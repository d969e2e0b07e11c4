"""Does an exported tokenizer give the ids of training? Asks the tokenizer that users will have, on hard strings.

hf, hf-bitnet, hf-compressed    transformers' AutoTokenizer of the folder
gguf                            llama.cpp's tokenizer where llama-cpp-python is installed, and in any case an
                                independent reading of the keys
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from dqt_dist.export.errors import VerificationError
from dqt_dist.export.gguf_tokenizer import gguf_tokenizer
from dqt_dist.export.sentencepiece_model import SPACE, overlaps
from dqt_dist.export.text import SAMPLE
from dqt_dist.export.tokenizer_model import TokenizerModel
from dqt_dist.export.verify import quiet_transformers

Encode = Callable[[str], list[int]]

HARD_STRINGS = (
    "",
    "a",
    # spaces
    " ",
    "   ",
    " leading",
    "trailing ",
    "  two  spaces  inside  ",
    "\u00a0no-break\u3000ideographic\u2003em\u200bzero",
    "\u2581 \u2581\u2581a \u2581",
    # lines and tabs
    "\n",
    "x = 1\ny = 2",
    "\n\n\n  a\r\nb\rc\n",
    "\t\ttabs\t \tend\t",
    "def f(x):\n    if x:\n        return x\n\n",
    # digits
    "0 1234567890 3.14159e-07 1,000,000 0x1F \u0663\u0664 \u00bd \u2460 \u00b2",
    # beyond ASCII
    "na\u00efve caf\u00e9 \u201cquoted\u201d \u2013 \u2026",
    "\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \uff21\uff22\uff43 \ufb01ne \u2126 \u212b",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea 1\ufe0f\u20e3 \u263a\ufe0f",
    # the same letters composed and with combining marks
    "\u00e9 \u1ebf \u00c5 \ud55c\uae00 \u0958",
    "e\u0301 e\u0302\u0301 A\u030a \u1112\u1161\u11ab\u1100\u1173\u11af \u0915\u093c",
    "z\u0351\u036b\u0343 q\u0307 \u0301",
    # what looks like a piece of the vocabulary
    "<0x41><0x0A> <0xE6>",
    "<s>a</s> <unk> <pad>",
)
# Prefixes of an indented line: pieces of spaces meet in every way.
INDENTATIONS = tuple(f"{' ' * count}x" for count in range(3, 34))
MOST_OVERLAPS = 1000
"""Pairs of user-defined pieces; hundreds of pieces of one letter have a great many."""


def hard_strings(model: TokenizerModel) -> list[str]:
    """The fixed strings, sample text, every mark and user-defined piece as text, and overlaps of the latter."""
    as_text = model.named
    around = [f"a{text} b {text}{text}c" for text in as_text]
    shared = {text for _, _, text in islice(overlaps(model.never_cut), MOST_OVERLAPS)}
    overlapping = sorted(text.replace(SPACE, " ") for text in shared)
    return [*HARD_STRINGS, *INDENTATIONS, SAMPLE, *as_text, *around, "".join(as_text), *overlapping]


def compare_ids(model: TokenizerModel, encode: Encode, what: str) -> None:
    """Raises VerificationError for the first string whose ids `what` makes otherwise; has the string and both lists."""
    for text in hard_strings(model):
        wanted, found = model.encode(text), encode(text)
        if wanted != found:
            raise VerificationError(
                f"tokenizer: {what} gives other ids than {model.library}\n  text           {text!r}\n"
                f"  {model.library:14} {wanted}\n  {what:14} {found}"
            )


def check_hf(folder: Path, model: TokenizerModel) -> str:
    """Ids and decoded text of transformers' tokenizer; a line that tells what was compared."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        exported = AutoTokenizer.from_pretrained(folder)
        compare_ids(model, lambda text: exported(text)["input_ids"], "transformers")
        for text in hard_strings(model):
            ids = model.encode(text)
            # SentencePiece shows an unknown piece as a sign of its own.
            if model.unk_id not in ids and (found := exported.decode(ids, skip_special_tokens=True)) != model.decode(
                ids
            ):
                raise VerificationError(
                    f"tokenizer: transformers makes {found!r} of the ids {ids}, {model.library} {model.decode(ids)!r}"
                )
    return f"tokenizer: transformers gives {model.library}'s ids on {len(hard_strings(model))} hard strings"


def check_gguf(path: Path, model: TokenizerModel) -> str:
    """Ids by the keys of the file, and by llama.cpp where it is installed; a line that tells which."""
    compare_ids(model, gguf_tokenizer(path).encode, "GGUF keys")
    count = len(hard_strings(model))
    if importlib.util.find_spec("llama_cpp") is None:
        return (
            f"tokenizer: the GGUF keys give {model.library}'s ids on {count} hard strings; not checked by llama.cpp "
            "itself (llama-cpp-python is not installed)"
        )
    import llama_cpp  # pyright: ignore[reportMissingImports]

    engine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        compare_ids(model, lambda text: engine.tokenize(text.encode(), add_bos=False, special=False), "llama.cpp")
    finally:
        engine.close()
    return f"tokenizer: llama.cpp gives {model.library}'s ids on {count} hard strings"
