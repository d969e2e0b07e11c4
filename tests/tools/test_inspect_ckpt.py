"""tools/inspect_ckpt.py as a user calls it: what is inside, --digest, --verify, --plot, and bad input."""

from __future__ import annotations

import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dqt_dist.checkpoint.digest import digest
from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.commands import inspect_ckpt
from dqt_dist.errors import EXIT_CODE
from dqt_dist.lowbit.grid import make_grid
from tests import forked
from tests.checkpoint.states import progress_at, whole_tensors, write
from tests.distributed import run_distributed

SCRIPT = Path(__file__).resolve().parents[2] / "tools/inspect_ckpt.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of step 7."""
    folder = tmp_path_factory.mktemp("run")
    run_distributed(write, 2, str(folder), [7])
    return folder


def test_the_command_shows_what_is_inside(run: Path) -> None:
    done = forked.run([SCRIPT, run])
    assert (done.returncode, done.stderr) == (0, "")
    words = " ".join(done.stdout.split())
    assert f"checkpoint {run}/checkpoints/step_00000007" in words
    assert "step 7 of 10, 700 tokens, 84 samples" in words
    assert "dqt, bits ternary" in words and "written by data 2" in words
    row = next(line for line in done.stdout.splitlines() if "layers.0.mlp.up_proj" in line)
    for cell in ("48 x 32", "1.58", "0.25", "25.0%", "50.0%", "0.0625", "0.0%"):
        assert cell in row
    assert "1,536 low-bit weights" in words and "in fp16 3,072 bytes" in words


@pytest.mark.parametrize("width", [60, 180])
def test_a_narrow_terminal_cuts_nothing(run: Path, width: int) -> None:
    (matrix,) = inspect_ckpt.read_matrices(CheckpointReader(run), make_grid("ternary"))[:1]
    names = [f"layers.10.mlp.{part}_proj" for part in ("gate", "up", "down")]
    table = inspect_ckpt.matrix_table([replace(matrix, name=name) for name in names], make_grid("ternary"))
    shown = StringIO()
    inspect_ckpt.print_whole(Console(file=shown, width=width), table)
    rows = [line.split() for line in shown.getvalue().splitlines() if "_proj" in line]
    assert [row[0] for row in rows] == names
    assert all(
        row[1:4] == [str(matrix.rows), "x", str(matrix.columns)] and row[-1].endswith("%") and len(row) == 14
        for row in rows
    )
    assert max(map(len, shown.getvalue().splitlines())) <= max(width, 150)


def test_digest_ends_with_the_total_alone(run: Path, capsys: pytest.CaptureFixture) -> None:
    wanted = digest(whole_tensors().items(), progress_at(7))
    for path in (run, run / "checkpoints", run / "checkpoints" / "step_00000007"):
        assert inspect_ckpt.main([str(path), "--digest"]) == 0
        *parts, total = capsys.readouterr().out.splitlines()
        assert total == wanted.total and len(total) == 64
        assert [line.split() for line in parts] == [list(pair) for pair in wanted.parts.items()]


def test_verify_says_what_it_checked(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert inspect_ckpt.main([str(run), "--verify"]) == 0
    folder = run / "checkpoints" / "step_00000007"
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")
    assert f"{folder}: whole, {size:,} bytes checked" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--digest"], ["--verify"]])
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert inspect_ckpt.main([str(tmp_path), *arguments]) == EXIT_CODE
    out, errors = capsys.readouterr()
    assert out == "" and errors.startswith(f"inspect_ckpt: {tmp_path}: no complete checkpoint there")
    assert len(errors.splitlines()) == 1


def test_plot_draws_a_png(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "codes.png"
    assert inspect_ckpt.main([str(run), "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_plot_names_what_is_missing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what an import finds when it is not installed
    cases = {"a.png": "--plot needs matplotlib", "a.jpg": "must end in .png", "no/a.png": "does not exist"}
    for name, message in cases.items():
        assert inspect_ckpt.main([str(run), "--plot", str(tmp_path / name)]) == EXIT_CODE
        assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_histogram_has_the_shape_of_the_codes() -> None:
    low, high = inspect_ckpt.BARS[0], inspect_ckpt.BARS[-1]
    grid = make_grid(3)
    counts = torch.tensor([0, 0, 5, 10, 10, 5, 0, 0])
    assert len(counts) == grid.qmax - grid.qmin + 1
    middle = inspect_ckpt.BARS[4]  # half of 7 steps, rounded to even
    assert inspect_ckpt.histogram(counts) == low * 2 + middle + high * 2 + middle + low * 2
    eight_bits = torch.zeros(256, dtype=torch.int64)
    eight_bits[16:32] = 3  # the second of 16 bars
    assert inspect_ckpt.histogram(eight_bits) == low + high + low * 14
