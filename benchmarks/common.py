"""What the benchmarks share: medians, and how a result is written down."""

from __future__ import annotations

import gc
import json
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
CPU_SECONDS = 0.3
# All sets of inputs together fill the L2 cache CACHES times, but there are at most SETS_AT_MOST sets. A graph has at
# least CALLS_AT_LEAST calls. GROUPS groups of replays are timed, each of at least GROUP_SECONDS.
CACHES, SETS_AT_MOST, CALLS_AT_LEAST, GROUPS, GROUP_SECONDS = 4, 64, 16, 20, 2e-3


def median_seconds(make: Callable[[], Callable[[], Any]], device: str) -> float:
    """Median over many calls of the function that `make` returns.

    `make` prepares the function's inputs. It is called once for each set of inputs that is needed.
    """
    if device == "cuda":
        return _median_in_a_graph(make)
    function = make()
    function()
    seconds: list[float] = []
    while sum(seconds) < CPU_SECONDS or len(seconds) < 3:
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _median_in_a_graph(make: Callable[[], Callable[[], Any]]) -> float:
    """The median over calls that follow one another in a CUDA graph, like the kernels of a training step.

    Each call has inputs that are not in the cache, and a result of its own. The graph leaves out Python's time. Each
    call pays for writing back what the call before has left in the cache, and leaves as much to the next.
    triton.testing.do_bench instead clears the cache with zeros before a call. The call would then pay for writing the
    zeros back, up to 50 MB on an H200.
    """
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        before = torch.cuda.memory_allocated()
        functions = [make()]
        size = max(1, torch.cuda.memory_allocated() - before)
        cache = torch.cuda.get_device_properties(stream.device).L2_cache_size
        functions += [make() for _ in range(min(SETS_AT_MOST - 1, CACHES * cache // size))]
        functions *= -(-CALLS_AT_LEAST // len(functions))
        for function in functions:  # compiles, and fills what is computed once
            function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = [function() for function in functions]
        groups: list[float] = []
        replays = 1
        while len(groups) <= GROUPS:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            groups.append(start.elapsed_time(end) / 1e3 / replays)
            replays = 1 + int(GROUP_SECONDS / groups[-1])
        del results
    return statistics.median(groups[1:]) / len(functions)


def provenance(devices: str) -> str:
    """The line above a table: date, commit, device, versions, and the command that made the result."""
    import torch

    from dqt_dist.training.cost import versions

    found = versions() | ({"CUDA": torch.version.cuda} if torch.version.cuda else {})
    about = ", ".join(f"{name} {version}" for name, version in found.items())
    command = shlex.join(["benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"{date.today()}, commit {commit()}, {devices}. {about}. Made by `{command}`."


def commit() -> str:
    """Short hash, with a + when files differ from it; "unknown" in a copy without a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    return (head + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))) if head else "unknown"


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; ends with a newline."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def chosen(text: str, known: dict[str, list[str]], option: str) -> tuple[str, list[str]]:
    """Name and overrides of one item of `option`: a known name, or NAME=section.key=value,section.key=value."""
    name, equals, settings = text.strip().partition("=")
    if equals:
        return name, settings.split(",")
    if name not in known:
        raise SystemExit(f"{option}: unknown {name!r}; known: {'; '.join(known)}; or NAME=section.key=value,...")
    return name, known[name]


def free_memory() -> None:
    """Frees the memory of a run to which no variable refers any more.

    Engine, optimizer and hooks refer to one another, in part through C++, so one pass of Python's
    collector is not enough.
    """
    import torch

    while gc.collect():
        pass
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Inside this block, waiting for the GPU raises a RuntimeError.

    Both kinds of waits are refused: operations of torch that copy to the host, and calls that wait for the device, a
    stream or an event. DeepSpeed's throughput timer makes such calls.
    """
    import torch

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("a wait for the device, a stream or an event")

    with ExitStack() as until_then:
        for place in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            until_then.enter_context(patch.object(place, "synchronize", refuse))
        until_then.callback(torch.cuda.set_sync_debug_mode, "default")
        with warnings.catch_warnings():
            # torch warns that the mode is a prototype. Where warnings are errors, the mode would stay set.
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield


def append(path: str | None, text: str) -> None:
    """Prints `text` and, given a file, appends it there."""
    print(text, flush=True)
    if path:
        with open(path, "a") as file:
            file.write(text + "\n")


def write_json(path: str | None, found: Any) -> None:
    if path:
        Path(path).write_text(json.dumps(found, indent=1) + "\n")


def one_line(error: BaseException) -> str:
    """Type and first line of an error, for a table."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}"
