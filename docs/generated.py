"""What the scripts that write a page or a picture of this folder share: their command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path


def write_or_check(files: Mapping[Path, str], description: str | None) -> int:
    """Writes each content to its path; with --check compares instead. Returns the exit code, 1 where they differ."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = " and ".join(path.name for path in files)
    parser.add_argument("--check", action="store_true", help=f"compare with {names} as written")
    if parser.parse_args().check:
        return int(any(path.read_text(encoding="utf-8") != content for path, content in files.items()))
    for path, content in files.items():
        path.write_text(content, encoding="utf-8")
    return 0
