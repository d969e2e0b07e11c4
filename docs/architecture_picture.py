#!/usr/bin/env python3
"""Draws docs/architecture.svg from the source: the folders of dqt_dist in import order, and the files of one training
step.

    docs/architecture_picture.py            writes the picture
    docs/architecture_picture.py --check    exit code 1 when the picture is not what would be written

Import order and the files of a step are read from tests/test_import_layers.py and docs/architecture.md, the questions
that folders answer from the table in docs/architecture.md, the imports from the source.
"""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from docs.generated import write_or_check
from tests.test_import_layers import MODULES, ORDER, imported, layer_of, module_name

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs/architecture.md", ROOT / "docs/architecture.svg"
FONT = 'font-family="DejaVu Sans, Helvetica, sans-serif"'
ROW, WIDTH, LEFT = 44, 1180, 20


def questions() -> dict[str, str]:
    """What each folder or module answers, from the table of the page."""
    return dict(
        re.findall(r"^\| `dqt_dist/(\w+)(?:/|\.py)` \| ([^|]+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    )


def step_files() -> list[tuple[str, str]]:
    """(file, what it does) of the numbered list of the page."""
    return re.findall(r"^\d+\. `([\w/.]+\.py)` (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def imports() -> dict[str, set[str]]:
    """For each layer the layers that its modules import."""
    found: dict[str, set[str]] = {layer: set() for layer in ORDER}
    for path in MODULES:
        name = module_name(path)
        own = layer_of(name)
        if own is None:
            continue
        for _, other in imported(path.read_text(encoding="utf-8"), name, path.name == "__init__.py"):
            layer = layer_of(other)
            if layer in found and layer != own:
                found[own].add(layer)
    return found


def text(x: float, y: float, content: str, size: int = 13, weight: str = "normal", fill: str = "#222") -> str:
    return (
        f'<text x="{x}" y="{y}" {FONT} font-size="{size}" font-weight="{weight}" fill="{fill}">{escape(content)}</text>'
    )


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="#678" stroke-width="1"/>'
    )


def folder_panel() -> list[str]:
    """Folders from top to bottom, each with what it imports: imports go down only."""
    asked, uses, parts = (
        questions(),
        imports(),
        [text(LEFT, 30, "Folders: each imports only what stands below", 16, "bold")],
    )
    for row, layer in enumerate(["launchers, tools, benchmarks", *reversed(ORDER)]):
        y = 46 + row * ROW
        parts.append(box(LEFT, y, 620, ROW - 6, "#eef3f8" if row else "#f8f1e4"))
        parts.append(text(LEFT + 10, y + 16, layer, 13, "bold"))
        parts.append(text(LEFT + 10 + 8.4 * len(layer) + 12, y + 16, asked.get(layer, "what people start"), 12))
        below = [other for other in reversed(ORDER) if other in uses.get(layer, set())]
        parts.append(
            text(
                LEFT + 10,
                y + 32,
                "uses " + (", ".join(below) or "nothing of ours") if row else "may use everything",
                10,
                fill="#567",
            )
        )
    return parts


def step_panel() -> list[str]:
    """The files of one step in the order of reading."""
    left, files = 670, step_files()
    parts = [text(left, 30, "One training step, file by file", 16, "bold")]
    for row, (path, what) in enumerate(files):
        y = 46 + row * (ROW + 14)
        parts.append(box(left, y, WIDTH - left - 20, ROW + 2, "#eef8ee"))
        parts.append(text(left + 10, y + 18, f"{row + 1}  {path}", 13, "bold"))
        parts.append(text(left + 10, y + 36, what.split(":")[0].rstrip("."), 11))
        if row:
            parts.append(
                f'<path d="M{left + 30} {y - 12} v10 m-4 -4 l4 5 l4 -5" stroke="#484" fill="none" stroke-width="1.5"/>'
            )
    return parts


def picture() -> str:
    height = 60 + max((len(ORDER) + 1) * ROW, len(step_files()) * (ROW + 14))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">'
    background = f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    return "\n".join([head, background, *folder_panel(), *step_panel(), "</svg>"]) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check({PICTURE: picture()}, __doc__))
