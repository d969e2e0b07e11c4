#!/usr/bin/env python3
"""Writes docs/configuration.md, the reference of all fields, from dqt_dist/config/schema.py.

    docs/configuration_page.py            writes the page
    docs/configuration_page.py --check    exit code 1 when the page is not what would be written

Types, limits and defaults come from the pydantic models, sentences from the docstrings of the fields.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from docs.generated import write_or_check
from dqt_dist.config.checks import DERIVED_DEEPSPEED_KEYS
from dqt_dist.config.schema import Config, DataSource, Section

PAGE = Path(__file__).resolve().parent / "configuration.md"
WIDTH = 120
ELSEWHERE = "see the text"

HEAD = """\
# Every field of a config

A config is a JSON file with a section per heading below. `configs/` has examples. A field that is left out, or is
`null`, gets its default; "required" ones have none. Any field can be set from the command line,
`--set section.key=value`. An unknown field, a value of another type ("12" is no number) and fields that do not go
together end the run before it starts, with one message each. The run folder's `config.json` is complete: it has every
field.

`docs/configuration_page.py` makes this page from `dqt_dist/config/schema.py`. [What to choose](tuning.md), [what a
layout costs](planning.md).
"""

TYPES = {int: "integer", float: "number", str: "text", bool: "`true` or `false`"}
LIMITS = {Ge: ("at least", "ge"), Gt: ("above", "gt"), Le: ("at most", "le"), Lt: ("below", "lt")}


def in_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type of a field, with its limits, as the page says it."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_words(parts[0], (*parts[1:], *metadata))
    if origin in (Union, UnionType):
        return " or ".join(in_words(part) for part in parts if part is not type(None))
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in parts)
    if origin is tuple:
        return "list of sources, at least one"
    if origin is dict:
        return "object" if parts[1] is Any else f"object, of each name a {in_words(parts[1])}"
    return ", ".join([TYPES[annotation], *limits(metadata)])


def limits(metadata: Sequence[Any]) -> Iterator[str]:
    for limit in metadata:
        if isinstance(limit, FieldInfo):
            yield from limits(limit.metadata)
        elif isinstance(limit, MinLen):
            yield "not empty"
        else:
            word, name = LIMITS[type(limit)]
            yield f"{word} {getattr(limit, name):g}" if abs(getattr(limit, name)) < 2**20 else f"{word} 2^32"


def default_of(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "default: an empty object" if field.default_factory is dict else ELSEWHERE
    if field.default is PydanticUndefined:
        return "required"
    return ELSEWHERE if field.default is None else f"default: `{json.dumps(field.default)}`"


def entry(name: str, field: FieldInfo) -> str:
    """One field: name, type, limits, default, and its docstring."""
    default = default_of(field)
    kind = in_words(field.annotation, field.metadata)
    about = kind if default == ELSEWHERE else f"{kind}; {default}"
    text = f"`{name}`: {about}. {' '.join((field.description or '').split())}"
    return textwrap.fill(
        text, WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def fields_of(section: type[Section]) -> str:
    return "\n".join(entry(name, field) for name, field in section.model_fields.items())


def section_text(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split())


def page() -> str:
    parts = [HEAD]
    for name, field in Config.model_fields.items():
        parts.append(f"## {name}\n")
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            parts += [f"{section_text(field.annotation)}\n", fields_of(field.annotation) + "\n"]
        else:
            parts.append(textwrap.fill(" ".join((field.description or "").split()), WIDTH) + "\n")
        if name == "data":
            parts += [
                "### A source of `data.train`, `data.valid` and `data.valid_texts`\n",
                f"{section_text(DataSource)}\n",
            ]
            parts.append(fields_of(DataSource) + "\n")
    rows = [f"| `{key}` | {use} |" for key, use in DERIVED_DEEPSPEED_KEYS.items()]
    parts.append("\n".join(["| refused here | use |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(write_or_check({PAGE: page()}, __doc__))
