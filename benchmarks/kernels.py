#!/usr/bin/env python3
"""Every operation of dqt_dist/kernels against its floor, the least time that its bytes and operations can take.

    floor          = max(bytes / copy bandwidth, operations / best product rate of that precision)
    of the ceiling = floor / measured

Both rates are measured in the same run (ceilings.py). Bytes count each input read once and each output written once.
Operations are two for each multiplication of a matrix product. Shapes are those of the 1.36 B model of configs/ on 8
sequences of 2048 tokens. Rows named `linear ...` are whole linears: unpack, transpose, product, scales. On a CPU shapes
are small and the definitions are measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from benchmarks import ceilings
from benchmarks.common import append, device_name, markdown, median_seconds, one_line, provenance, write_json
from dqt_dist.command_line import pyplot

EXAMPLES = """\
examples:
  benchmarks/kernels.py --json kernels.json --output docs/benchmarks/kernels.md
  benchmarks/kernels.py --only swiglu --only adamw
  benchmarks/kernels.py --from-json kernels.json --plot kernels.png        # where matplotlib is
"""
COLUMNS = (
    "operation",
    "shape",
    "must move, MB",
    "must do, GFLOP",
    "floor ms",
    "measured ms",
    "reached",
    "of the ceiling",
)


@dataclass(frozen=True)
class Shapes:
    """Sizes of one model on one micro-batch."""

    batch: int
    sequence: int
    hidden: int
    ffn: int
    heads: int
    vocabulary: int

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


# Rows and columns of gate|up in the model of 49 B weights that benchmarks/train_step.py fits on one H200.
LARGE = {"cuda": [(44032, 8192)], "cpu": []}
SHAPES = {"cuda": Shapes(8, 2048, 2048, 5632, 16, 32000), "cpu": Shapes(2, 64, 256, 512, 4, 1024)}


@dataclass(frozen=True)
class Operation:
    """One entry: bytes and operations, and a function that prepares the inputs and returns the function to time."""

    name: str
    shape: str
    num_bytes: float
    make: Callable[[], Callable[[], Any]]
    num_operations: float = 0.0
    precision: str = ""
    """Kind of the product in ceilings.py; empty for operations without one."""


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=style)
    add = parser.add_argument
    add("--only", action="append", metavar="TEXT", help="operations whose name contains TEXT; may be repeated")
    add("--output", metavar="FILE", help="append the tables to this file, as Markdown")
    add("--json", metavar="FILE", help="write all numbers")
    add("--from-json", metavar="FILE", help="measure nothing, take the numbers of that file")
    add("--plot", metavar="PNG", help="draw shares of the ceiling (needs matplotlib)")
    args = parser.parse_args()
    found = json.loads(Path(args.from_json).read_text()) if args.from_json else measure(args.only or [""])
    append(args.output, tables(found))
    write_json(args.json, found)
    if args.plot:
        plot(found["operations"], args.plot)
    return 0


def measure(only: list[str]) -> dict[str, Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = SHAPES[device]
    products = [(shapes.tokens, shapes.hidden, 2 * shapes.ffn), (shapes.tokens, shapes.ffn, shapes.hidden)]
    reached = list(ceilings.measure(device, products))
    rates = ceilings.best_rates(reached)
    rows = [row(o, device, rates) for o in operations(shapes, device) if any(text in o.name for text in only)]
    return {"about": provenance(device_name()), "ceilings": [asdict(c) for c in reached], "operations": rows}


def row(operation: Operation, device: str, rates: dict[str, float]) -> dict[str, Any]:
    import torch

    o = operation
    facts = {"name": o.name, "shape": o.shape, "bytes": o.num_bytes, "operations": o.num_operations}
    try:
        seconds = median_seconds(o.make, device)
    except Exception as error:  # one operation a device cannot do leaves the others
        return facts | {"failed": one_line(error)}
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()
    facts |= {"ms": seconds * 1e3}
    if o.precision and o.precision not in rates:
        return facts
    floor = max(o.num_bytes / rates["copy"], o.num_operations / rates[o.precision] if o.precision else 0.0)
    return facts | {"floor_ms": floor * 1e3, "of_ceiling": floor / seconds}


# ---- the operations ----


def operations(s: Shapes, device: str) -> Iterator[Operation]:
    """Every entry; nothing is allocated before its `make` is called."""
    yield from updates(s, device)
    yield from unpacking(s, device)
    yield from activations(s, device)
    yield from linears(s, device)


def low_bit(rows: int, columns: int, device: str) -> Any:
    """A ternary matrix with random codes."""
    import torch

    from dqt_dist.lowbit.coordinates import LogicalMatrix, RowBlock, ShardLayout
    from dqt_dist.lowbit.grid import make_grid
    from dqt_dist.lowbit.matrix import LowBitMatrix

    weight = LowBitMatrix(rows, columns, make_grid("ternary"), torch.device(device))
    weight.assign(ShardLayout((LogicalMatrix("a", rows, columns),), (RowBlock(0, 0, rows),), columns))
    weight.scale.fill_(2.0**-6)
    weight.set_codes(torch.randint(-1, 2, (rows, columns), device=device))
    return weight


def updates(s: Shapes, device: str) -> Iterator[Operation]:
    """The weight update of gate|up; with AdamW and 8-bit moments also of down and of a large gate|up.

    Bytes per weight: codes 1/4 read and 1/4 written, direction 4 or gradient 2, moments read and written.
    """
    import torch

    from dqt_dist.kernels.low_bit_update import AdamW, update_rows
    from dqt_dist.lowbit.update import RoundingKey
    from dqt_dist.optim.adamw import adamw_update_rows, new_moments

    key = RoundingKey(1, 1, "stochastic")

    def rounding(rows: int, columns: int) -> Operation:
        def make() -> Callable[[], Any]:
            weight, direction = low_bit(rows, columns, device), torch.randn(rows, columns, device=device)
            return lambda: update_rows(weight, direction, 0, 1e-4, 0.0, key)

        return Operation("update of a given direction", f"{rows} x {columns}", 4.5 * rows * columns, make)

    def adamw(state_bits: int, rows: int, columns: int) -> Operation:
        def make() -> Callable[[], Any]:
            weight, rule = low_bit(rows, columns, device), AdamW(0.9, 0.95, 1e-8, 0.0)
            gradient = torch.randn(rows, columns, device=device).bfloat16()
            moments, clip = (
                new_moments(rows, columns, state_bits, torch.device(device)),
                torch.ones((), device=device),
            )
            return lambda: adamw_update_rows(weight, gradient, moments, 0, clip, 1e-4, rule, key)

        moved = 2.5 + {8: 2 * 2.0625, 32: 16}[state_bits]
        return Operation(f"adamw update, {state_bits}-bit moments", f"{rows} x {columns}", moved * rows * columns, make)

    gate_up, down = (2 * s.ffn, s.hidden), (s.hidden, s.ffn)
    yield rounding(*gate_up)
    yield adamw(32, *gate_up)
    for rows, columns in (gate_up, down, *LARGE[device]):
        yield adamw(8, rows, columns)


def unpacking(s: Shapes, device: str) -> Iterator[Operation]:
    """Packed codes to operands. Per weight 1/4 byte is read and the operand is written."""
    import torch

    from dqt_dist.kernels.unpack import unpack_operand

    rows, columns = 2 * s.ffn, s.hidden
    targets = [("bf16", torch.bfloat16, 2), ("int8", torch.int8, 1), ("e4m3", torch.float8_e4m3fn, 1)]
    for name, dtype, width in targets:
        for transposed in (False, True) if name == "e4m3" else (False,):

            def make(dtype: torch.dtype = dtype, transposed: bool = transposed) -> Callable[[], Any]:
                weight = low_bit(rows, columns, device)
                return lambda: unpack_operand(weight.codes, weight.grid, columns, dtype, None, transposed)

            label = f"unpack to {name}" + ", transposed" * transposed
            yield Operation(label, f"{rows} x {columns}", (0.25 + width) * rows * columns, make)


def activations(s: Shapes, device: str) -> Iterator[Operation]:
    """The operations between products. Inputs and outputs are bf16 unless the name differs; codes are one byte."""
    import torch

    from dqt_dist.kernels import cross_entropy, quantize, rope
    from dqt_dist.kernels.transpose import transpose

    e4m3, t, h, f = torch.float8_e4m3fn, s.tokens, s.hidden, s.ffn

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device=device).bfloat16()

    def quantize_to(code: torch.dtype) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Any]:
            x = random(t, h)
            return lambda: quantize.quantize(x, code)

        return make

    def norm() -> Callable[[], Any]:
        x, weight = random(t, h), torch.ones(h, device=device).bfloat16()
        return lambda: quantize.rms_norm_quantize(x, weight, 1e-5, e4m3)

    def norm_backward() -> Callable[[], Any]:
        dh, x, weight = random(t, h), random(t, h), torch.ones(h, device=device).bfloat16()
        inverse_rms = torch.ones(t, 1, device=device)
        return lambda: quantize.rms_norm_backward(dh, x, weight, inverse_rms)

    def swiglu() -> Callable[[], Any]:
        gate_up = random(t, 2 * f)
        return lambda: quantize.swiglu_quantize(gate_up, e4m3)

    def swiglu_backward(code: torch.dtype | None) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Any]:
            dh, gate_up = random(t, f), random(t, 2 * f)
            scale = None if code is None else quantize.swiglu_quantize(gate_up, code).scale
            gradient_scale = None if code is None else torch.full((2 * f,), 2.0**-6, device=device)
            return lambda: quantize.swiglu_backward(dh, gate_up, scale, code, gradient_scale)

        return make

    def scaled() -> Callable[[], Any]:
        x, token, feature = random(t, 3 * h), torch.rand(t, 1, device=device), torch.rand(3 * h, device=device)
        return lambda: quantize.scaled(x, token, feature, torch.bfloat16)

    def transposed() -> Callable[[], Any]:
        codes, factor = random(t, h).to(e4m3), torch.rand(t, 1, device=device)
        return lambda: transpose(codes, factor)

    def rotated(grad: bool) -> Any:
        cos, sin = rope.angles(s.sequence, h // s.heads, 10000.0, torch.device(device))
        mixed = random(s.sequence, s.batch, 3 * h).requires_grad_(grad)
        return mixed, lambda: rope.split_and_rotate(mixed, s.heads, cos, sin)

    def rope_backward() -> Callable[[], Any]:
        mixed, forward = rotated(True)
        outputs = forward()
        gradients = [torch.randn_like(x) for x in outputs]
        return lambda: torch.autograd.grad(outputs, mixed, gradients, retain_graph=True)

    def head() -> Any:
        return random(t, s.vocabulary), torch.randint(s.vocabulary, (t,), device=device)

    def statistics() -> Callable[[], Any]:
        logits, labels = head()
        return lambda: cross_entropy.statistics(logits, labels)

    def loss_gradient() -> Callable[[], Any]:
        logits, labels = head()
        log_sum, grad = torch.full((t,), 11.0, device=device), torch.full((t,), 1 / t, device=device)
        return lambda: cross_entropy.gradient_(logits, labels, log_sum, grad)

    yield Operation("quantise to int8", f"{t} x {h}", 3 * t * h, quantize_to(torch.int8))
    yield Operation("quantise to e4m3", f"{t} x {h}", 3 * t * h, quantize_to(e4m3))
    yield Operation("norm to e4m3", f"{t} x {h}", 3 * t * h, norm)
    yield Operation("norm backward", f"{t} x {h}", 6 * t * h, norm_backward)
    yield Operation("swiglu to e4m3", f"{t} x {f}", 5 * t * f, swiglu)
    yield Operation("swiglu backward, bf16", f"{t} x {f}", 12 * t * f, swiglu_backward(None))
    yield Operation("swiglu backward, e4m3", f"{t} x {f}", 9 * t * f, swiglu_backward(e4m3))
    yield Operation("scales of an output", f"{t} x {3 * h}", 4 * t * 3 * h, scaled)
    yield Operation("transpose of e4m3", f"{t} x {h}", 2 * t * h, transposed)
    yield Operation("rope", f"{t} x {3 * h}", 4 * t * 3 * h, lambda: rotated(False)[1])
    yield Operation("rope backward", f"{t} x {3 * h}", 4 * t * 3 * h, rope_backward)
    yield Operation("cross-entropy", f"{t} x {s.vocabulary}", 2 * t * s.vocabulary, statistics)
    yield Operation("cross-entropy gradient", f"{t} x {s.vocabulary}", 4 * t * s.vocabulary, loss_gradient)


def linears(s: Shapes, device: str) -> Iterator[Operation]:
    """The three products of gate|up as in layers/compute.py. Inputs are quantised already; the result is bf16."""
    import torch

    from dqt_dist.config import QuantizationConfig
    from dqt_dist.kernels.quantize import quantize
    from dqt_dist.layers.compute import make_compute

    t, width, out = s.tokens, s.hidden, 2 * s.ffn
    weights, operations = width * out, 2 * t * width * out
    # Precision of the forward's and of the backward's products; on a CPU all but fp32 are defined through fp32.
    precisions = {"bf16": ("bf16", "bf16"), "int8": ("int8", "bf16"), "fp8": ("fp8", "fp8")}
    for name, (forward, backward) in precisions.items():

        def operands(name: str = name) -> Any:
            compute, weight = make_compute(QuantizationConfig(compute=name)), low_bit(out, width, device)
            weight.gradient.dtype = torch.bfloat16
            x = quantize(torch.randn(t, width, device=device).bfloat16(), compute.activation_dtype)
            gradient = compute.gradient(torch.randn(t, out, device=device).bfloat16(), weight)
            return compute, weight, x, gradient

        def product(operands: Any = operands) -> Callable[[], Any]:
            compute, weight, x, _ = operands()
            return lambda: compute.epilogue(compute.product(weight)(x), x.scale, weight, torch.bfloat16)

        def dgrad(operands: Any = operands) -> Callable[[], Any]:
            compute, weight, _, gradient = operands()
            return lambda: compute.dgrad(weight)(gradient)

        def wgrad(operands: Any = operands) -> Callable[[], Any]:
            compute, weight, x, gradient = operands()

            def run() -> None:
                weight.gradient.local = None  # as after an update: the product itself becomes the sum
                compute.wgrad(gradient, x, weight)

            return run

        shape = f"{t} x {width} x {out}"
        dy_bytes = t * out * (1 if backward == "fp8" else 2)
        moved = {"forward": t * width + weights / 4 + 2 * t * out, "dgrad": dy_bytes + weights / 4 + 2 * t * width}
        moved["wgrad"] = dy_bytes + t * width + 2 * weights
        for what, make in (("forward", product), ("dgrad", dgrad), ("wgrad", wgrad)):
            precision = forward if what == "forward" else backward
            yield Operation(f"linear {name}, {what}", shape, moved[what], make, operations, precision)


# ---- what is shown ----


def tables(found: dict[str, Any]) -> str:
    reached = ceilings.table([ceilings.Ceiling(**c) for c in found["ceilings"]])
    rows = markdown(COLUMNS, [cells(r) for r in found["operations"]])
    return f"## Kernels\n\n{found['about']}\n\n{rows}\nCeilings of the same run:\n\n{reached}"


def cells(r: dict[str, Any]) -> list[str]:
    start = [r["name"], r["shape"], f"{r['bytes'] / 1e6:,.1f}", f"{r['operations'] / 1e9:,.0f}" * bool(r["operations"])]
    if "failed" in r:
        return [*start, "", r["failed"], "", ""]
    if r["operations"]:
        speed = f"{r['operations'] / r['ms'] / 1e9:,.3g} TFLOP/s"
    else:
        speed = f"{r['bytes'] / r['ms'] / 1e6:,.3g} GB/s"
    floor = f"{r['floor_ms']:.4f}" if "floor_ms" in r else ""
    return [*start, floor, f"{r['ms']:.4f}", speed, f"{r['of_ceiling']:.0%}" if floor else ""]


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Share of the ceiling, a bar an operation, with its time."""
    plt = pyplot()
    rows = [r for r in rows if "of_ceiling" in r][::-1]
    figure, axis = plt.subplots(figsize=(10, 1 + 0.32 * len(rows)), layout="constrained")
    colors = ["#dd8452" if r["operations"] else "#4c72b0" for r in rows]
    bars = axis.barh([f"{r['name']}, {r['shape']}" for r in rows], [100 * r["of_ceiling"] for r in rows], color=colors)
    axis.bar_label(bars, [f"{r['of_ceiling']:.0%}, {r['ms']:.3g} ms" for r in rows], padding=3, fontsize=8)
    axis.axvline(100, color="gray", lw=0.8)
    axis.set(xlabel="% of the ceiling measured in the same run (blue: bandwidth, orange: products)")
    axis.margins(x=0.2, y=0.01)
    figure.savefig(path, dpi=130)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
