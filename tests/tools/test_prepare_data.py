"""tools/prepare_data.py as it is used: the files it leaves, nothing half made, and its words when input is wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import sentencepiece

from dqt_dist.commands import prepare_data as tool
from dqt_dist.data.indexed import check_indexed, quiet_megatron_import
from dqt_dist.data.python_docs import read_python_docs
from dqt_dist.data.tokenizer import Tokenizer, load_tokenizer
from dqt_dist.errors import EXIT_CODE, RUN_ERROR_EXIT_CODE

with quiet_megatron_import():
    from megatron.core.datasets.indexed_dataset import IndexedDataset

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prepare_data.py"
FILES = {f"{name}{suffix}" for name in ("train", "valid") for suffix in (".bin", ".idx", ".json")} | {"tokenizer.model"}
VOCAB = ("--vocab-size", "400", "--workers", "1")


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
    assert ran("--valid-fraction", 0.05, "--force")
    corpus.write_bytes(gzip.compress(gzip.decompress(corpus.read_bytes()) + jsonl(["One more document."]).encode()))
    assert ran("--force") and digests(output) != before


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
    both = ("--input", corpus, tmp_path / "bad.jsonl.gz", "--workers", 1, "--force", "--output")
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
    half_written = output / ".train.partial" / "train.bin"
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
    assert {p.name for p in output.iterdir()} == {".train.partial", ".valid.partial"}
    assert prepare(*arguments) == 0
    assert {p.name for p in output.iterdir()} == FILES


def errors_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a run that failed."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare_data: ")]
    return line


def test_nothing_of_another_preparation_is_replaced_without_force(corpus: Path, texts, tmp_path: Path, capsys):
    output, other = tmp_path / "out", tmp_path / "other.jsonl"
    other.write_text(jsonl(texts[:100]))
    assert prepare("--input", corpus, *VOCAB, "--output", output) == 0
    before = digests(output)
    model = output / "tokenizer.model"
    for arguments, message in (
        (("--input", other, *VOCAB), "train.json is of another preparation"),  # other text
        (("--input", other, "--tokenizer", model, "--workers", 1), "train.json is of another preparation"),
        (("--input", corpus, *VOCAB, "--valid-fraction", 0.05), "train.json is of another preparation"),
    ):
        assert prepare(*arguments, "--output", output) == EXIT_CODE
        assert message in errors_of(capsys) and digests(output) == before
    for path in output.glob("*.json"):
        path.unlink()  # as Megatron's own tool leaves its files
    assert prepare("--input", corpus, *VOCAB, "--output", output) == EXIT_CODE
    assert "train.bin is of another preparation" in errors_of(capsys)
    for path in output.iterdir():
        if path != model:
            path.unlink()
    assert prepare("--input", other, "--vocab-size", 390, "--workers", 1, "--output", output) == EXIT_CODE
    assert "another tokenizer.model lies there" in errors_of(capsys)
    assert digests(output) == {"tokenizer.model": before["tokenizer.model"]}
    assert prepare("--input", other, "--vocab-size", 390, "--workers", 1, "--output", output, "--force") == 0
    assert set(digests(output)) == FILES and digests(output)["tokenizer.model"] != before["tokenizer.model"]


def test_two_names_at_once_into_one_folder_and_one_name_by_one_process(texts, tmp_path: Path):
    """Both names are whole; whoever comes second for a name hears who has it, also when the first hangs."""
    output, model = tmp_path / "out", tmp_path / "model" / "tokenizer.model"
    for name, copies in (("a", 12), ("b", 2)):
        (tmp_path / f"{name}.jsonl").write_text(jsonl([f"{name} {text}" for text in texts] * copies))
    assert prepare("--input", tmp_path / "b.jsonl", *VOCAB, "--output", model.parent) == 0

    def command(name: str) -> list[str]:
        arguments = ("--input", tmp_path / f"{name}.jsonl", "--name", name, "--tokenizer", model, "--output", output)
        return [sys.executable, str(TOOL), *map(str, arguments), "--workers", "1", "--valid-fraction", "0"]

    first = subprocess.Popen(command("a"), stderr=subprocess.DEVNULL)
    half_written, deadline = output / ".a.partial" / "a.bin", time.monotonic() + 60
    while not (half_written.exists() and half_written.stat().st_size):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    try:
        assert subprocess.run(command("b"), capture_output=True).returncode == 0
        again = subprocess.run(command("a"), capture_output=True, text=True)
    finally:
        first.send_signal(signal.SIGCONT)
    assert again.returncode == EXIT_CODE
    assert f"in use by tools/prepare_data.py --name a (process {first.pid} on " in again.stderr
    assert first.wait(timeout=60) == 0
    assert set(digests(output)) == {f"{n}.{s}" for n in "ab" for s in ("bin", "idx", "json")} | {"tokenizer.model"}
    tokenizer = load_tokenizer(model)
    for name, copies in (("a", 12), ("b", 2)):
        assert texts_of(output / name, tokenizer) == [f"{name} {text}" for text in texts] * copies


def train_model(path: Path, texts: list[str], **options: object) -> Path:
    settings = {"model_type": "bpe", "vocab_size": 400, "normalization_rule_name": "identity", "minloglevel": 2}
    settings |= {"remove_extra_whitespaces": False, "byte_fallback": True, "character_coverage": 0.99}
    settings |= {"allow_whitespace_only_pieces": True}
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=file, **settings | options)
    return path


LOSSY = {
    "no_bytes": ({"byte_fallback": False, "vocab_size": 150}, r"tokens are unknown, .* newlines; for example '"),
    "no_newlines": (
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        r"\b0 of [\d,]+ \(0 %\) tokens are unknown, .* ([\d,]+) of \1 \(100 %\) newlines; for example '",
    ),
    "lower_case": ({"normalization_rule_name": "nfkc_cf"}, r"\(0 %\) tokens are unknown, .* comes back as '"),
}


@pytest.mark.parametrize("name", LOSSY)
def test_tokenizer_that_loses_text_is_refused_unless_told(texts, tmp_path: Path, capsys, name: str):
    options, message = LOSSY[name]
    model = train_model(tmp_path / "lossy.model", texts, **options)
    (tmp_path / "in.jsonl").write_text(jsonl([f"{a}\n\n  {b}" for a, b in pairwise(texts)]))
    arguments = ("--input", tmp_path / "in.jsonl", "--tokenizer", model, "--workers", 1, "--output")
    assert prepare(*arguments, tmp_path / "out") == EXIT_CODE
    error = errors_of(capsys)
    assert f"tokenizer {model}: text does not come back" in error and re.search(message, error), error
    assert digests(tmp_path / "out") == {}
    assert prepare(*arguments, tmp_path / "out", *error.split()[-2:]) == 0  # the share that the message gives
    assert re.search(f"lost in the tokenizer: .*{message}", capsys.readouterr().out)
    good = train_model(tmp_path / "good.model", texts)  # negative control: the same with bytes and as it is written
    assert prepare("--input", tmp_path / "in.jsonl", "--tokenizer", good, *VOCAB[2:], "--output", tmp_path / "b") == 0
    assert "lost" not in capsys.readouterr().out


def test_loss_is_refused_early_and_not_only_at_the_end(texts, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "_CHARACTERS_TO_JUDGE_BY", 100_000)
    monkeypatch.setattr("dqt_dist.data.indexed._BATCH_CHARACTERS", 50_000)
    model = train_model(tmp_path / "lossy.model", texts, normalization_rule_name="nfkc_cf")
    (tmp_path / "in.jsonl").write_text(jsonl(texts * 10))
    arguments = ("--input", tmp_path / "in.jsonl", "--tokenizer", model, "--workers", 1, "--output", tmp_path / "out")
    assert prepare(*arguments) == EXIT_CODE
    found = re.search(r"in ([\d,]+) documents", errors_of(capsys))
    assert found and int(found[1].replace(",", "")) < len(texts) * 5


def test_bad_rows_are_left_out_and_counted_in_the_manifest(texts, tmp_path: Path, capsys):
    lines = jsonl(texts).splitlines()
    lines[7:7], lines[90:90] = ['{"text": "cut'], ['{"text": "x\\ud800"}', '{"body": 1}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    for tokenizer in (VOCAB, ("--tokenizer", tmp_path / "out" / "tokenizer.model", *VOCAB[2:])):
        arguments = ("--input", tmp_path / "in.jsonl", *tokenizer, "--output", tmp_path / "out")
        assert prepare(*arguments, "--force") == EXIT_CODE
        assert "in.jsonl, line 8: is not one JSON object" in errors_of(capsys)
        assert prepare(*arguments, "--force", "--skip-bad-rows") == 0
        assert "out/train: 3 bad rows were left out" in capsys.readouterr().out
    counts = [json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("train", "valid")]
    assert [count["skipped_rows"] for count in counts] == [3, 0]
    assert sum(count["documents"] for count in counts) == len(texts)


def limit_file_size() -> None:
    """What a full disk or a quota does to a write, on any machine and for any user: the error has another number."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_disk_that_is_full_or_read_only_is_one_message(corpus: Path, tmp_path: Path):
    assert prepare("--input", corpus, *VOCAB, "--output", tmp_path / "model") == 0
    (tmp_path / "file").touch()
    arguments = ("--input", corpus, "--tokenizer", tmp_path / "model" / "tokenizer.model", "--workers", 1, "--output")
    for output, exit_code, message in (
        (tmp_path / "full", RUN_ERROR_EXIT_CODE, "File too large; when that is mended, run the same command again"),
        (Path("/sys/dqt_dist"), EXIT_CODE, "; give another path"),  # which nobody can write, not even root
        (tmp_path / "file" / "out", EXIT_CODE, "Not a directory; give another path"),
        (tmp_path / "file", EXIT_CODE, "; give another path"),
    ):
        command = [sys.executable, TOOL, *map(str, arguments), output]
        limit = limit_file_size if output.name == "full" else None
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
        assert done.returncode == exit_code and "Traceback" not in done.stderr, done.stderr
        assert f"prepare_data: {output}" in done.stderr and message in done.stderr, done.stderr
    assert digests(tmp_path / "full") == {}


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('{"text": "x"}', ["--vocab-size", "400", "--input", "none.jsonl"], "--input none.jsonl: no such file"),
        ('{"body": "x"}', ["--vocab-size", "400"], "has no key 'text'; it has 'body'. Set --text-key"),
        ('{"text": " "}', ["--vocab-size", "400"], "holds no document with text"),
        ('{"text": "hello there"}', ["--vocab-size", "400", "--valid-fraction", "0"], "yields at most"),
        ('{"text": "hello there"}', ["--vocab-size", "9", "--valid-fraction", "0"], "need at least"),
        ('{"text": "hello there"}', ["--tokenizer", "none.model"], "none.model: no such file"),
        (
            '{"text": "hello there"}',
            ["--tokenizer", "in.jsonl"],
            'in.jsonl: not a tokenizer.json of Hugging Face: it has no "model"',
        ),
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
