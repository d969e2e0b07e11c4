"""What the commands of dqt_dist/commands/ share: their names, parsers whose help shows examples, pictures, exit codes.

This file does not import torch, so --help answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dqt_dist.errors import UserError, naming, told

SCRIPTS = {
    "dqt-pretrain": "launchers/pretrain.py",
    "dqt-submit": "launchers/slurm/submit.py",
    "dqt-prepare-data": "tools/prepare_data.py",
    "dqt-convert": "tools/convert_ckpt.py",
    "dqt-evaluate": "tools/evaluate.py",
    "dqt-generate": "tools/generate.py",
    "dqt-inspect": "tools/inspect_ckpt.py",
    "dqt-compare": "tools/compare_runs.py",
}
"""Each installed command, and the script of a clone that does the same."""

INTERRUPTED_EXIT_CODE = 130
"""What a shell reports for a command that SIGINT ended: 128 + 2."""

BROKEN_PIPE_EXIT_CODE = 141
"""The same for SIGPIPE, 128 + 13, as when `head` has seen enough."""


class RaisingArgumentParser(argparse.ArgumentParser):
    """Raises UserError for a wrong command line, so that one rank of many can print the message."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; --help explains")


def as_typed(command: str) -> str:
    """`command`, dqt-evaluate, as the user of this process types it: in a clone tools/evaluate.py.

    Who started this process as an installed command gets installed commands, and so does who has no clone.
    """
    in_clone = (Path(__file__).resolve().parents[1] / SCRIPTS[command]).is_file()
    return SCRIPTS[command] if in_clone and Path(sys.argv[0]).name not in SCRIPTS else command


def short_name(command: str) -> str:
    """What messages of `command` begin with: evaluate for tools/evaluate.py, dqt-evaluate where it is installed."""
    return Path(as_typed(command)).stem


def make_parser(
    command: str,
    description: str | None,
    examples: str,
    parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser,
) -> argparse.ArgumentParser:
    """A parser whose help keeps the line breaks of `description` and `examples`; %(prog)s stands for the command."""
    return parser_class(
        prog=as_typed(command),
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(text: str) -> int:
    """The type of an argument that is a positive integer."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


class _Output(io.FileIO):
    """What a process prints. The first piece that the device refuses (a full disk, a pipe whose reader is gone) is an
    OSError that names this output, and no error where `may_be_lost`; later ones are dropped without a word."""

    def __init__(self, stream: io.TextIOWrapper, may_be_lost: bool) -> None:
        super().__init__(stream.fileno(), "wb", closefd=False)
        self.shown_name = stream.name.strip("<>")
        self.drops = may_be_lost

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.drops:
                return len(data)
            self.drops = True
            raise OSError(error.errno, error.strerror, self.shown_name) from error


def print_any_text(may_be_lost: bool = False) -> None:
    """From now on a character that the terminal's encoding lacks is shown as "?" and is no error, nor is, where it
    `may_be_lost`, an output that takes no more."""
    sys.stdout = _lenient(sys.stdout, sys.__stdout__, may_be_lost)
    sys.stderr = _lenient(sys.stderr, sys.__stderr__, may_be_lost)


def _lenient(stream: Any, of_process: Any, may_be_lost: bool) -> Any:
    """`stream`, or one in its place. A stream that is not `of_process`, such as that of a test, keeps its file."""
    if stream is None:  # closed by whoever started this process: no file that is opened later must take its place
        return open(os.devnull, "w")
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    if not isinstance(stream, io.TextIOWrapper) or stream is not of_process:
        return stream
    raw: Any = _Output(stream, may_be_lost)
    buffer = raw if stream.write_through else io.BufferedWriter(raw)
    like = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return io.TextIOWrapper(buffer, stream.encoding, "replace", **like)


@contextmanager
def side_matter(what: str) -> Iterator[None]:
    """Turns any failure of the block into a warning on standard error: what it does is not worth a finished run."""
    try:
        yield
    except Exception as error:
        lines = str(error).splitlines() or [""]
        print(f"warning: {what} failed: {type(error).__name__}: {lines[0]}", file=sys.stderr)


def pyplot() -> Any:
    """matplotlib.pyplot, for files; imported only when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def drawing(option: str, file: Path) -> Any:
    """matplotlib.pyplot, for a picture that `option` of a tool names. Call it before the work.

    Raises UserError where the picture could not be written: another ending than .png, no such folder, no matplotlib.
    """
    if file.suffix != ".png":
        raise UserError(f"{option} {file}: the name must end in .png")
    if not file.absolute().parent.is_dir():
        raise UserError(f"{option} {file}: the folder {file.absolute().parent} does not exist")
    try:
        return pyplot()
    except ImportError as error:
        raise UserError(f"{option} needs matplotlib; install it with: pip install 'dqt_dist[bench]'") from error


def save_picture(figure: Any, file: Path) -> None:
    """Writes a figure of matplotlib as PNG, under its name when it is whole."""
    partial = file.with_name(f".{file.name}.partial")
    with naming(partial):
        figure.savefig(partial, dpi=130, format="png")
    partial.rename(file)


def run_tool(
    command: str, run: Callable[[argparse.Namespace], None], args: argparse.Namespace, interrupted: str = "interrupted"
) -> int:
    """Calls run(args) and returns the exit code of the process.

    An expected failure becomes one message on standard error that begins with the short name of `command`. The exit
    code is 2 for wrong input, 1 for work that failed on good input, and 130 for Ctrl-C, whose message is `interrupted`.
    It is 141 for an output that nobody reads to its end. Other exceptions keep their traceback.
    """
    print_any_text()
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        return BROKEN_PIPE_EXIT_CODE
    except KeyboardInterrupt:
        return _fail(command, interrupted, INTERRUPTED_EXIT_CODE)
    except Exception as error:
        message = told(error)
        if message is None:
            raise
        return _fail(command, message, message.exit_code)
    return 0


def _fail(command: str, message: object, exit_code: int) -> int:
    print(f"{short_name(command)}: {message}", file=sys.stderr)
    return exit_code
