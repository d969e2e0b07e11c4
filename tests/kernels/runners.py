"""One way to run a function of dqt_dist.kernels on its Triton kernels, on a CUDA device or in Triton's interpreter.

    run(function, *args)      CPU tensors in; kernels run; CPU tensors out
    function(*args)           CPU tensors in; the definition runs

Only arguments that are tensors are copied. A test makes objects that hold tensors (a LowBitMatrix, a dict of moments)
on `run.device`, and the function changes them in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from benchmarks.common import waiting_is_an_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process runs kernels in the interpreter. Sizes must then be small: each block takes ten milliseconds."""


class CudaRunner:
    """Kernels as they are compiled, on the CUDA device."""

    device = "cuda"

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _on_cpu(self.on_device(function, *args, **kwargs))

    def on_device(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As a call, but the result stays where it is."""
        moved = [arg.cuda() if isinstance(arg, Tensor) else arg for arg in args]
        return function(*moved, **{k: v.cuda() if isinstance(v, Tensor) else v for k, v in kwargs.items()})

    def without_waiting(self) -> contextlib.AbstractContextManager[Any]:
        """Waiting for the device is an error inside."""
        return waiting_is_an_error()


class InterpreterRunner:
    """Kernels line by line in NumPy, on CPU tensors that say they are on CUDA."""

    device = "cpu"

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Kernels write over some of their inputs.
        copies = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        # With so few multiprocessors, programs that loop over tokens have several tokens.
        properties = SimpleNamespace(multi_processor_count=2)
        with (
            mock.patch.object(Tensor, "is_cuda", True),
            mock.patch("torch.cuda.get_device_properties", lambda _: properties),
            # A GPU gives no warning for infinities and NaN.
            np.errstate(all="ignore"),
        ):
            return function(*copies, **kwargs)

    on_device = __call__

    def without_waiting(self) -> contextlib.AbstractContextManager[Any]:
        """There is no device to wait for."""
        return contextlib.nullcontext()


Runner = CudaRunner | InterpreterRunner


def _on_cpu(result: Any) -> Any:
    """Tensors of a result on the CPU, also those in tuples and dataclasses."""
    if isinstance(result, Tensor):
        return result.cpu()
    if isinstance(result, tuple):
        return tuple(_on_cpu(part) for part in result)
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        names = [field.name for field in dataclasses.fields(result)]
        return type(result)(**{name: _on_cpu(getattr(result, name)) for name in names})
    return result
