"""Launches of Triton kernels without most of Triton's Python.

A step of a 24-layer model launches a thousand kernels. Triton binds and specialises the arguments of each anew, 50 us and more on
a slow core, which adds up to a third of the step. Here the compiled kernel is looked up by what Triton specialises on, and
launched directly; only the first launch of a kind goes Triton's way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants), a jit function whose constexpr parameters come last.

    args: tensors, None, numbers. Tensors count by type and 16-byte alignment, integers by value unless the kernel does not
    specialise on them (then by width), floats are all alike. constants: constexpr parameters, and options such as num_warps.
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
