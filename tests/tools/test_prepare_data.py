"""tools/prepare_data.py as it is used: the files it leaves, nothing half made, and its words when input is wrong."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dqt_dist.data.indexed import check_indexed, quiet_megatron_import
from dqt_dist.data.python_docs import read_python_docs
from dqt_dist.data.tokenizer import Tokenizer, load_tokenizer
from dqt_dist.errors import EXIT_CODE

with quiet_megatron_import():
    from megatron.core.datasets.indexed_dataset import IndexedDataset

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prepare_data.py"
FILES = {f"{name}{suffix}" for name in ("train", "valid") for suffix in (".bin", ".idx", ".json")} | {"tokenizer.model"}
VOCAB = ("--vocab-size", "400", "--workers", "1")

spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def prepare(*arguments: object) -> int:
    return tool.main([str(argument) for argument in arguments])


def jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def texts_of(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    indexed = IndexedDataset(str(prefix))
    return [tokenizer.decode(indexed[i][:-1]) for i in range(len(indexed))]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A few hundred paragraphs of real prose, those of json, email and unittest in Python's library."""
    folder = tmp_path_factory.mktemp("modules")
    for package in ("email", "unittest", "json"):
        (folder / package).symlink_to(Path(json.__file__).parents[1] / package)
    found = [
        p
        for package in ("email", "json", "unittest")
        for d in read_python_docs(folder / package)
        for p in d.split("\n\n")
    ]
    assert len(found) > 300
    return found


@pytest.fixture
def corpus(texts: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(texts).encode()))
    return path


def test_same_bytes_for_one_worker_and_four_and_all_documents_in_order(
    corpus: Path, texts, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("dqt_dist.data.indexed._BATCH_CHARACTERS", 2000)  # many batches, so that processes overtake
    for workers in (1, 4):
        output = tmp_path / f"out{workers}"
        assert prepare("--input", corpus, "--vocab-size", 400, "--output", output, "--workers", workers) == 0
    assert digests(tmp_path / "out1") == digests(tmp_path / "out4")
    assert set(digests(tmp_path / "out1")) == FILES
    tokenizer = load_tokenizer(output / "tokenizer.model")
    train, valid = (texts_of(output / name, tokenizer) for name in ("train", "valid"))
    assert 0 < len(valid) < len(texts) / 10
    held_out = set(valid)
    assert train == [text for text in texts if text not in held_out]
    assert valid == [text for text in texts if text in held_out]
    check_indexed(output / "train", where="data.train[0].path", vocab_size=400, tokenizer=tokenizer)


def test_held_out_documents_stay_when_documents_are_added_or_moved(corpus: Path, texts, tmp_path: Path):
    assert prepare("--input", corpus, *VOCAB, "--output", tmp_path / "a", "--valid-fraction", 0.1) == 0
    (tmp_path / "half.jsonl").write_text(jsonl(texts[: len(texts) // 2][::-1]))
    model = tmp_path / "a" / "tokenizer.model"
    arguments = ("--tokenizer", model, "--workers", 1, "--valid-fraction", 0.1)
    assert prepare("--input", tmp_path / "half.jsonl", *arguments, "--output", tmp_path / "b") == 0
    everything, half = (set(texts_of(tmp_path / name / "valid", load_tokenizer(model))) for name in ("a", "b"))
    assert half == everything & set(texts[: len(texts) // 2])
    assert 0 < len(half) < len(everything)


def test_nothing_is_done_again_unless_something_changed(corpus: Path, tmp_path: Path, capsys):
    output = tmp_path / "out"
    arguments = ("--input", corpus, *VOCAB, "--output", output)

    def ran(*more: object) -> bool:
        capsys.readouterr()
        assert prepare(*arguments, *more) == 0
        return "up to date" not in capsys.readouterr().out

    assert ran()
    before = digests(output)
    assert not ran()
    assert ran("--force")
    assert digests(output) == before
    (output / "valid.idx").unlink()
    assert ran() and digests(output) == before
    os.truncate(output / "train.bin", 100)
    assert ran() and digests(output) == before
    assert ran("--valid-fraction", 0.05)
    corpus.write_bytes(gzip.compress(gzip.decompress(corpus.read_bytes()) + jsonl(["One more document."]).encode()))
    assert ran() and digests(output) != before


def test_validation_files_of_their_own(corpus: Path, texts, tmp_path: Path):
    (tmp_path / "v.jsonl").write_text(jsonl(["The validation text is here.", "There is more of it."]))
    output = tmp_path / "out"
    assert prepare("--input", corpus, "--valid-input", tmp_path / "v.jsonl", *VOCAB, "--output", output) == 0
    tokenizer = load_tokenizer(output / "tokenizer.model")
    assert texts_of(output / "valid", tokenizer) == ["The validation text is here.", "There is more of it."]
    assert texts_of(output / "train", tokenizer) == texts
    assert prepare("--input", corpus, *VOCAB, "--valid-fraction", 0, "--output", tmp_path / "none") == 0
    assert set(digests(tmp_path / "none")) == {name for name in FILES if not name.startswith("valid")}


def test_second_corpus_shares_the_tokenizer_and_may_not_replace_it(corpus: Path, texts, tmp_path: Path, capsys):
    output = tmp_path / "out"
    (tmp_path / "book.txt").write_text("\n\n".join(texts))
    assert prepare("--input", corpus, *VOCAB, "--output", output) == 0
    before = digests(output)
    second = (
        "--input",
        tmp_path / "book.txt",
        "--name",
        "book",
        "--output",
        output,
        "--workers",
        1,
        "--valid-fraction",
        0,
    )
    assert prepare(*second, "--vocab-size", 390) == EXIT_CODE
    assert "train.json was prepared with the tokenizer that lies there" in capsys.readouterr().err
    assert digests(output) == before
    assert prepare(*second, "--tokenizer", output / "tokenizer.model") == 0
    assert set(digests(output)) == FILES | {"book.bin", "book.idx", "book.json"}
    assert {name: digest for name, digest in digests(output).items() if name in FILES} == before


def test_input_that_fails_half_way_leaves_what_was_there(corpus: Path, texts, tmp_path: Path, capsys):
    output = tmp_path / "out"
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(jsonl(texts * 20).encode())[:-500])
    both = ("--input", corpus, tmp_path / "bad.jsonl.gz", "--workers", 1, "--output")
    assert prepare("--input", corpus, *VOCAB, "--output", output) == 0
    before = digests(output)
    # With a given tokenizer the damage is met while tokens are being written.
    assert prepare(*both, output, "--tokenizer", output / "tokenizer.model") == EXIT_CODE
    assert "bad.jsonl.gz" in capsys.readouterr().err
    assert digests(output) == before
    assert prepare(*both, tmp_path / "new", "--tokenizer", output / "tokenizer.model") == EXIT_CODE
    assert digests(tmp_path / "new") == {}


def test_killed_run_leaves_neither_final_names_nor_processes_and_the_next_completes(texts, tmp_path: Path):
    output, path = tmp_path / "out", tmp_path / "long.jsonl"
    path.write_text(jsonl(texts * 25))
    assert prepare("--input", path, "--output", tmp_path / "model", *VOCAB, "--valid-fraction", 0) == 0
    arguments = (
        "--input",
        path,
        "--tokenizer",
        tmp_path / "model" / "tokenizer.model",
        "--workers",
        "1",
        "--output",
        output,
    )
    run = subprocess.Popen([sys.executable, TOOL, *arguments], stderr=subprocess.DEVNULL)
    half_written = output / tool.SCRATCH / "train.bin"
    deadline = time.monotonic() + 60
    while not (half_written.exists() and half_written.stat().st_size):
        assert run.poll() is None and time.monotonic() < deadline, (
            "the run ended, or did nothing, before it could be killed"
        )
        time.sleep(0.01)
    workers = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert workers and not psutil.wait_procs(workers, timeout=20)[1]
    assert [p.name for p in output.iterdir()] == [tool.SCRATCH]
    assert prepare(*arguments) == 0
    assert {p.name for p in output.iterdir()} == FILES


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('{"text": "x"}', ["--vocab-size", "400", "--input", "none.jsonl"], "--input none.jsonl: no such file"),
        ('{"body": "x"}', ["--vocab-size", "400"], "has no key 'text'; it has 'body'. Set --text-key"),
        ('{"text": " "}', ["--vocab-size", "400"], "holds no document with text"),
        ('{"text": "hello there"}', ["--vocab-size", "400", "--valid-fraction", "0"], "yields at most"),
        ('{"text": "hello there"}', ["--vocab-size", "9", "--valid-fraction", "0"], "need at least"),
        ('{"text": "hello there"}', ["--tokenizer", "none.model"], "none.model: no such file"),
        ('{"text": "hello there"}', ["--tokenizer", "in.jsonl"], "in.jsonl: not a SentencePiece model file"),
        ('{"text": "hello hello"}', ["--vocab-size", "266"], "of 1 document(s) this leaves none for validation"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path: Path, monkeypatch, capsys, content, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text(content + "\n")
    given = [] if "--input" in arguments else ["--input", "in.jsonl"]
    assert prepare(*given, *arguments, "--output", "out", "--workers", "1") == EXIT_CODE
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare_data: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not Path("out").exists() or not list(Path("out").iterdir())


def test_command_line_mistakes_are_exit_code_2(capsys):
    for arguments in (
        ["--workers", "0"],
        ["--valid-fraction", "1"],
        ["--name", "a/b"],
        ["--hf-dataset", "x"],
        ["--vocab-size", "0"],
    ):
        with pytest.raises(SystemExit) as caught:
            prepare("--input", "a.txt", "--vocab-size", 400, "--output", "out", *arguments)
        assert caught.value.code == EXIT_CODE
        assert arguments[0] in capsys.readouterr().err
