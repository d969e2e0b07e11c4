"""The exceptions that speak to the user.

Code anywhere raises `UserError` when the input (a config field, a file, a command line) is wrong. The message alone
must be enough to correct the input: what is wrong, where (full field path or file), which numbers disagree, and what
would be right. The message of a `RunError` says in the same way why a run with correct input cannot go on. An OSError
about a file stays what it is until an entry point is reached: `told` makes one of the two of it. Entry points print the
message once and exit with its `exit_code`. Every other exception is a defect of this project and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 2
"""Wrong input by the user."""

RUN_ERROR_EXIT_CODE = 1
"""The run cannot go on, though the user's input is correct."""

STOPPED_EXIT_CODE = 75
"""A signal stopped the run, and the run saved a checkpoint. The same command continues from it (EX_TEMPFAIL)."""


def _printable(message: str) -> str:
    """`message` with escapes such as \\x1b for what cannot be printed; lines stay lines."""
    if message.isprintable():
        return message
    shown = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in message)
    return "".join(shown)


class SpokenError(Exception):
    """The text is shown as it is, but for characters that are not printable: what a message quotes of a file must not
    act on a terminal.

    Normally all ranks raise the same error, and rank 0 prints it. `local` marks an error that one rank may meet alone
    (a file missing on one node). The rank that raises a local error prints it too, with the rank's number.
    """

    exit_code: int

    def __init__(self, message: str, *, local: bool = False) -> None:
        super().__init__(_printable(message))
        self.local = local


class UserError(SpokenError):
    """Wrong input by the user."""

    exit_code = EXIT_CODE


class RunError(SpokenError):
    """Good input, bad result: a loss that is not finite, replicas that differ, an export that is not the trained model,
    a full disk."""

    exit_code = RUN_ERROR_EXIT_CODE


class RankOSError(OSError):
    """What the operating system refused one rank; all ranks raise it."""

    def __init__(self, rank: int, error: OSError) -> None:
        super().__init__(error.errno, error.strerror, error.filename)
        self.rank = rank


_FAULTS_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE}


def told(error: Exception) -> SpokenError | None:
    """What the user is told of `error`; None for a defect, which an OSError that names no file is too.

    An OSError that names one is a RunError for what the machine is short of (space, quota) or fails in, and a UserError
    for a file that cannot be used whatever happens: read-only, no permission, a file where a folder should be. Memory
    that is not there, of the machine or of a GPU, is a RunError.
    """
    if isinstance(error, SpokenError):
        return error
    if _is_out_of_memory(error):
        first = (str(error).splitlines() or ["out of memory"])[0]
        return RunError(f"{first}; --plan --gpu NAME shows what takes memory, docs/faq.md what lowers it", local=True)
    if not isinstance(error, OSError) or error.filename is None:
        return None
    rank = f"rank {error.rank}: " if isinstance(error, RankOSError) else ""
    text, local = f"{rank}{error.filename}: {error.strerror}", not rank
    if error.errno is None or error.errno in _FAULTS_OF_THE_MACHINE:  # numpy: None where the disk takes no whole array
        return RunError(f"{text}; when that is mended, run the same command again", local=local)
    return UserError(f"{text}; give another path, or the right to use this one", local=local)


def _is_out_of_memory(error: Exception) -> bool:
    """Torch is not imported here. On a CPU it raises a RuntimeError (c10/core/impl/alloc_cpu.cpp)."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and of_torch)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """An OSError in this block that names no file is about `path`, also one that torch.save hides behind a
    RuntimeError."""
    try:
        yield
    except Exception as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror or str(cause), cause.filename or str(path)) from error
