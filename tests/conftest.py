"""Shared by all tests: a fixed seed, one thread, files with long tests first. Tests marked gpu or gguf run only where
their requirements are met."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import pytest
import torch

from dqt_dist import MEGATRON_NOTES


def pytest_configure(config: pytest.Config) -> None:
    """pytest replaces the warning filters that the package sets on import, so pytest gets the same filters here."""
    for note in MEGATRON_NOTES:
        config.addinivalue_line("filterwarnings", f"ignore:{note}")


# Tests stand beside each other, and their tensors are small.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def gpu_processes() -> Iterator[list[ProcessPoolExecutor]]:
    """Two processes for tests.gpus.on_gpus."""
    pools = [ProcessPoolExecutor(1, mp_context=get_context("spawn")) for _ in range(2)]
    yield pools
    for pool in pools:
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def missing_requirements() -> dict[str, str]:
    """What is missing on this machine, by the marker of the tests that need it."""
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device"
    if torch.cuda.device_count() < 2:
        missing["multi_gpu"] = "needs two CUDA devices"
    if find_spec("llama_cpp") is None:
        missing["gguf"] = "needs llama-cpp-python: make test-gguf"
    return missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with long tests begin, or one process would work on the last of them alone.
    with_long_tests = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in with_long_tests)
    missing = missing_requirements()
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
