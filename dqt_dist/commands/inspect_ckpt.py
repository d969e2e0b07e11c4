"""Shows what is inside a checkpoint, checks its files, or prints the digest of its state.

PATH is a checkpoint, or a run folder or its checkpoints folder: then the newest. One process, one tensor in memory at a
time.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dqt_dist.command_line import drawing, make_parser, run_tool, save_picture
from dqt_dist.errors import UserError

if TYPE_CHECKING:  # the functions import what they need when they run, so that --help is quick
    from collections.abc import Callable

    from rich.console import Console
    from rich.table import Table
    from torch import Tensor

    from dqt_dist.checkpoint.reader import CheckpointReader
    from dqt_dist.lowbit.grid import Grid

EXAMPLES = """\
examples:
  # config, step, every matrix, sizes
  %(prog)s runs/demo_cpu

  # the same, and a picture of the codes
  %(prog)s runs/demo_cpu --plot codes.png

  # every file against the manifest
  %(prog)s runs/demo_cpu/checkpoints/step_00000300 --verify

  # equal for equal states, whatever layout wrote them
  %(prog)s runs/demo_cpu --digest | tail -n 1

exit code: 0, or 2 when PATH is no complete checkpoint of this format or --verify finds a bad file.
"""

FP16_BYTES = 2
BARS = "".join(chr(0x2581 + height) for height in range(8))
BINS = 16
MOST_COLUMNS = 1000


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("dqt-inspect", __doc__, EXAMPLES)
    parser.add_argument("path", metavar="PATH", type=Path, help="checkpoint, run folder or checkpoints folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--digest", action="store_true", help="print one SHA-256 a part of the state and, last, their total"
    )
    what.add_argument("--verify", action="store_true", help="compare size and SHA-256 of every file with the manifest")
    what.add_argument(
        "--plot", metavar="FILE.png", type=Path, help="also draw shares of codes and scales of every matrix"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if args.verify:
        verify(args.path)
    elif args.digest:
        print_digest(args.path)
    else:
        show(args.path, args.plot)


def verify(path: Path) -> None:
    from dqt_dist.checkpoint import folder

    checkpoint = folder.resolve(path)
    checked = folder.verify(checkpoint)
    print(f"{checkpoint}: whole, {checked:,} bytes checked against the manifest")


def print_digest(path: Path) -> None:
    from dqt_dist.checkpoint.digest import digest_of
    from dqt_dist.checkpoint.reader import CheckpointReader

    digest = digest_of(CheckpointReader(path))
    for part, value in digest.parts.items():
        print(f"{part:<10}  {value}")
    print(digest.total)


# ---- the default: what is inside ----


@dataclass(frozen=True)
class MatrixFigures:
    """One low-bit matrix as it is stored."""

    name: str
    rows: int
    columns: int
    scale: float
    counts: Tensor
    """How many weights have each code, qmin first: int64 [levels of the grid]."""
    disk_bytes: int
    latent_scale: float | None = None
    latent_counts: Tensor | None = None
    """The same of latents, where there are latents."""

    @property
    def shares(self) -> Tensor:
        return self.counts.double() / self.counts.sum()


def show(path: Path, plot_file: Path | None) -> None:
    from rich.console import Console

    from dqt_dist.checkpoint.reader import CheckpointReader
    from dqt_dist.lowbit.grid import make_grid

    draw = None if plot_file is None else plotter(plot_file)  # before the long part: matplotlib may be missing
    reader = CheckpointReader(path)
    grid = make_grid(reader.config.quantization.bits)
    matrices = read_matrices(reader, grid)
    console = Console(highlight=False)
    console.print(about(reader), soft_wrap=True, markup=False)
    if matrices:
        print_whole(console, matrix_table(matrices, grid))
    console.print(sizes(reader, matrices), soft_wrap=True, markup=False)
    if draw is not None:
        if not matrices:
            method = reader.config.quantization.method
            raise UserError(f"--plot: {reader.path} has no low-bit weights to draw (quantization.method {method!r})")
        draw(matrices, grid)
        print(f"drew {plot_file}")


def print_whole(console: Console, table: Table) -> None:
    """Prints a table at its own width. At a smaller one rich cuts names and numbers, and leaves columns out; a terminal
    that is narrower shows each row on two lines."""
    unbounded = console.options.update(width=MOST_COLUMNS)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)


def read_matrices(reader: CheckpointReader, grid: Grid) -> list[MatrixFigures]:
    """Figures of every low-bit matrix, in the order of the model's layers."""
    from dqt_dist.lowbit.grid import make_grid
    from dqt_dist.lowbit.packing import unpack
    from dqt_dist.progress_line import ProgressLine

    latent_bits = reader.config.quantization.latent_bits
    names = [name.removeprefix("codes/") for name in reader.tensors if name.startswith("codes/")]
    found = []
    for name in ProgressLine(sorted(names, key=natural), "reading codes", unit=" matrices"):
        info = reader.tensors[f"codes/{name}"]
        # Rows fill their last group: widths are multiples of 4 (config.CODES_PER_GROUP).
        columns = info.shape[1] // grid.group_bytes * grid.group_codes
        counts = count(unpack(reader.read(f"codes/{name}"), grid, columns), grid)
        scale = float(reader.read(f"scale/{name}"))
        figures = MatrixFigures(name, info.shape[0], columns, scale, counts, info.disk_bytes)
        if latent_bits is not None:
            latent_grid = make_grid(latent_bits)
            latents = unpack(reader.read(f"latent/{name}"), latent_grid, columns)
            latent_scale = float(reader.read(f"latent_scale/{name}"))
            figures = replace(figures, latent_scale=latent_scale, latent_counts=count(latents, latent_grid))
        found.append(figures)
    return found


def count(integers: Tensor, grid: Grid) -> Tensor:
    """How often each integer of the grid occurs, qmin first."""
    return (integers.flatten().int() - grid.qmin).bincount(minlength=grid.qmax - grid.qmin + 1)


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key under which layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def about(reader: CheckpointReader) -> str:
    """What it is: path, progress, model, method, layout, versions."""
    model, quantization = reader.config.model, reader.config.quantization
    optimizer, progress, manifest = reader.config.optimizer, reader.progress, reader.manifest

    latents = f" of {quantization.latent_bits}-bit latents" if quantization.latent_bits else ""

    def listed(value: object) -> str:
        return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)

    lines = {
        "checkpoint": str(reader.path),
        "progress": f"step {progress.step:,} of {reader.config.training.steps:,}, {progress.tokens:,} tokens, "
        f"{progress.samples:,} samples",
        "model": f"{model.num_layers} layers, hidden {model.hidden_size}, ffn {model.ffn_hidden_size}, "
        f"{model.num_attention_heads} heads in {model.num_query_groups} groups, vocabulary {model.vocab_size}, "
        f"sequence {model.seq_length}",
        "method": f"{quantization.method}, bits {quantization.bits}{latents}, compute {quantization.compute}, "
        f"optimizer {optimizer.name}",
        "written by": listed(manifest.get("layout", "unknown")),
        "versions": listed(manifest.get("versions", "unknown")),
    }
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def matrix_table(matrices: list[MatrixFigures], grid: Grid) -> Table:
    """A row a matrix: shape, bits, scale, shares of its codes, size on disk against fp16; what its latents are."""
    from rich.box import SIMPLE
    from rich.table import Table

    few = grid.qmax - grid.qmin < 4
    codes = [f"{code:+d}" if code else "0" for code in range(grid.qmin, grid.qmax + 1)]
    title = f"{len(matrices)} matrices of {grid.bits} codes, {grid.qmin} to {grid.qmax}"
    table = Table(title=title, box=SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("matrix")
    for title in ("shape", "bits", "scale", *([f"share {c}" for c in codes] if few else ["codes", "share 0"])):
        table.add_column(title, justify="right")
    table.add_column("on disk", justify="right")
    table.add_column("of fp16", justify="right")
    has_latents = matrices[0].latent_counts is not None
    for title in ("latent scale", "latents", "at their ends") if has_latents else ():
        table.add_column(title, justify="right")
    for m in matrices:
        shares = [f"{share:.1%}" for share in m.shares.tolist()]
        shown = shares if few else [histogram(m.counts), shares[-grid.qmin]]
        weights = m.rows * m.columns
        bits = "1.58" if grid.bits == "ternary" else str(grid.bits)
        size = [f"{m.disk_bytes:,}", f"{m.disk_bytes / (weights * FP16_BYTES):.1%}"]
        latents = []
        if m.latent_counts is not None:
            at_ends = float(m.latent_counts[[0, -1]].sum()) / weights
            latents = [f"{m.latent_scale:.6g}", histogram(m.latent_counts), f"{at_ends:.1%}"]
        table.add_row(m.name, f"{m.rows} x {m.columns}", bits, f"{m.scale:.6g}", *shown, *size, *latents)
    return table


def histogram(counts: Tensor) -> str:
    """Counts of codes as at most BINS bars, qmin on the left."""
    bins = counts.view(min(BINS, len(counts)), -1).sum(dim=1).double()
    heights = (bins / bins.max() * (len(BARS) - 1)).round().int().tolist()
    return "".join(BARS[height] for height in heights)


def sizes(reader: CheckpointReader, matrices: list[MatrixFigures]) -> str:
    """Where the bytes are, and the low-bit weights against fp16."""
    from dqt_dist.checkpoint.digest import PARTS, part_of

    on_disk = dict.fromkeys(PARTS, 0)
    for name, info in reader.tensors.items():
        on_disk[part_of(name)] += info.disk_bytes
    total = sum(entry["bytes"] for entry in reader.manifest["files"].values())
    on_disk["metadata"] = total - sum(on_disk.values())
    lines = [f"{'on disk':<12}{total:,} bytes in {len(reader.manifest['files'])} files"]
    lines += [f"  {part:<10}{size:>18,}  {size / total:6.1%}" for part, size in on_disk.items() if size]
    if matrices:
        weights = sum(m.rows * m.columns for m in matrices)
        codes = sum(m.disk_bytes for m in matrices)
        lines.append(
            f"{'weights':<12}{weights:,} low-bit weights take {codes:,} bytes, {8 * codes / weights:.2f} bits each; "
            f"in fp16 {weights * FP16_BYTES:,} bytes, {weights * FP16_BYTES / codes:.1f} times as much"
        )
    return "\n".join(lines)


def plotter(file: Path) -> Callable[[list[MatrixFigures], Grid], None]:
    """A function that draws the figures into `file`; raises UserError when that cannot work."""
    pyplot = drawing("--plot", file)

    def draw(matrices: list[MatrixFigures], grid: Grid) -> None:
        import torch

        height = max(4.0, 0.16 * len(matrices) + 1.5)
        figure, (codes, scales) = pyplot.subplots(1, 2, sharey=True, figsize=(11, height), layout="constrained")
        shares = torch.stack([m.shares for m in matrices]).numpy()
        edges = (grid.qmin - 0.5, grid.qmax + 0.5, len(matrices) - 0.5, -0.5)
        image = codes.imshow(shares, aspect="auto", extent=edges, cmap="viridis", vmin=0, interpolation="nearest")
        # Beside the panel its label would be read as that of the other panel's axis.
        figure.colorbar(image, ax=codes, label="share of the codes of a matrix", location="bottom")
        codes.set(xlabel="code", title="codes", yticks=range(len(matrices)))
        codes.locator_params(axis="x", integer=True)
        codes.set_yticklabels([m.name for m in matrices], fontsize=6)
        scales.plot([m.scale for m in matrices], range(len(matrices)), "o", markersize=3)
        scales.set(xlabel="scale", title="scales")
        scales.set_xscale("log", base=2)
        scales.grid(alpha=0.3)
        save_picture(figure, file)
        pyplot.close(figure)

    return draw


def main(argv: list[str] | None = None) -> int:
    return run_tool("dqt-inspect", run, parse_arguments(argv))
