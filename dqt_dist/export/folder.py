"""An output folder that is there completely or not at all.

    with new_folder(output) as folder: ...        folder is .NAME.partial beside `output`; renamed at the end

An error or Ctrl-C removes it. What a killed process leaves is removed by the next one that writes to the same place.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dqt_dist.errors import UserError, naming


def check_output(output: Path) -> None:
    """Raises UserError when `output` holds something, or is a file."""
    if output.is_file():
        raise UserError(f"--output {output}: is a file; give a folder that does not exist yet")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output}: is not empty; give another folder, or remove it first")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A scratch folder that becomes `output` when the block ends without an exception."""
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = output.parent / f".{output.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        with naming(scratch):
            yield scratch
        if output.is_dir():
            output.rmdir()  # empty, or check_output had refused it
        scratch.rename(output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
