"""tools/prepare_data.py with a tokenizer.json: the files it leaves, what ends a document, and its words."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from dqt_dist.data.tokenizer import load_tokenizer
from dqt_dist.errors import EXIT_CODE
from tests.json_tokenizers import MAKERS, gpt2, special, write
from tests.tools.test_prepare_data import VOCAB, digests, jsonl, prepare, texts_of

FILES = {f"{name}.{suffix}" for name in ("train", "valid") for suffix in ("bin", "idx", "json")} | {"tokenizer.json"}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(topics.values())[:30]


@pytest.fixture
def corpus(texts: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    # What looks like a mark is text.
    path.write_text(jsonl([*texts, "not the end: <|endoftext|></s><|end_of_text|> nor here"] * 8))
    return path


@pytest.mark.parametrize("name", MAKERS)
def test_documents_come_back_whatever_the_number_of_workers(texts, corpus: Path, tmp_path: Path, capsys, name: str):
    given = write(tmp_path / "hub" / "tokenizer.json", MAKERS[name](texts))
    arguments = ("--input", corpus, "--tokenizer", given, "--valid-fraction", 0.3, "--output")
    assert prepare(*arguments, tmp_path / "one", "--workers", 1) == 0
    assert "lost" not in capsys.readouterr().out
    assert prepare(*arguments, tmp_path / "three", "--workers", 3) == 0
    found = digests(tmp_path / "one")
    assert set(found) == FILES and found == digests(tmp_path / "three")
    tokenizer = load_tokenizer(tmp_path / "one" / "tokenizer.json")
    assert tokenizer.sha256 == load_tokenizer(given).sha256 == found["tokenizer.json"]
    manifest = json.loads((tmp_path / "one" / "train.json").read_text())
    assert (manifest["tokenizer_sha256"], manifest["eod_id"]) == (tokenizer.sha256, tokenizer.eod_id)
    both = [text for part in ("train", "valid") for text in texts_of(tmp_path / "one" / part, tokenizer)]
    assert sorted(both) == sorted(json.loads(line)["text"] for line in corpus.read_text().splitlines())
    # Again, also with the file that lies there: nothing is to do.
    capsys.readouterr()
    for again in (given, tmp_path / "one" / "tokenizer.json"):
        assert prepare(*arguments, tmp_path / "one", "--tokenizer", again) == 0
        assert "up to date" in capsys.readouterr().out


def test_one_folder_holds_one_tokenizer_of_either_kind(texts, corpus: Path, tmp_path: Path, capsys):
    given, output = write(tmp_path / "tokenizer.json", gpt2(texts)), tmp_path / "out"
    base = ("--input", corpus, "--output", output, "--valid-fraction", 0.3, "--workers", 1)
    assert prepare(*base, *VOCAB) == 0
    assert prepare(*base, "--name", "more", "--tokenizer", given) == EXIT_CODE
    assert "train.json was prepared with the tokenizer that lies there" in capsys.readouterr().err
    assert prepare(*base, "--tokenizer", given, "--force") == 0
    assert set(digests(output)) == FILES
    assert prepare(*base, *VOCAB) == EXIT_CODE
    capsys.readouterr()
    assert prepare(*base, *VOCAB, "--force") == 0
    assert set(digests(output)) == FILES - {"tokenizer.json"} | {"tokenizer.model"}


def test_the_folder_of_the_tokenizer_may_be_the_output(texts, corpus: Path, tmp_path: Path, capsys):
    """The file that came from elsewhere stays as it is; it is the tokenizer of the data."""
    given = write(tmp_path / "hub" / "tokenizer.json", gpt2(texts))
    before = given.read_bytes()
    arguments = ("--input", corpus, "--tokenizer", given, "--valid-fraction", 0.3, "--workers", 1)
    assert prepare(*arguments, "--output", given.parent) == 0
    assert set(digests(given.parent)) == FILES and given.read_bytes() == before
    manifest = json.loads((given.parent / "train.json").read_text())
    assert manifest["tokenizer_sha256"] == load_tokenizer(given).sha256
    capsys.readouterr()
    assert prepare(*arguments, "--output", given.parent) == 0
    assert "up to date" in capsys.readouterr().out


def test_the_end_of_text_can_be_named(texts, corpus: Path, tmp_path: Path, capsys):
    values = gpt2(texts)
    values["added_tokens"].append(special("</s>", 400))
    given, output = write(tmp_path / "tokenizer.json", values), tmp_path / "out"
    arguments = ("--input", corpus, "--tokenizer", given, "--output", output, "--workers", 1, "--valid-fraction", 0.3)
    assert prepare(*arguments) == EXIT_CODE
    error = capsys.readouterr().err
    assert error.count("prepare_data: ") == 1
    assert "'<|endoftext|>', '</s>' may all be meant. Name it by --end-of-text" in error
    assert not output.exists() or digests(output) == {}
    assert prepare(*arguments, "--end-of-text", "</s>") == 0
    assert load_tokenizer(output / "tokenizer.json").eod_id == 400
    assert prepare(*arguments, "--end-of-text", "<|endoftext|>") == EXIT_CODE  # the data there have another one
    capsys.readouterr()
    model = tmp_path / "model"
    assert prepare("--input", corpus, "--output", model, "--valid-fraction", 0.3, *VOCAB) == 0
    other = ("--tokenizer", model / "tokenizer.model", "--end-of-text", "</s>", "--force")
    assert prepare(*arguments, *other) == EXIT_CODE
    assert "is a SentencePiece model, which names its own (</s>)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refusal:
        prepare("--input", corpus, "--output", model, *VOCAB, "--end-of-text", "</s>")
    assert refusal.value.code == EXIT_CODE
    assert "--end-of-text </s>: is of a tokenizer.json" in capsys.readouterr().err


def no_newlines(values: dict[str, Any]) -> None:
    values["normalizer"] = {"type": "Replace", "pattern": {"String": "\n"}, "content": " "}


def no_bytes(values: dict[str, Any]) -> None:
    values["model"]["byte_fallback"] = False


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2", no_newlines, "(100 %) newlines; for example"),
        ("llama2", no_bytes, "tokens are unknown, and decoding misses"),
        ("gpt2", lambda v: v.update(normalizer={"type": "Lowercase"}), "(0 %) tokens are unknown, and decoding misses"),
    ],
)
def test_one_that_loses_text_is_refused(texts, corpus: Path, tmp_path: Path, capsys, name: str, change, message: str):
    values = MAKERS[name](texts)
    change(values)
    given = write(tmp_path / "tokenizer.json", values)
    arguments = ("--input", corpus, "--tokenizer", given, "--workers", 1, "--output", tmp_path / "out")
    assert prepare(*arguments, "--valid-fraction", 0) == EXIT_CODE
    error = capsys.readouterr().err
    assert f"tokenizer {given}: text does not come back from it" in error and message in error
    assert digests(tmp_path / "out") == {}
