"""What goes wrong with an export through no fault of the user's."""

from __future__ import annotations


class VerificationError(Exception):
    """The export is not the model that was trained; the message has the numbers."""
