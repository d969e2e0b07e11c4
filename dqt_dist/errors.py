"""The exceptions that speak to the user.

Code anywhere raises `UserError` when the input (a config field, a file, a command line) is wrong. The message alone
must be enough to mend it: what is wrong, where (full field path or file), which numbers disagree, and what would be
right. Entry points print it once and leave with `EXIT_CODE`. `RunError` says, in the same way, why a run that was
started rightly cannot go on. Every other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

EXIT_CODE = 2
"""Wrong input by the user."""

RUN_ERROR_EXIT_CODE = 1
"""The run cannot go on, though nothing the user gave is wrong."""

STOPPED_EXIT_CODE = 75
"""A signal stopped the run after it had saved a checkpoint: the same command goes on from there (EX_TEMPFAIL)."""


class UserError(Exception):
    """Wrong input by the user; its text is shown as it is.

    All ranks are taken to meet the same error, which rank 0 prints. `local` marks one that a single rank may meet alone
    (a file missing on one node): the rank that raises it prints it too, with its number.
    """

    def __init__(self, message: str, *, local: bool = False) -> None:
        super().__init__(message)
        self.local = local


class RunError(Exception):
    """Good input, bad result: a loss that is not finite, replicas that differ, an export that is not the trained model.

    In training all ranks raise it together.
    """
