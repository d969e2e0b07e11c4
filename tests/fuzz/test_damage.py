"""Negative controls: what `held` must not let pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from dqt_dist.errors import RunError, UserError
from tests.fuzz import damage


def fail(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda: {}["field"], KeyError),
        (lambda: fail(RunError("field: good input")), RunError),
        (lambda: fail(UserError("something is wrong")), AssertionError),
        (lambda: bytearray(2 * damage.MEMORY_BYTES), MemoryError),
        (lambda: time.sleep(5), TimeoutError),
    ],
    ids=["traceback", "another exit code", "no name", "memory", "hang"],
)
def test_whatever_is_not_a_refusal_by_name_fails(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[], Any], error: type[Exception]
) -> None:
    monkeypatch.setattr(damage, "SECONDS", 0.1)
    with pytest.raises(error):
        damage.held(read, lambda message: message.startswith("field: "))


def test_a_refusal_by_name_and_a_result_are_let_pass() -> None:
    assert damage.held(lambda: fail(UserError("field: wrong")), lambda message: message.startswith("field: ")) is None
    assert damage.held(lambda: 3, lambda message: False) == 3
