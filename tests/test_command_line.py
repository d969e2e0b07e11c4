"""How every tool ends: one message and an exit code for an expected failure, a traceback for a defect."""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dqt_dist.command_line import SCRIPTS, RaisingArgumentParser, make_parser, run_tool
from dqt_dist.errors import EXIT_CODE, RUN_ERROR_EXIT_CODE, RunError, UserError, naming, told

ROOT = Path(__file__).parent.parent
AGAIN = "; when that is mended, run the same command again\n"
MEMORY = "; --plan --gpu NAME shows what takes memory, docs/faq.md what lowers it\n"
OTHER_PATH = "; give another path, or the right to use this one\n"


def end_with(error: BaseException | None) -> int:
    def run(_: argparse.Namespace) -> None:
        if error is not None:
            raise error

    return run_tool("dqt-evaluate", run, argparse.Namespace(), interrupted="interrupted; nothing is left")


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (None, 0, ""),
        (UserError("no such file"), EXIT_CODE, "evaluate: no such file\n"),
        (RunError("the loss is nan"), RUN_ERROR_EXIT_CODE, "evaluate: the loss is nan\n"),
        (KeyboardInterrupt(), 130, "evaluate: interrupted; nothing is left\n"),
        (
            OSError(28, "No space left on device", "/out"),
            RUN_ERROR_EXIT_CODE,
            f"evaluate: /out: No space left on device{AGAIN}",
        ),
        (MemoryError(), RUN_ERROR_EXIT_CODE, f"evaluate: out of memory{MEMORY}"),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nx"
            ),
            RUN_ERROR_EXIT_CODE,
            "evaluate: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
            + MEMORY,
        ),
        (OSError(13, "Permission denied", "/out"), EXIT_CODE, f"evaluate: /out: Permission denied{OTHER_PATH}"),
    ],
    ids=str,
)
def test_an_expected_end_is_one_message_and_an_exit_code(
    error: BaseException | None, exit_code: int, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert end_with(error) == exit_code
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize(
    "defect", [ZeroDivisionError(), RuntimeError("a shape"), OSError("of no file"), ConnectionResetError(104, "reset")]
)
def test_a_defect_keeps_its_traceback(defect: Exception) -> None:
    with pytest.raises(type(defect)):
        end_with(defect)


OUTPUT = """
import argparse, sys
from dqt_dist.command_line import print_any_text, run_tool

def run(_):
    for number in range(20000):
        print("figure", number)

if sys.argv[1] == "run":
    print_any_text(may_be_lost=True)
    run(None)
    print("goes on", file=sys.stderr)
else:
    sys.exit(run_tool("dqt-evaluate", run, argparse.Namespace()))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("who", "output", "ends"),
    [
        ("tool", "> /dev/full", (RUN_ERROR_EXIT_CODE, f"evaluate: stdout: No space left on device{AGAIN}")),
        ("tool", "| head -c 9 > /dev/null; exit ${PIPESTATUS[0]}", (141, "")),
        ("tool", ">&-", (0, "")),
        ("run", "> /dev/full", (0, "goes on\n")),
        ("run", "| head -c 9 > /dev/null; exit ${PIPESTATUS[0]}", (0, "goes on\n")),
        ("run", ">&- 2>&-", (0, "")),
    ],
)
def test_an_output_that_takes_no_more_is_an_error_of_a_tool_and_none_of_a_run(
    who: str, output: str, ends: tuple[int, str], unbuffered: str
) -> None:
    line = ["bash", "-c", f'"$0" -c "$1" {who} {output}', sys.executable, OUTPUT]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(line, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == ends


def test_an_error_that_names_no_file_gets_the_name_of_what_was_written() -> None:
    def write(hidden_by: Exception | None, *of_error: object) -> None:
        try:
            raise OSError(*of_error)
        except OSError:
            if hidden_by is None:
                raise
            raise hidden_by  # noqa: B904

    full = (28, "No space left on device")
    for hidden_by, of_error, message in [
        (None, full, f"/out: No space left on device{AGAIN}"),
        (None, (*full, "/other"), f"/other: No space left on device{AGAIN}"),
        (None, ("8192 requested and 20 written",), f"/out: 8192 requested and 20 written{AGAIN}"),  # numpy's
        (RuntimeError("unexpected pos"), full, f"/out: No space left on device{AGAIN}"),  # torch.save's
        (UserError("what is wrong"), full, "what is wrong"),
    ]:
        with pytest.raises((OSError, UserError)) as caught, naming(Path("/out")):
            write(hidden_by, *of_error)
        assert str(told(caught.value)) == message.strip()
    with pytest.raises(RuntimeError, match="a defect"), naming("/out"):
        raise RuntimeError("a defect")


def test_the_launchers_parser_raises_and_the_tools_parser_exits(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="command line: unrecognized arguments: --bad; --help explains"):
        make_parser("dqt-pretrain", None, "", RaisingArgumentParser).parse_args(["--bad"])
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit) as stop:
        make_parser("dqt-evaluate", None, "").parse_args(["--bad"])
    assert stop.value.code == EXIT_CODE and "unrecognized arguments: --bad" in capsys.readouterr().err


TOOLS = {path.stem for path in (ROOT / "dqt_dist/commands").glob("*.py")} - {"__init__", "pretrain"}


@pytest.mark.parametrize("name", sorted(TOOLS))
def test_every_tool_ends_through_it_under_its_own_name(name: str) -> None:
    tool = ROOT / f"dqt_dist/commands/{name}.py"
    calls = [node for node in ast.walk(ast.parse(tool.read_text())) if isinstance(node, ast.Call)]
    ends = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "run_tool"]
    assert [Path(SCRIPTS[ast.literal_eval(call.args[0])]).stem for call in ends] == [tool.stem]
