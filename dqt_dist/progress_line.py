"""How far a long piece of work is: a live line on a terminal, a plain line now and then elsewhere.

A live line returns to its own beginning to be written again. In a file or in the log of a scheduler all its versions
would stand one after another, without a line break.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class ProgressLine(tqdm):
    """tqdm's bar, on standard error; it leaves nothing behind.

    Where that is no terminal, a line every SECONDS_BETWEEN_LINES; work that takes less has none. `options` are tqdm's.
    """

    def __init__(self, iterable: Iterable[Any] | None = None, desc: str | None = None, **options: Any) -> None:
        self.is_live = sys.stderr.isatty()
        if self.is_live:
            options |= {"dynamic_ncols": True}
        else:
            seconds = dict.fromkeys(("mininterval", "maxinterval", "delay"), SECONDS_BETWEEN_LINES)
            options |= seconds | {"bar_format": "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed}, {rate_fmt}"}
        super().__init__(iterable, desc, file=sys.stderr, leave=False, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """What tqdm calls to show the line, or with an empty `msg` to clear it."""
        if self.is_live:
            return bool(super().display(msg, pos))
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False

    def clear(self, nolock: bool = False) -> None:
        if self.is_live:
            super().clear(nolock)

    def say(self, text: str) -> None:
        """Prints a line on standard output; a live line stays below it."""
        if self.is_live:
            self.write(text)
        else:
            print(text, flush=True)
