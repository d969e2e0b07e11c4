"""Exports of real SentencePiece models of every kind: the ids, or a refusal by the name of the property."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import gguf
import pytest
import sentencepiece
from transformers import AutoTokenizer, GenerationConfig

from dqt_dist.data.tokenizer import load_tokenizer
from dqt_dist.errors import EXIT_CODE, UserError
from dqt_dist.export.convert import HF_FORMATS
from dqt_dist.export.errors import VerificationError
from dqt_dist.export.gguf_file import FILE
from dqt_dist.export.gguf_tokenizer import add_tokenizer, gguf_tokenizer
from dqt_dist.export.sentencepiece_model import SPACE, PieceKind, SentencePieceModel
from dqt_dist.export.tokenizer_check import check_gguf, check_hf
from dqt_dist.export.tokenizer_files import generation_config, write_tokenizer
from dqt_dist.export.tokenizer_model import read_tokenizer, refuse
from tests.export.conftest import Trained, convert

PIECES = 420
ROWS = 432
LINES = [line for text in [*list(topics.values())[:40], "\u4f60\u597d \u00e9"] for line in text.split("\n") if line]
DEFAULTS = {
    **{"model_type": "bpe", "vocab_size": PIECES, "byte_fallback": True, "character_coverage": 0.9995},
    **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    **{"split_digits": True, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "minloglevel": 2},
}
USER_DEFINED = ["<sep>", "\n", "  ", "<|a.b*|>", "ab"]
NFKC = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True, "allow_whitespace_only_pieces": False}
BOTH: dict[str, dict] = {
    "plain": {},
    "other ids": {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
    "no bos, other names": {"unk_id": 5, "eos_id": 7, "bos_id": -1, "pad_id": 3, "eos_piece": "<|end|>"},
    "no prefix": {"add_dummy_prefix": False},
    "user-defined, no prefix": {"add_dummy_prefix": False, "user_defined_symbols": ["<sep>", "\n", "<|a.b*|>"]},
    "user-defined, one begins with another": {
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<a>", "<a><b>", "<b>", "abc", "cd"],
    },
    "control": {"control_symbols": ["<ctl>", "[X]"]},
    "char": {"model_type": "char"},
}
ONLY_HF: dict[str, tuple[dict, str]] = {
    "nmt_nfkc": (NFKC, 'normalization_rule_name is "nmt_nfkc"'),
    "nfkc_cf": ({"normalization_rule_name": "nfkc_cf"}, 'normalization_rule_name is "nfkc_cf"'),
    "extra spaces": ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is true"),
    "suffix": ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix is true"),
    "no bytes": ({"byte_fallback": False}, "byte_fallback is false"),
    "user-defined": ({"user_defined_symbols": USER_DEFINED}, "add_dummy_prefix is true beside user-defined pieces"),
    "user-defined spaces": (
        {"user_defined_symbols": ["  "], "add_dummy_prefix": False},
        "user-defined pieces hold spaces",
    ),
    "user-defined overlap": (
        {"user_defined_symbols": ["<a>", "a><b>"], "add_dummy_prefix": False},
        "user-defined pieces overlap: in '<a><b>' '<a>' comes first and 'a><b>' is no shorter",
    ),
    "unigram": (NFKC | {"model_type": "unigram"}, 'model_type is "unigram"'),
}
Make = Callable[..., SentencePieceModel]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(settings): the model that SentencePiece trains with them, each once."""

    @functools.cache
    def train(settings: str) -> SentencePieceModel:
        written = io.BytesIO()
        options = DEFAULTS | json.loads(settings)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=written, **options)
        path = tmp_path_factory.mktemp("model") / "tokenizer.model"
        path.write_bytes(written.getvalue())
        return read_tokenizer(load_tokenizer(path))

    return lambda settings: train(json.dumps(settings))


def hf_folder(model: SentencePieceModel, folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    write_tokenizer(folder, model, 96)
    (folder / "generation_config.json").write_text(json.dumps(generation_config(model, ROWS)))
    return folder


def gguf_file(model: SentencePieceModel, path: Path, **changed: list) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    add_tokenizer(writer, model, ROWS)
    for key, values in changed.items():
        writer.kv_data[0][f"tokenizer.ggml.{key}"].value = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def of_pieces(model: SentencePieceModel) -> list[str]:
    """The text of every piece, alone and with spaces."""
    texts = [piece.text.replace(SPACE, " ") for piece in model.pieces]
    return [*texts, *(f" {text}  {text}" for text in texts)]


# ---- Hugging Face ----


@pytest.mark.parametrize("name", [*BOTH, *ONLY_HF])
def test_transformers_has_the_ids_and_marks_of_the_model(make: Make, tmp_path: Path, name: str) -> None:
    model = make(BOTH[name] if name in BOTH else ONLY_HF[name][0])
    for export_format in HF_FORMATS:
        refuse(model, export_format)
    assert "transformers gives SentencePiece's ids" in check_hf(hf_folder(model, tmp_path), model)
    exported = AutoTokenizer.from_pretrained(tmp_path, model_max_length=10**9)
    for text in of_pieces(model):
        assert exported(text)["input_ids"] == model.encode(text), text
    marks = exported.bos_token_id, exported.eos_token_id, exported.unk_token_id, exported.pad_token_id
    assert marks == (model.bos_id, model.eos_id, model.unk_id, model.pad_id)
    generation = GenerationConfig.from_pretrained(tmp_path)
    ids = generation.bos_token_id, generation.eos_token_id, generation.pad_token_id
    assert ids == (model.bos_id, model.eos_id, model.pad_id)
    assert generation.suppress_tokens == list(range(len(model.pieces), ROWS))


# ---- GGUF ----


@pytest.mark.parametrize("name", BOTH)
def test_gguf_keys_have_the_ids_and_marks_of_the_model(make: Make, tmp_path: Path, name: str) -> None:
    model = make(BOTH[name])
    refuse(model, "gguf")
    path = gguf_file(model, tmp_path / FILE)
    assert "SentencePiece's ids on" in check_gguf(path, model)
    tokenizer = gguf_tokenizer(path)
    for text in of_pieces(model):
        assert tokenizer.encode(text) == model.encode(text), text
    fields = gguf.GGUFReader(path).fields
    found = {
        name: fields[key].contents() if (key := f"tokenizer.ggml.{name}_token_id") in fields else None
        for name in ("bos", "eos", "unknown", "padding")
    }
    begin = model.eos_id if model.bos_id is None else model.bos_id
    assert found == {"bos": begin, "eos": model.eos_id, "unknown": model.unk_id, "padding": model.pad_id}
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds == [*(piece.kind for piece in model.pieces), *[PieceKind.UNUSED] * (ROWS - len(model.pieces))]


@pytest.mark.parametrize("name", ONLY_HF)
def test_gguf_refuses_by_the_name_of_the_property(make: Make, tmp_path: Path, name: str) -> None:
    """The control: written in spite of it, the ids are others, or a byte has no token."""
    settings, message = ONLY_HF[name]
    model = make(settings)
    with pytest.raises(UserError, match="use hf-bitnet, hf-compressed or hf") as refusal:
        refuse(model, "gguf")
    assert message in str(refusal.value)
    with pytest.raises((VerificationError, KeyError)):
        check_gguf(gguf_file(model, tmp_path / FILE), model)


def test_user_defined_pieces_of_equal_length_that_overlap_are_refused(make: Make) -> None:
    """llama.cpp sorts them by their bytes with an unstable sort: which one it cuts out first is not known."""
    overlapping = {"add_dummy_prefix": False, "user_defined_symbols": ["ab", "bc"]}
    with pytest.raises(UserError, match="user-defined pieces overlap: in 'abc' 'ab' comes first"):
        refuse(make(overlapping), "gguf")
    refuse(make(overlapping | {"user_defined_symbols": ["abx", "xy"]}), "gguf")  # control: the first is longer


def test_what_no_format_expresses(make: Make, tmp_path: Path) -> None:
    rules = tmp_path / "rules.tsv"
    rules.write_text("61\t62\n")
    changed = NFKC | {"user_defined_symbols": ["\uff21"]}
    for settings, message in (
        ({"model_type": "word"}, 'model_type is "word"'),
        ({"normalization_rule_tsv": str(rules)}, "normalisation rules of your own"),
        (changed, "its normalisation changes the text of the user-defined pieces"),
    ):
        for export_format in (*HF_FORMATS, "gguf"):
            with pytest.raises(UserError, match="no format expresses it") as refusal:
                refuse(make(settings), export_format)
            assert message in str(refusal.value)


# ---- verification finds differences ----


def test_a_difference_is_told_with_the_string_and_both_lists(make: Make, tmp_path: Path) -> None:
    model = make({})
    hf_folder(model, tmp_path)
    fast = json.loads((tmp_path / "tokenizer.json").read_text())
    fast["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast))
    with pytest.raises(VerificationError) as refusal:
        check_hf(tmp_path, model)
    told = str(refusal.value)
    text = next(line.split(maxsplit=1)[1] for line in told.splitlines() if line.strip().startswith("text"))
    assert f"SentencePiece  {model.encode(eval(text))}" in told and "\n  transformers   [" in told
    scores = [-piece.score for piece in model.pieces]
    with pytest.raises(VerificationError, match="GGUF keys gives other ids"):
        check_gguf(gguf_file(model, tmp_path / "scores.gguf", scores=scores), model)


def test_the_text_of_a_mark_that_llama_cpp_would_join_is_found(make: Make, tmp_path: Path) -> None:
    """llama.cpp joins letters to any token that has their text. Here a word of the text is the name of a mark."""
    model = make({"bos_piece": "the"})
    with pytest.raises(VerificationError, match=r"text +'athe b thethec'"):
        check_gguf(gguf_file(model, tmp_path / FILE), model)


# ---- the whole command ----


@pytest.mark.parametrize("export_format", ["hf", "gguf"])
def test_the_command_speaks_the_tokenizer_it_is_given(
    make: Make, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture, export_format: str
) -> None:
    model = make(BOTH["other ids"] | {"vocab_size": 400})
    output = tmp_path / "out"
    arguments = ("--checkpoint", trained(), "--tokenizer", model.path, "--output", output, "--format", export_format)
    assert convert(*arguments) == 0
    assert "SentencePiece's ids on" in capsys.readouterr().out
    if export_format == "hf":
        config = json.loads((output / "config.json").read_text())
        assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [2, 1, 0]


def test_the_command_refuses_before_it_writes(
    make: Make, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = make({"treat_whitespace_as_suffix": True, "vocab_size": 400})
    arguments = ("--checkpoint", trained(), "--tokenizer", model.path, "--output", tmp_path / "out")
    assert convert(*arguments, "--format", "gguf", "--no-verify") == EXIT_CODE
    assert "treat_whitespace_as_suffix is true" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
