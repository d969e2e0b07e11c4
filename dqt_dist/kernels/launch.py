"""Launches of Triton kernels without most of Triton's Python.

A step of a 24-layer model launches a thousand kernels. Triton binds and specialises the arguments of every launch,
which takes 50 us and more on a slow core: up to a third of the step. This module looks up the compiled kernel by the
properties of arguments that Triton specialises on, and launches the kernel directly. Only the first launch of a kind
goes through Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants), a jit function whose constexpr parameters come last.

    args: tensors, None, numbers. Launches are of one kind when these properties of their arguments agree:

        tensor    dtype, and whether the address is a multiple of 16 bytes
        integer   its value; its width (32 or 64 bits) where the kernel does not specialise on the parameter
        float     none

    constants: constexpr parameters, and options such as num_warps.
    """
    if not torch.cuda.is_available():  # Triton's interpreter
        kernel[grid](*args, **constants)
        return
    device = torch.cuda.current_device()
    key: list[Any] = [kernel, device, *constants.values()]
    for arg, parameter in zip(args, kernel.params, strict=False):
        if isinstance(arg, Tensor):
            key.append((arg.dtype, arg.data_ptr() % 16 == 0))
        elif isinstance(arg, float) or arg is None:
            key.append(type(arg))
        else:
            key.append(-(2**31) <= arg < 2**31 if parameter.do_not_specialize else arg)
    found = _compiled.get(tuple(key))
    if found is None:
        compiled = kernel[grid](*args, **constants)
        _compiled[tuple(key)] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, tail = found
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)  # pyright: ignore[reportAttributeAccessIssue]
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *tail)
