"""What fuzzing does to good input, and what must come of it.

`changed_values` and `changed_bytes` are the two strategies: they damage a JSON-like value, or the bytes of a file, in a
few places. Each test gives the result to the real function that reads it, inside `held`: the input is accepted, or
refused with a UserError that names it. Any other exception, a call that does not end, and memory beyond a bound fail
the test.

`make test` tries a small, fixed set of inputs. `make fuzz` draws new ones, FUZZ_EXAMPLES of configs and a share of it
of the rest, and shows how far it is.
"""

from __future__ import annotations

import copy
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from dqt_dist.errors import EXIT_CODE, UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""Of configs; 0 for the small, fixed set of `make test`."""

VOCAB_SIZE = 300
"""Of the tokenizer and the data of these tests."""

SECONDS = 120
"""Longest time of one call. All of them end within a second on an idle core; at a load of 40 one took 20 s."""

MEMORY_BYTES = 1 << 30
"""Address space that one call may take on top of what the process has."""


def budget(few: int, share: float = 1.0) -> settings:
    """`few` examples, the same each time; under `make fuzz` `share` of FUZZ_EXAMPLES, new ones each time."""
    return settings(
        max_examples=max(1, int(share * EXAMPLES)) if EXAMPLES else few,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# ---- strategies ----

NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 4, 8, 16, 64, 127, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30]),
    st.sampled_from([10**400, -(10**400), 0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 5e-324, 1e-300, 1e38, 1e308, -1e308]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.integers(1, 64),
    st.integers(),
    st.floats(),
)
WORDS = ["ternary", "dqt", "none", "bitnet", "fp8", "bf16", "int8", "e4m3", "cpu", "wsd", "adafactor", "auto", "true"]
TEXTS = st.one_of(
    st.sampled_from(["", " ", "\0", "a\0b", "\n", "/", "..", "~", "1", "1e3", "NaN", "\x1b[2J", "\ud800", "x" * 5000]),
    st.sampled_from(WORDS),
    st.text(max_size=8),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JUNK = st.one_of(
    SCALARS,
    st.recursive(
        SCALARS,
        lambda part: st.lists(part, max_size=3) | st.dictionaries(TEXTS, part, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from([3, 30, 150]).map(lambda depth: _nested(depth)),
)
"""Values of any type, among them the ones at the borders of 32 and 64 bits and of a float."""


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in `value`, at every depth."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


@st.composite
def changed_values(draw: st.DrawFn, good: Any, most: int = 4) -> Any:
    """A copy of `good`, of dicts and lists, in which up to `most` values are others, gone, or new under a new key."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(value))
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["junk", "junk", "junk", "gone", "new key", "another's"]))
        if kind == "junk":
            container[key] = draw(JUNK)
        elif kind == "gone":
            del container[key]
        elif kind == "another's":
            other, name = draw(st.sampled_from(places))
            container[key] = copy.deepcopy(other[name])
        elif isinstance(container, dict):
            container[draw(TEXTS)] = draw(JUNK)
        else:
            container.append(draw(JUNK))
    return value


@st.composite
def changed_bytes(draw: st.DrawFn, good: bytes, most: int = 4) -> bytes:
    """`good` with up to `most` pieces of it replaced, cut out, doubled or inserted, or with its end cut off."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(0, len(data) - 1)) | st.integers(0, min(64, max(0, len(data) - 1))))
        kind = draw(st.sampled_from(["bit", "bytes", "bytes", "insert", "double", "end", "end"]))
        if kind == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "bytes":
            new = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, bytes(8), b"\x7f" * 4]))
            data[at : at + len(new)] = new
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        elif draw(st.booleans()):
            del data[at:]
        else:
            data += draw(st.binary(max_size=64))
    return bytes(data)


# ---- what must come of it ----


def held(read: Callable[[], Any], names: Callable[[str], bool]) -> Any:
    """What `read` returns, or None when it refuses its input with a UserError whose message `names` accepts."""
    _progress()
    try:
        with _bounds():
            return read()
    except UserError as error:
        assert error.exit_code == EXIT_CODE
        assert all(line.isprintable() for line in str(error).split("\n")), f"control characters in {str(error)!r}"
        assert names(str(error)), f"the message does not name what is wrong: {error}"
        return None


@contextmanager
def _bounds() -> Iterator[None]:
    """Raises TimeoutError in a call that takes SECONDS; memory beyond MEMORY_BYTES is a MemoryError."""

    def over(*_: object) -> None:
        raise TimeoutError(f"the call did not end in {SECONDS} s")

    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


_calls = 0


def _progress() -> None:
    """A line that counts, under `make fuzz`."""
    global _calls
    _calls += 1
    if EXAMPLES and _calls % 500 == 0:
        print(f"{_calls:,} inputs tried", file=sys.__stderr__, flush=True)
