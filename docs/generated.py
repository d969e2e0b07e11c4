"""What the scripts that write a page or a picture of this folder share: their command line."""

from __future__ import annotations

import argparse
from pathlib import Path


def write_or_check(path: Path, content: str, description: str | None) -> int:
    """Writes `content` to `path`; with --check compares instead. Returns the exit code, 1 where they differ."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help=f"compare with {path.name} as it is")
    if parser.parse_args().check:
        return int(path.read_text(encoding="utf-8") != content)
    path.write_text(content, encoding="utf-8")
    return 0
