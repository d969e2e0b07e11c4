"""Commands of this repository as processes of their own, without the seconds that their imports take.

    done = forked.run(argv)                       as subprocess.run(..., capture_output=True, text=True)
    process = forked.start(argv, environment, stdout, stderr)

A process is forked from one that has imported torch, DeepSpeed and Megatron already (preloaded.py), and then runs a
script with its own arguments, environment, output and exit code. What a test must see of a process before these
imports, of its launcher or of its exit needs subprocess.
"""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path


def start(
    argv: Sequence[str],
    environment: Mapping[str, str],
    stdout: Path,
    stderr: Path,
    prepare: Callable[[], object] | None = None,
) -> BaseProcess:
    """Starts the Python script argv[0], here, with this whole environment; it calls `prepare`, which can be pickled,
    first. Output is appended to files."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    files = {1: str(stdout), 2: str(stderr)}
    process = context.Process(target=_execute, args=(list(argv), dict(environment), os.getcwd(), files, prepare))
    process.start()
    return process


def ranks_environment(num: int) -> list[dict[str, str]]:
    """What a user sets by hand for each of `num` processes on this machine: the variables of `env://`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(num)]
    return [{name: str(value) for name, value in variables.items()} for variables in ranks]


def run(
    argv: Sequence[object],
    environment: Mapping[str, str] | None = None,
    processes: int = 1,
    timeout: float = 180.0,
    prepare: Callable[[], object] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a Python script to its end, over `processes` ranks when there are more than one.

    The exit code is that of the first process that fails; the others then get SIGTERM, as from a launcher.
    """
    words = list(map(str, argv))
    common = dict(os.environ if environment is None else environment)
    of_ranks = ranks_environment(processes) if processes > 1 else [{}]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        started = [start(words, common | variables, out, err, prepare) for variables in of_ranks]
        try:
            returncode = _first_failure(started, words, time.monotonic() + timeout)
        finally:
            for process in started:
                process.kill()
                process.join()
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in (out, err)]
    return subprocess.CompletedProcess(words, returncode, *texts)


def _first_failure(processes: list[BaseProcess], argv: list[str], deadline: float) -> int:
    """Waits for all; the first exit code that is not 0."""
    failure, running = 0, {process.sentinel: process for process in processes}
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            raise subprocess.TimeoutExpired(argv, deadline)
        for sentinel in ended:
            process = running.pop(sentinel)  # type: ignore[index]
            process.join()
            if process.exitcode and not failure:
                failure = process.exitcode
                for other in running.values():
                    other.terminate()
    return failure


def _execute(
    argv: list[str],
    environment: dict[str, str],
    folder: str,
    files: dict[int, str],
    prepare: Callable[[], object] | None,
) -> None:
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    for number, path in files.items():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=environment.get("PYTHONIOENCODING"), line_buffering=True)  # type: ignore[union-attr]
    sys.argv = argv
    if prepare is not None:
        prepare()
    runpy.run_path(argv[0], run_name="__main__")
