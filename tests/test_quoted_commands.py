"""Commands that the README and the pages quote run: tools on a tiny run, training commands as a dry run.

A tool runs as it is quoted, in a folder that has what the commands name: runs/demo_cpu and runs/1b_ternary (a model of
two steps), runs to compare, a corpus, a book and prepared data. Training commands of any launcher are checked with
--dry-run for as many processes as their layout needs, submissions to SLURM with the --dry-run of theirs; benchmarks and
commands of other programs are not run.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import zstandard

from dqt_dist.commands import prepare_data, submit
from dqt_dist.config import load_config
from tests.config.test_command import run_pretrain
from tests.export.conftest import (
    Trained,
    tokenizer_file,  # noqa: F401
    trained,  # noqa: F401
)
from tests.json_tokenizers import gpt2
from tests.tools.test_compare_runs import write_run

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "configs/README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md")))]
STAND_INS = {
    "FILE": "configs/13b_ternary.json",  # a batch that 8 and 512 processes divide
    # The corpus here is too small for as many pieces.
    "32000": "400",
}
"""Words of quoted commands that stand for something else, and what they stand for here."""


def quoted(page: str) -> Iterator[list[str]]:
    """The words of each indented line that has one of our programs, without what is said about it."""
    for line in re.findall(r"^ {4}(\S.*)$", page, re.MULTILINE):
        command = re.split(r"\s{2,}|\s#", line)[0]
        ours = r"(?:\w+=\S+ )*(?:tools/\w+\.py|launchers/[\w/]+\.py|\w+ .*launchers/pretrain\.py) "
        if re.match(ours, command):
            yield [STAND_INS.get(word, word) for word in shlex.split(command)]


COMMANDS = [(page, command) for page in PAGES for command in quoted((ROOT / page).read_text(encoding="utf-8"))]
TOOLS = {shlex.join(command): command for _, command in COMMANDS if command[0].startswith("tools/")}
SUBMISSIONS = {shlex.join(command): command[1:] for _, command in COMMANDS if command[0].endswith("/submit.py")}
TRAINING = {
    shlex.join(command[index + 1 :]): command[index + 1 :]
    for _, command in COMMANDS
    if "launchers/pretrain.py" in command
    for index in [command.index("launchers/pretrain.py")]
}


def test_the_commands_are_found() -> None:
    """Control: those of the README, of other launchers, and comments left off."""
    assert ["--checkpoint", "runs/1b_ternary", "--output", "export/1b"] in [command[1:] for command in TOOLS.values()]
    assert "--config configs/1b_ternary_fp8.json" in TRAINING
    assert any(command[0] == "torchrun" for _, command in COMMANDS)
    assert len(TOOLS) >= 8 and len(TRAINING) >= 6 and len(SUBMISSIONS) >= 2


@pytest.fixture(scope="module")
def folder(trained: Trained, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """What the commands of tools name."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "runs").mkdir()
    for name in ("demo_cpu", "1b_ternary"):
        (folder / "runs" / name).symlink_to(trained())
    for name in ("a", "b", "ternary", "bf16"):
        write_run(folder / "runs" / name, 0.01)
    paragraphs = [part for text in list(topics.values())[:60] for part in text.split("\n\n")]
    (folder / "book.txt").write_text("\n\n".join(paragraphs[:8]))
    (folder / "corpus").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in paragraphs)
    (folder / "corpus/part.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (folder / "hub").mkdir()
    (folder / "hub/tokenizer.json").write_text(json.dumps(gpt2(paragraphs)))
    output = ("--output", str(folder / "data/demo"), "--name", "valid", "--valid-fraction", "0", "--workers", "1")
    assert prepare_data.main(["--input", str(folder / "book.txt"), "--tokenizer", str(tokenizer_file), *output]) == 0
    return folder


@pytest.mark.parametrize("command", TOOLS.values(), ids=TOOLS)
def test_a_quoted_tool_runs(command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    program, *arguments = command
    tool = importlib.import_module(f"dqt_dist.commands.{Path(program).stem}")
    assert tool.main(arguments) == 0


@pytest.mark.parametrize("arguments", SUBMISSIONS.values(), ids=SUBMISSIONS)
def test_a_quoted_submission_is_valid(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert submit.main([*arguments, "--dry-run"]) == 0


@pytest.mark.parametrize("arguments", TRAINING.values(), ids=TRAINING)
def test_a_quoted_training_command_is_valid(arguments: list[str], tmp_path: Path) -> None:
    config_file = str(ROOT / arguments[arguments.index("--config") + 1])
    overrides = [value for option, value in pairwise(arguments) if option == "--set"]
    parallel = load_config(config_file, overrides).parallel
    words = [config_file if word.startswith("configs/") else word for word in arguments]
    if not {"--dry-run", "--plan", "--suggest"} & set(words):
        words += ["--dry-run", "--world-size", str(parallel.tensor * parallel.pipeline)]
    done = run_pretrain(tmp_path, *words)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout
