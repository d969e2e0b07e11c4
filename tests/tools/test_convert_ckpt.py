"""tools/convert_ckpt.py as it is used: defaults, its words when input is wrong, and nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest

from dqt_dist.errors import EXIT_CODE, RUN_ERROR_EXIT_CODE
from dqt_dist.export import convert as convert_module
from tests import forked
from tests.export.conftest import (
    NUM_STEPS,
    Trained,
    convert,
    digests,
    tokenizer_file,  # noqa: F401
    trained,  # noqa: F401
)

ROOT = Path(__file__).resolve().parents[2]
HF_FILES = {"config.json", "generation_config.json", "model.safetensors", "README.md", "dqt_dist.json"}
HF_FILES |= {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
EIGHT_BITS, NONE, FLOATS = "quantization.bits=8", "quantization.method=none", "quantization.activation=none"


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / f"step_{NUM_STEPS:08d}"


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:  # noqa: F811
    """A copy of a run that a test may damage, in a folder of its own."""
    return shutil.copytree(trained(), tmp_path / "in" / "run")


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))


@pytest.mark.parametrize("export_format", ["hf-bitnet", "gguf"])
def test_a_disk_that_is_full_is_one_message_and_leaves_nothing(run: Path, tmp_path: Path, export_format: str) -> None:
    output = tmp_path / "out" / "export"
    tool = [ROOT / "tools/convert_ckpt.py", "--checkpoint", run, "--output", output, "--format", export_format]
    done = forked.run([*tool, "--no-verify"], prepare=limit_file_size)
    assert done.returncode == RUN_ERROR_EXIT_CODE and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count(f"convert_ckpt: {output.parent}/.export.partial: ") == 1, done.stderr
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "export_format"),
    [((), "hf-bitnet"), ((EIGHT_BITS,), "hf-compressed"), ((NONE,), "hf"), ((FLOATS,), "hf-compressed")],
)
def test_the_default_format_follows_from_the_checkpoint(
    trained: Trained,  # noqa: F811
    tmp_path: Path,
    overrides: tuple[str, ...],
    export_format: str,
) -> None:
    """A run, its checkpoints folder and the checkpoint itself mean the same."""
    run, folders = trained(*overrides), []
    for number, path in enumerate((run, run / "checkpoints", checkpoint_of(run))):
        folders.append(tmp_path / str(number))
        assert convert("--checkpoint", path, "--output", folders[-1], "--no-verify") == 0
    assert digests(folders[0]) == digests(folders[1]) == digests(folders[2]) and set(digests(folders[0])) == HF_FILES
    assert json.loads((folders[0] / "dqt_dist.json").read_text())["format"] == export_format


def test_dtype_is_that_of_the_run_unless_given(trained: Trained, tmp_path: Path) -> None:  # noqa: F811
    for number, (arguments, dtype) in enumerate([((), "float32"), (("--dtype", "bf16"), "bfloat16")]):
        output = tmp_path / str(number)
        assert convert("--checkpoint", trained(), "--output", output, "--no-verify", *arguments) == 0
        assert json.loads((output / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        (
            (EIGHT_BITS,),
            ("--format", "hf-bitnet"),
            "has quantization.bits = 8; use hf-compressed, hf or gguf, or --bits",
        ),
        ((FLOATS,), ("--format", "hf-bitnet"), "was trained with quantization.activation"),
        ((NONE,), ("--format", "hf-bitnet"), "has no codes; use hf or gguf"),
        ((NONE,), ("--format", "hf-compressed"), "has no codes; use hf or gguf"),
        ((NONE,), ("--bits", "ternary"), "no codes"),
        ((), ("--tokenizer", "none.model"), "no file none.model; give the tokenizer of the run"),
        (("model.vocab_size=64",), (), "400 pieces, model.vocab_size is 64: not its tokenizer"),
    ],
)
def test_a_model_that_does_not_fit_is_one_message(
    trained: Trained,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    overrides: tuple,
    arguments: tuple,
    message: str,
) -> None:
    assert convert("--checkpoint", trained(*overrides), "--output", tmp_path / "out", *arguments) == EXIT_CODE
    errors = capsys.readouterr().err
    assert errors.count("convert_ckpt: ") == 1 and message in errors
    assert list(tmp_path.iterdir()) == []


def no_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def half_written(run: Path) -> None:
    (checkpoint_of(run) / "manifest.json").unlink()


def other_version(run: Path) -> None:
    manifest = checkpoint_of(run) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))


def truncated(run: Path) -> None:
    file = next(checkpoint_of(run).glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 100)


def damaged(run: Path) -> None:
    """A file of the right size with other bytes is noticed while it is read, when part of the output exists."""
    file = next(checkpoint_of(run).glob("*.distcp"))
    size = file.stat().st_size
    with open(file, "r+b") as handle:
        handle.seek(size // 10)
        handle.write(os.urandom(size - size // 10))


def missing(run: Path) -> None:
    shutil.rmtree(run)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "no such file or folder"),
        (no_checkpoint, "no complete checkpoint there"),
        (half_written, "no complete checkpoint there"),
        (other_version, "checkpoint format 99, this version reads"),
        (truncated, "the manifest says"),
        (damaged, "the manifest says"),
    ],
)
def test_bad_checkpoints_leave_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, damage, message
) -> None:
    damage(run)
    assert convert("--checkpoint", run, "--output", tmp_path / "out", "--no-verify") == EXIT_CODE
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("summary", "warning"),
    [
        ('{"steps": 2, "valid_loss": 3.5}', ""),
        ('{"steps": 2, "valid_loss": "3.5"}', ""),
        ('{"steps": 2, "valid_l', "not JSON: Unterminated string"),
        ("[" * 100_000, "not JSON that can be read: nested too deeply"),
        ('{"steps": "2"}', "has no number of steps"),
    ],
)
def test_a_damaged_summary_is_a_warning(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, summary: str, warning: str
) -> None:
    (run / "summary.json").write_text(summary)
    assert convert("--checkpoint", run, "--output", tmp_path / "out", "--no-verify") == 0
    told = capsys.readouterr().err
    assert (f"warning: {run}/summary.json: {warning}" in told) if warning else ("summary.json" not in told)
    figures = json.loads((tmp_path / "out" / "dqt_dist.json").read_text())["figures"]
    assert figures == ({"valid_loss": 3.5} if "3.5}" in summary else {})


def test_output_is_never_overwritten(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "mine").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    for output, message in ((full, "is not empty"), (file, "is a file")):
        assert convert("--checkpoint", trained(), "--output", output, "--no-verify") == EXIT_CODE
        assert message in capsys.readouterr().err
    assert (full / "mine").read_text() == file.read_text() == "mine"
    assert convert("--checkpoint", trained(), "--output", empty, "--no-verify") == 0
    assert set(digests(empty)) == HF_FILES


def test_what_a_killed_run_left_is_removed_by_the_next(trained: Trained, tmp_path: Path) -> None:  # noqa: F811
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    assert convert("--checkpoint", trained(), "--output", tmp_path / "out", "--no-verify") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and set(digests(tmp_path / "out")) == HF_FILES


def test_ctrl_c_leaves_nothing(
    trained: Trained,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The signal comes after the tensors are written and before the other files are."""

    def interrupt(*_: object) -> None:
        assert (tmp_path / ".out.partial" / "model.safetensors").exists()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(convert_module.hf, "config_json", interrupt)
    # A shell starts background jobs with the signal ignored, and so may whatever runs these tests.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert convert("--checkpoint", trained(), "--output", tmp_path / "out", "--no-verify") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "nothing was left behind" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_packages_that_are_missing_are_named(
    trained: Trained,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convert_module.importlib.util, "find_spec", lambda name: None)
    assert convert("--checkpoint", trained(), "--output", tmp_path / "out") == EXIT_CODE
    assert "not installed: transformers, accelerate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--checkpoint", "run", "--from-hf", "dir"),
        ("--checkpoint", "run", "--config", "run.json"),
        ("--from-hf", "dir", "--format", "hf"),
        ("--from-hf", "dir", "--bits", "ternary"),
        ("--checkpoint", "run", "--format", "onnx"),
    ],
)
def test_command_line_mistakes_are_exit_code_2(capsys: pytest.CaptureFixture, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        convert("--output", "out", *arguments)
    assert caught.value.code == EXIT_CODE
    assert "usage:" in capsys.readouterr().err
