"""Where the kernels of these tests run: on a CUDA device, or in Triton's interpreter when TRITON_INTERPRET=1 is set.

Triton reads the variable when it is imported, so one pytest process can only do one of the two. test_interpreter.py
starts the process that has the interpreter.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.kernels.runners import INTERPRETED, CudaRunner, InterpreterRunner, Runner

if INTERPRETED:
    from triton.runtime import interpreter

    from tests.kernels import interpreter_instructions

    sys.modules["dqt_dist.kernels.device.instructions"] = interpreter_instructions
    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_lang_tensor_for_numpy(tensor: Any, scope: Any) -> None:
        """Triton 3.6.0 calls int() on a scalar's array of one element, which NumPy 2.4 refuses."""
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_lang_tensor_for_numpy
    interpreter._convert_float = interpreter_instructions.convert_float
    interpreter.InterpreterBuilder.create_splat = interpreter_instructions.create_splat


@pytest.fixture(params=["interpreter"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Runner:
    """Calls a function of dqt_dist so that it launches its kernels. Calling the function itself runs its definition."""
    return InterpreterRunner() if request.param == "interpreter" else CudaRunner()
