"""Tokenizer files of an export: for a SentencePiece model the same tokenizer for Hugging Face beside it.

    tokenizer.model          the SentencePiece model as it is, of a run that has one
    tokenizer.json           its pieces and rules, for the `tokenizers` library; or that of the run
    tokenizer_config.json    class and marks; no <s> is added, since training adds none

The tokenizer.json of a run goes out without the post-processor that names the end of a document: programs put what it
says around every text. Read again, beside a tokenizer_config.json with "eos_token", it is the same tokenizer to the
byte.

SentencePiece does to a text, in this order, what tokenizer.json then says:

    rules         nmt_nfkc and the like          NFC, Precompiled
    spaces        extra ones removed             Replace
    prefix        one space before (or after)    Prepend, Replace at the end
    escape        " " -> U+2581                  Replace
    user-defined  never cut nor joined           Split; a whole part that is a piece is this piece (ignore_merges)
    algorithm     bpe, char: merges              BPE: the pair whose result has the highest score
                  unigram: best sum of scores    Unigram

The merges of `tokenizers` are all ways to cut a piece into two pieces, in the order of the results' scores. The text of
a mark ("</s>" in a document) is text for SentencePiece: `split_special_tokens` makes transformers see it so as well.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from dqt_dist.data.tokenizer import SentencePieceTokenizer
from dqt_dist.data.tokenizer_json import NO_TEXT_SCORE, JsonTokenizer
from dqt_dist.export.sentencepiece_model import SPACE, Algorithm, PieceKind, SentencePieceModel
from dqt_dist.export.tokenizer_json_model import TokenizerJsonModel
from dqt_dist.export.tokenizer_model import TokenizerModel

# An unassigned character that ends a grapheme; no text has it.
BREAK = "\ufff0"
# Pieces that no text has, though it may have their letters. `tokenizers` knows no kinds of pieces.
NO_TEXT = (PieceKind.UNKNOWN, PieceKind.CONTROL, PieceKind.BYTE)
MANY = 1000


def write_tokenizer(folder: Path, model: TokenizerModel, sequence_length: int) -> None:
    """Writes the files into `folder`."""
    if isinstance(model, SentencePieceModel):
        shutil.copyfile(model.path, folder / SentencePieceTokenizer.file_name)
        _fast_tokenizer(model).save(str(folder / JsonTokenizer.file_name))
        marks = {name: model.pieces[i].text for name, i in model.marks.items() if i is not None}
    else:
        values = model.form | {"post_processor": None}
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / JsonTokenizer.file_name).write_text(text, encoding="utf-8")
        # transformers would add to the special tokens what is not among them.
        marks = {name: model.added[i].text for name, i in model.marks.items() if i in model.added}
    config = _tokenizer_config(marks, sequence_length)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _fast_tokenizer(model: SentencePieceModel) -> Any:
    """A SentencePiece model as a tokenizer of `tokenizers`."""
    from tokenizers import AddedToken, Regex, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer

    fast = FastTokenizer(_algorithm(model))
    fast.normalizer = _normalizer(model)
    # Of several user-defined pieces at one place the longest.
    patterns = "|".join(map(_quoted, model.user_defined)), _no_text_pattern(model)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns if pattern]
    if splits:
        fast.pre_tokenizer = pre_tokenizers.Sequence(splits)
    fast.decoder = _decoder(model)
    special = model.of_kind(PieceKind.UNKNOWN, PieceKind.CONTROL)
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    return fast


def _algorithm(model: SentencePieceModel) -> Any:
    from tokenizers.models import BPE, Unigram

    if model.algorithm == Algorithm.UNIGRAM:
        scores = [(piece.text, NO_TEXT_SCORE if piece.kind in NO_TEXT else piece.score) for piece in model.pieces]
        return Unigram(scores, model.unk_id, byte_fallback=model.byte_fallback)
    return BPE(
        vocab={piece.text: i for i, piece in enumerate(model.pieces)},
        merges=_merges(model) if model.algorithm == Algorithm.BPE else [],
        unk_token=model.pieces[model.unk_id].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=bool(model.user_defined),
    )


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    ids = {piece.text: i for i, piece in enumerate(model.pieces) if piece.kind == PieceKind.NORMAL}
    merges = []
    for piece in sorted(ids, key=lambda piece: (-model.pieces[ids[piece]].score, ids[piece])):
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += sorted(
            (cut for cut in cuts if cut[0] in ids and cut[1] in ids), key=lambda cut: (ids[cut[0]], ids[cut[1]])
        )
    return merges


def _no_text_pattern(model: SentencePieceModel) -> str:
    """The first piece of a part that is "</s>" or "<0x41>" as a whole, which ignore_merges would take for the mark.

    A cut where SentencePiece cuts changes nothing else. Needed beside user-defined pieces only.
    """
    if not model.user_defined or model.algorithm == Algorithm.UNIGRAM:
        return ""
    before = model.user_defined[0]
    found = []
    for text in model.of_kind(*NO_TEXT):
        # Behind a user-defined piece there is no space before the text.
        ids = model.encode(before + text)
        first = model.pieces[ids[ids.index(model.index[before]) + 1]]
        length = len(first.text) if first.kind not in NO_TEXT else 1
        found.append(rf"{_quoted(text[:length])}(?={_quoted(text[length:])}\z)")
    return rf"\A(?:{'|'.join(found)})"


def _normalizer(model: SentencePieceModel) -> Any:
    from tokenizers import Regex
    from tokenizers.normalizers import NFC, Precompiled, Prepend, Replace, Sequence

    steps: list[Any] = []
    if model.charsmap:
        # Precompiled takes a short grapheme (a letter and its marks, "\r\n") for its first character and drops the
        # rest. Composed and then taken apart it has one character at a time, as the rules do.
        breaks = Replace(Regex(r"(?<=[\s\S])(?=[\p{M}\n])"), BREAK)
        steps += [NFC(), breaks, Precompiled(model.charsmap), Replace(BREAK, "")]
    if model.remove_extra_whitespaces:
        mark = f" {SPACE}" if model.escape_whitespaces else " "
        steps += [Replace(Regex(rf"\A +|[{mark}]+\z"), ""), Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(Replace(Regex(r"(?<=[\s\S])\z"), " ") if model.whitespace_as_suffix else Prepend(" "))
    if model.escape_whitespaces:
        steps.append(Replace(" ", SPACE))
    return Sequence(steps)


def _decoder(model: SentencePieceModel) -> Any:
    from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence, Strip

    steps: list[Any] = [Replace(SPACE, " ")]
    if model.byte_fallback:
        steps.append(ByteFallback())
    steps.append(Fuse())
    if model.remove_extra_whitespaces:
        steps.append(Strip(" ", MANY, 0))
    elif model.add_dummy_prefix:
        steps.append(Strip(" ", 1, 0))
    return Sequence(steps)


def _quoted(text: str) -> str:
    """A regular expression of Oniguruma for this text; re.escape is Python's, and escapes spaces too."""
    return re.sub(r"([\\^$.|?*+()\[\]{}\-])", r"\\\1", text)


def _tokenizer_config(marks: dict[str, str], sequence_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": text for name, text in marks.items()},
        "add_bos_token": False,
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
    }


def known_limits(model: TokenizerModel) -> list[str]:
    """What to tell of texts, rarer than the hard strings of verification, that may have other ids in transformers."""
    lines: list[str] = []
    if isinstance(model, TokenizerJsonModel):
        return lines
    if model.charsmap:
        lines.append(
            f"tokenizer: {model.rule} in transformers composes marks by Unicode's order; a text with marks in another "
            "order may have other ids"
        )
    if model.algorithm == Algorithm.UNIGRAM:
        lines.append(
            "tokenizer: transformers sums unigram scores in fp64, SentencePiece in fp32; of two cuts with equal sums "
            "(long runs of one character) it may take the other one"
        )
    return lines


def generation_config(model: TokenizerModel, vocab_size: int) -> dict[str, Any]:
    """generation_config.json: how a text begins and ends; rows of the embedding without a piece are not drawn."""
    names = ("bos", "eos", "pad")
    values: dict[str, Any] = {
        f"{name}_token_id": i for name, i in model.marks.items() if name in names and i is not None
    }
    if vocab_size > model.num_pieces:
        values["suppress_tokens"] = list(range(model.num_pieces, vocab_size))
    return values
