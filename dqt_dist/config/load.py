"""From a file to a complete config, and back to text.

    file          -> values    JSON; a key that stands twice stops the run. configs/NAME.json that is not in the working
                               folder is the one that came with the program
    --set         -> values    each `section.key=value` is written over what the file says
    values        -> fields    each value against its type and range (schema.py); an unknown key stops the run. First
                               what no field takes: numbers beyond 64 bits, text that is not printable, deep nesting
    left out      -> defaults  a field that is left out or null gets its value, also where another field decides it
    fields        -> checks    what fields say about each other (checks.py)

So a loaded `Config` is complete: its `to_json` text, written beside the run, loads again to an equal object. Each step
lists all the problems that it finds in one `UserError`, one line per problem.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from dqt_dist.config.checks import config_problems, raise_if, shown
from dqt_dist.config.schema import Config, Section
from dqt_dist.errors import UserError
from dqt_dist.json_files import parse_json, read_json_object

MOST_LEVELS = 32
"""Objects and lists inside one another; a config has 4."""

SHIPPED = (Path(__file__).parent / "shipped").resolve()
"""The folder of the configs that come with the program: configs/ of a clone, which a wheel has copies of."""

ADVICE = f"a config is a JSON object as those in {SHIPPED}"

Model = TypeVar("Model", bound=BaseModel)

_UNUSABLE_TEXT = re.compile("[\\0\ud800-\udfff]")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override, validate and complete the JSON file at `path`; `overrides` are `section.key=value` texts.

    configs/NAME.json that is not in the working folder is taken from `SHIPPED`. Raises `UserError` with one line per
    problem. Paths inside the file stay as they are written.
    """
    values = _read_json(_found(Path(path)))
    raise_if(_apply_overrides(values, overrides), "--set")
    return config_of(values, path)


def config_of(values: dict[str, Any], source: object) -> Config:
    """Validates and completes what stands in a config file or was saved of one; `source` is named in messages.

    Raises `UserError` with one line per problem.
    """
    config = _with_defaults_across_sections(validated(Config, _without_nulls(values), source))
    raise_if(config_problems(config), source)
    return config


def validated(model: type[Model], values: dict[str, Any], source: object) -> Model:
    """`values`, of a JSON file, as an object of a strict pydantic model. Raises `UserError` with one line per field."""
    raise_if(_impossible_values(values), source)
    try:
        # Through JSON, where strict mode takes an array for a tuple.
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise_if(_field_problems(error), source)
        raise


def to_json(config: Config) -> str:
    """The complete config as JSON text. `load_config` turns the text into an equal object again."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


# ---- file and overrides ----


def _found(path: Path) -> Path:
    """`path`, or where what it names lies in `SHIPPED`, so that an installed program takes the commands of a clone."""
    shipped = SHIPPED / path.name
    return shipped if path.parent == Path("configs") and not path.exists() and shipped.exists() else path


def _read_json(path: Path) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        doubled = sorted({key for key in keys if keys.count(key) > 1})
        if doubled:
            raise UserError(f"{path}: the key {doubled[0]!r} stands twice in one section; keep one of them")
        return dict(pairs)

    return read_json_object(path, ADVICE, json.JSONDecoder(object_pairs_hook=refuse_duplicates))


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write each `section.key=value` into `values`. Returns a line per override that cannot be written.

    A value that is JSON (8, true, null, [..]) is taken as JSON, anything else as text.
    """
    problems = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or len(keys) < 2 or not all(keys):
            problems.append(f"{override!r} is not of the form section.key=value, as in training.steps=100")
            continue
        try:
            value = parse_json(text)
        except ValueError:
            value = text
        problem = _write(values, keys, value)
        if problem:
            problems.append(f"{dotted}: {problem}")
    return problems


def _write(values: dict[str, Any], keys: Sequence[str], value: Any) -> str | None:
    """Set values[k0][k1]... = value and make missing sections. Returns what stands in the way, if anything does."""
    place: Any = values
    for depth, name in enumerate(keys):
        key: Any = name
        if isinstance(place, list):
            if name not in map(str, range(len(place))):
                return f"{'.'.join(keys[:depth])} is a list of {len(place)} and has no element {name!r}"
            key = int(name)
        elif not isinstance(place, dict):
            return f"{'.'.join(keys[:depth])} is {shown(place)} and has no key {name!r}"
        elif depth < len(keys) - 1 and place.get(name) is None:
            place[name] = {}
        if depth == len(keys) - 1:
            place[key] = value
        else:
            place = place[key]
    return None


def _without_nulls(value: Any) -> Any:
    """`value` without the keys that are null, as null means the default. The deepspeed section keeps its nulls."""
    if isinstance(value, dict):
        return {
            key: part if key == "deepspeed" else _without_nulls(part) for key, part in value.items() if part is not None
        }
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def _impossible_values(value: Any, name: str = "", level: int = 0) -> Iterator[str]:
    """A line per value that no field takes, also below `deepspeed`, where types are not known."""
    if level > MOST_LEVELS:
        yield f"{name}: is nested more than {MOST_LEVELS} levels deep; no field is"
    elif isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            shown_key = '""' if key == "" else str(key)
            inside = f"{name}.{shown_key}" if name else shown_key
            if isinstance(key, str) and not key.isprintable():
                yield f"{inside}: is not the name of a field: it has characters that cannot be printed"
            yield from _impossible_values(part, inside, level + 1)
    elif isinstance(value, str) and _UNUSABLE_TEXT.search(value):
        yield f"{name}: {shown(value)} is not valid; should be text without NUL and without half surrogate pairs"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield f"{name}: {shown(value)} is not valid; should be a number of at most 64 bits"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{name}: {shown(value)} is not valid; should be a finite number"


# ---- field errors in our words ----


def _field_problems(error: ValidationError) -> list[str]:
    lines = []
    for detail in error.errors(include_url=False):
        location = detail["loc"]
        name = ".".join(str(part) or '""' for part in location) or "the file"
        if detail["type"] == "default_factory_not_called":
            continue  # follows from a problem with another field, which has its own line
        elif detail["type"] == "extra_forbidden":
            lines.append(f"{name}: unknown key{_suggestion(location)}")
        elif detail["type"] == "missing":
            lines.append(f"{name}: required, but not given")
        else:
            what = detail["msg"].removeprefix("Input ")
            what = (what[0].lower() + what[1:]).replace("tuple", "list").replace(" after validation", "")
            lines.append(f"{name}: {shown(detail['input'])} is not valid; {what}")
    return lines


def _suggestion(location: tuple[int | str, ...]) -> str:
    """What an unknown key at `location` may have been meant to be: the nearest field of its section, or all of them."""
    section: Any = Config
    for part in location[:-1]:
        if isinstance(part, str):
            section = _section_in(section.model_fields[part].annotation)
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(known)}"


def _section_in(annotation: Any) -> type[Section] | None:
    """The Section inside an annotation such as tuple[DataSource, ...] | None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


# ---- defaults across sections ----


def _with_defaults_across_sections(config: Config) -> Config:
    optimizer = config.optimizer
    if optimizer.schedule != "wsd" or optimizer.decay_steps is not None:
        return config
    decay_steps = max(1, config.training.steps // 10)
    return config.model_copy(update={"optimizer": optimizer.model_copy(update={"decay_steps": decay_steps})})
