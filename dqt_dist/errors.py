"""The exceptions that speak to the user.

Code anywhere raises `UserError` when the input (a config field, a file, a command line) is wrong. The message alone
must be enough to correct the input: what is wrong, where (full field path or file), which numbers disagree, and what
would be right. Entry points print the message once and exit with `EXIT_CODE`. The message of a `RunError` says in the
same way why a run with correct input cannot go on. Every other exception is a defect of this project and keeps its
traceback.
"""

from __future__ import annotations

import errno

EXIT_CODE = 2
"""Wrong input by the user."""

RUN_ERROR_EXIT_CODE = 1
"""The run cannot go on, though the user's input is correct."""

STOPPED_EXIT_CODE = 75
"""A signal stopped the run, and the run saved a checkpoint. The same command continues from it (EX_TEMPFAIL)."""


class UserError(Exception):
    """Wrong input by the user. The text is shown as it is.

    Normally all ranks raise the same error, and rank 0 prints it. `local` marks an error that one rank may meet alone
    (a file missing on one node). The rank that raises a local error prints it too, with the rank's number.
    """

    def __init__(self, message: str, *, local: bool = False) -> None:
        super().__init__(message)
        self.local = local


class RunError(Exception):
    """Good input, bad result: a loss that is not finite, replicas that differ, an export that is not the trained model.

    In training all ranks raise it together.
    """


_FAULTS_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE}


def writing_failed(where: str, error: OSError) -> UserError | RunError:
    """The error that tells of a file or folder that cannot be written.

    A RunError for what the machine is short of (space, quota) or fails in, a UserError for a path that cannot be
    written whatever happens: read-only, no permission, a file where a folder should be. `where` begins the message.
    """
    named = f"{error.strerror or error}" + (f": {error.filename}" if error.filename is not None else "")
    if error.errno in _FAULTS_OF_THE_MACHINE:
        return RunError(f"{where}: could not be written: {named}; make room, then run the same command again")
    return UserError(f"{where}: cannot be written: {named}; give a folder that can")
