"""Any config file: complete and fit for a number of processes, or refused with the names of the fields."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqt_dist.config import Config, check_world, load_config, to_json
from dqt_dist.errors import UserError
from dqt_dist.plan.arithmetic import device_named
from dqt_dist.plan.report import plan
from tests.config.files import ROOT, small
from tests.fuzz.damage import JUNK, TEXTS, budget, changed_bytes, changed_values, held

SECTIONS = tuple(Config.model_fields)
GOOD = json.loads((ROOT / "configs/1b_ternary_fp8.json").read_text())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a config, written anew for each input."""
    return tmp_path_factory.mktemp("fuzz") / "config.json"


@pytest.fixture(scope="module")
def complete(path: Path) -> list[dict[str, Any]]:
    """Two good configs with all of their fields."""
    found = []
    for values in (small(), GOOD):
        path.write_text(json.dumps(values))
        found.append(json.loads(to_json(load_config(path))))
    return found


def names_a_field(path: Path, keys: Iterable[str]) -> Callable[[str], bool]:
    """Whether each line of a message is `field: reason`, the field being one of the config or, unknown, of `keys`; of
    what is nested too deep to be read, the file is named."""
    shown = [str(UserError(key.replace("\n", "\\n") or '""')) for key in keys]
    known = ("not JSON that can be read", *SECTIONS, *shown)

    def check(message: str) -> bool:
        first, *others = message.split("\n  ")
        problems = others or [first.removeprefix(f"{path}: ")]
        return first.startswith(f"{path}: ") and all(": " in line and line.startswith(known) for line in problems)

    return check


def use(path: Path, overrides: list[str] | None = None) -> Config:
    """What a start does with a config before it imports torch. What is accepted loads again from its own text."""
    config = load_config(path, overrides or ())
    again = path.with_name("again.json")
    again.write_text(to_json(config), encoding="utf-8")
    assert load_config(again) == config
    return config


def fit(config: Config, world_size: int) -> str:
    check_world(config, world_size)
    return plan(config, world_size, device_named("h100"))


@budget(700)
@given(data=st.data(), which=st.integers(0, 1), world_size=st.sampled_from([1, 2, 3, 8, 64]))
def test_whatever_the_values(
    path: Path, complete: list[dict[str, Any]], data: Any, which: int, world_size: int
) -> None:
    values = data.draw(changed_values(complete[which]))
    try:
        path.write_text(json.dumps(values), encoding="utf-8")
    except RecursionError:
        return  # nested too deep to be written; what is read has a test of its own
    config = held(lambda: use(path), names_a_field(path, set(values)))
    if config is not None:
        held(lambda: fit(config, world_size), lambda message: re.match(r"config with .*\w+: ", message) is not None)


@budget(250, share=0.3)
@given(
    keys=st.lists(
        st.sampled_from(SECTIONS) | st.sampled_from(["train", "0", "path", "steps", "bits"]) | TEXTS, max_size=4
    ),
    value=JUNK.map(repr) | TEXTS,
)
def test_whatever_is_set(path: Path, keys: list[str], value: str) -> None:
    path.write_text(json.dumps(small()))
    override = f"{'.'.join(keys)}={value}"
    held(lambda: use(path, [override]), lambda message: message.startswith(("--set: ", f"{path}: ")))


@budget(250, share=0.5)
@given(data=st.data())
def test_whatever_the_text(path: Path, complete: list[dict[str, Any]], data: Any) -> None:
    path.write_bytes(data.draw(changed_bytes(json.dumps(complete[0], indent=1).encode())))
    held(lambda: use(path), lambda message: message.startswith(f"{path}: "))


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"model":' * 100_000,
        b'{"deepspeed": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"training": {"steps": ' + b"9" * 5000 + b"}}",
        b'{"training": {"steps": 1e' + b"9" * 5000 + b"}}",
        b'{"model": {"\\ud800": 1}}',
        b"\xef\xbb\xbf{}",
        '{"model": {}}'.encode("utf-16"),
        b"\0" * 100,
        b"",
    ],
    ids=lambda text: text[:24].decode("latin-1").encode("unicode_escape").decode(),
)
def test_text_that_is_no_config_at_all(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    assert held(lambda: use(path), lambda message: message.startswith(f"{path}: ") and len(message) < 5000) is None
