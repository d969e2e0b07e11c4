#!/usr/bin/env python3
# pyright: reportPrivateImportUsage=false
"""What this device reaches at best: copies, matrix products in each precision, attention.

The other benchmarks divide their numbers by these.

    copy        one tensor of several GB onto another, negated; bytes read plus bytes written
    products    tokens x in x out: x [tokens, in] times W^T, W [out, in], as in the forward of a linear.
                bf16   torch.mm
                fp8    torch._scaled_mm with one scale per token and one per output, fast accumulation
                int8   torch._int_mm
                dgrad and wgrad are the same products with other dimensions
    attention   causal, heads of 128, through torch's scaled_dot_product_attention with cuDNN's and flash's kernels

Data are random, because on zeros a device draws less power and clocks higher. Each number is a median. Where a device
cannot do something, the table shows the reason. On a CPU shapes are small and products are fp32 and bf16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from benchmarks.common import append, device_name, markdown, median_seconds, one_line, provenance, write_json

EXAMPLES = """\
examples:
  benchmarks/ceilings.py
  benchmarks/ceilings.py --shape 16384,4096,22016 --output docs/benchmarks/ceilings.md --json ceilings.json
"""
# tokens, in, out: qkv, gate|up and down of the 1.36 B model of configs/, 8 sequences of 2048.
SHAPES = {"cuda": [(16384, 2048, 6144), (16384, 2048, 11264), (16384, 5632, 2048)], "cpu": [(256, 512, 1024)]}
COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
# batch, heads, sequence, width of a head
ATTENTION = {"cuda": (8, 16, 2048, 128), "cpu": (1, 2, 256, 64)}


@dataclass(frozen=True)
class Ceiling:
    """A rate the device reaches. `rate` is 0 where it failed, for the reason in `unit`."""

    kind: str
    """copy, bf16, fp8, int8, fp32, or an attention kernel with forward or backward."""
    shape: str
    rate: float
    unit: str


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=style)
    add = parser.add_argument
    add("--shape", action="append", metavar="TOKENS,IN,OUT", help="a product to measure; may be repeated")
    add("--output", metavar="FILE", help="also append the table to this file, as Markdown")
    add("--json", metavar="FILE", help="write all numbers")
    args = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [tuple(int(n) for n in shape.split(",")) for shape in args.shape or []] or SHAPES[device]
    ceilings = list(measure(device, shapes))
    about = provenance(device_name())
    append(args.output, f"## Ceilings\n\n{about}\n\n{table(ceilings)}")
    write_json(args.json, {"about": about, "ceilings": [asdict(ceiling) for ceiling in ceilings]})
    return 0


def table(ceilings: list[Ceiling]) -> str:
    rows = [(c.kind, c.shape, f"{c.rate:,.4g} {c.unit}" if c.rate else c.unit) for c in ceilings]
    return markdown(("what", "shape", "reached"), rows)


def best_rates(ceilings: list[Ceiling]) -> dict[str, float]:
    """The highest rate of each kind that was reached, in bytes/s or operations/s."""
    best: dict[str, float] = {}
    for c in ceilings:
        best[c.kind] = max(best.get(c.kind, 0.0), c.rate * (1e9 if c.unit == "GB/s" else 1e12))
    return {kind: rate for kind, rate in best.items() if rate}


def measure(device: str, shapes: list[Any]) -> Iterator[Ceiling]:
    """Copy, then products at `shapes`, then attention."""
    yield measured("copy", f"{COPY_BYTES[device] >> 20} MiB", 2 * COPY_BYTES[device], "GB/s", copy(device), device)
    for tokens, width, out in shapes:
        operations = 2 * tokens * width * out
        for kind, product in PRODUCTS[device].items():
            shape = f"{tokens} x {width} x {out}"
            yield measured(kind, shape, operations, "TFLOP/s", product(tokens, width, out, device), device)
    yield from attention(device)


def measured(
    kind: str, shape: str, amount: float, unit: str, make: Callable[[], Callable[[], Any]], device: str
) -> Ceiling:
    """`make` prepares the operands and returns the function to time. The operands are freed with this function."""
    import torch

    try:
        seconds = median_seconds(make, device)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return Ceiling(kind, shape, 0.0, one_line(error))
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()
    return Ceiling(kind, shape, amount / seconds / (1e9 if unit == "GB/s" else 1e12), unit)


def copy(device: str) -> Callable[[], Callable[[], Any]]:
    import torch

    def make() -> Callable[[], Any]:
        source = torch.randint(-(2**31), 2**31 - 1, (COPY_BYTES[device] // 4,), dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        # A kernel that does very little, instead of a plain copy: in a CUDA graph the copy engines do a plain copy, on
        # an H200 at two thirds of the rate.
        return lambda: torch.neg(source, out=target)

    return make


def float_product(dtype_name: str) -> Callable[..., Callable[[], Callable[[], Any]]]:
    def of_shape(tokens: int, width: int, out: int, device: str) -> Callable[[], Callable[[], Any]]:
        import torch

        def make() -> Callable[[], Any]:
            dtype = getattr(torch, dtype_name)
            x, weight = (torch.randn(n, width, device=device).to(dtype) for n in (tokens, out))
            return lambda: torch.mm(x, weight.t())

        return make

    return of_shape


def fp8_product(tokens: int, width: int, out: int, device: str) -> Callable[[], Callable[[], Any]]:
    import torch

    def make() -> Callable[[], Any]:
        x, weight = (torch.randn(n, width, device=device).to(torch.float8_e4m3fn) for n in (tokens, out))
        token_scale, row_scale = torch.rand(tokens, 1, device=device), torch.rand(1, out, device=device)
        return lambda: torch._scaled_mm(
            x, weight.t(), scale_a=token_scale, scale_b=row_scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return make


def int8_product(tokens: int, width: int, out: int, device: str) -> Callable[[], Callable[[], Any]]:
    import torch

    def make() -> Callable[[], Any]:
        x, weight = (torch.randint(-127, 128, (n, width), dtype=torch.int8, device=device) for n in (tokens, out))
        return lambda: torch._int_mm(x, weight.t())

    return make


PRODUCTS = {
    "cuda": {"bf16": float_product("bfloat16"), "fp8": fp8_product, "int8": int8_product},
    "cpu": {"fp32": float_product("float32"), "bf16": float_product("bfloat16")},
}


def attention(device: str) -> Iterator[Ceiling]:
    """Forward and backward. A causal forward does 2 * S^2 * width operations per head, the backward 2.5 times that."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    batch, heads, sequence, width = ATTENTION[device]
    forward_operations = 2 * batch * heads * sequence**2 * width
    shape = f"{batch} x {heads} x {sequence} x {width}"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    backends = {"flash": SDPBackend.FLASH_ATTENTION}
    if device == "cuda":
        backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION} | backends

    def forward(backend: SDPBackend) -> tuple[Callable[[], Any], list[Any]]:
        size = (batch, heads, sequence, width)
        inputs = [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]

        def attend() -> Any:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*inputs, is_causal=True)

        return attend, inputs

    def backward(backend: SDPBackend) -> Callable[[], Any]:
        attend, inputs = forward(backend)
        out = attend()
        gradient = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)

    for name, backend in backends.items():
        make_forward, make_backward = (partial(lambda b: forward(b)[0], backend), partial(backward, backend))
        yield measured(f"{name} forward", shape, forward_operations, "TFLOP/s", make_forward, device)
        yield measured(f"{name} backward", shape, 2.5 * forward_operations, "TFLOP/s", make_backward, device)


if __name__ == "__main__":
    sys.exit(main())
