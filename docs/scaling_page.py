#!/usr/bin/env python3
"""Writes docs/scaling.md, what 1 to 4,096 GPUs take, from the planner (dqt_dist/plan), with its figures and plots.

    docs/scaling_page.py            writes scaling.json, scaling.md and scaling.svg, in a minute; needs matplotlib
    docs/scaling_page.py --check    exit code 1 when scaling.json or scaling.md is not what would be written

scaling.json has what the planner says of each (model, method, number of GPUs). The page and the plots are made from it
alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from docs.generated import write_or_check
from dqt_dist.config import load_config, process_grid
from dqt_dist.plan.arithmetic import (
    MACHINE_GPUS,
    NETWORK_BYTES_PER_SECOND,
    RESERVED_GIB,
    device_named,
)
from dqt_dist.plan.footprint import largest_footprint
from dqt_dist.plan.speed import (
    LARGE,
    MFU,
    PIPELINE_FACTORS,
    RECOMPUTE_MFU,
    SECONDS_PER_BYTE,
    TENSOR_SECONDS_PER_BYTE,
    bytes_to_other_machines,
    expected_speed,
)
from dqt_dist.plan.suggest import ZERO_STAGES, suggestions
from dqt_dist.plan.traffic import bytes_sent, sent_to_tensor_ranks

FOLDER = Path(__file__).resolve().parent
PAGE, FIGURES, PLOTS = FOLDER / "scaling.md", FOLDER / "scaling.json", FOLDER / "scaling.svg"
WIDTH = 120
DEVICE = device_named("h100")
MOST_GPUS = 4096
STAGE = 1

METHODS = {
    "ternary": (),
    "ordinary": (
        "quantization.method=none", "quantization.compute=bf16", "quantization.latent_bits=null",
        "quantization.scale_refit_interval=0", "optimizer.state_bits=32",
    ),
}  # fmt: skip
"""Overrides of each method; those of ordinary weights as in configs/README.md."""


@dataclass(frozen=True)
class Model:
    """One model of the page."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    cuts: tuple[int, ...] = (1,)
    """Numbers of GPUs are powers of two, times one of these."""

    @property
    def gpus(self) -> list[int]:
        return sorted(cut * 2**power for cut in self.cuts for power in range(13) if cut * 2**power <= MOST_GPUS)

    @property
    def path(self) -> Path:
        return FOLDER.parent / "configs" / f"{self.config}.json"


MODELS = (
    Model("1B", "1b_ternary_fp8"),
    Model("7B", "7b_ternary"),
    Model("13B", "13b_ternary"),
    Model("70B", "70b_ternary"),
    # Llama 3.1 405B. 126 layers have no even number of stages but 2, 6, 14, 18, 42, 126: hence multiples of 7.
    Model(
        "405B",
        "70b_ternary",
        (
            "model.num_layers=126", "model.hidden_size=16384", "model.ffn_hidden_size=53248",
            "model.num_attention_heads=128", "model.num_query_groups=8", "model.vocab_size=128256",
            "model.seq_length=8192", "training.global_batch_size=2048", "parallel.pipeline=1",
        ),
        cuts=(1, 7),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """What the planner says of a model, a method and a number of GPUs: the layout that it suggests first."""

    model: str
    method: str
    gpus: int
    stage: int
    """Of ZeRO."""
    tensor: int
    pipeline: int
    data: int
    micro_batch: int
    micro_batches: int
    recompute: str
    memory: dict[str, int]
    """Bytes of the largest rank by kind."""
    sent: dict[str, int]
    """Bytes that this rank sends in a step by kind."""
    far: int
    """Of them to data-parallel ranks in other machines."""
    beside: int
    """Of them to tensor-parallel ranks."""
    seconds: dict[str, float]
    """Of a step by part: as `Speed.parts`, with what is computed again apart."""
    tokens_per_second: float
    single: float
    """Tokens/s of one GPU that computes nothing twice, as if it held the model."""

    @property
    def step(self) -> float:
        return sum(self.seconds.values())

    @property
    def of_ideal(self) -> float:
        return self.tokens_per_second / self.single / self.gpus

    @property
    def gib(self) -> float:
        return sum(self.memory.values()) / 2**30


def figure(model: Model, method: str, gpus: int, stages: Sequence[int] = (STAGE,)) -> Figure | None:
    """The suggested layout, of those with a ZeRO stage of `stages`. None where nothing fits."""
    overrides = [*model.overrides, *METHODS[method]]
    found = suggestions(model.path, overrides, gpus, DEVICE, stages)
    if not found:
        return None
    config = load_config(model.path, [*overrides, *found[0].settings])
    grid = process_grid(config, gpus)
    memory, speed = largest_footprint(config, grid), expected_speed(config, grid, DEVICE)
    uncut = ("parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=1", "training.recompute=none")
    alone = load_config(model.path, [*overrides, *uncut])
    single = expected_speed(alone, process_grid(alone, 1), DEVICE)
    assert speed is not None and single is not None, "the precision was measured"
    ideal = single.seconds / gpus
    parts = {"products": ideal, "again": speed.parts["products"] - ideal} | {
        part: seconds for part, seconds in speed.parts.items() if part != "products"
    }
    return Figure(
        model.name, method, gpus, config.zero_stage,
        grid.tensor, grid.pipeline, grid.data,
        config.training.micro_batch_size, grid.num_microbatches, config.training.recompute,
        memory.kinds(),
        {kind: count for kind, count in bytes_sent(config, grid, memory.stage).items() if count},
        round(bytes_to_other_machines(config, grid)),
        sum(sent_to_tensor_ranks(config, grid, memory.stage).values()),
        {part: round(seconds, 6) for part, seconds in parts.items()},
        round(speed.tokens_per_second, 1),
        round(single.tokens_per_second, 1),
    )  # fmt: skip


def figures(models: Iterable[Model] = MODELS) -> list[Figure]:
    """What the planner suggests with ZeRO stage `STAGE` at each number of GPUs. Then, of models that fewer GPUs hold
    with another stage, the smallest such number."""
    found, smaller = [], []
    for model in models:
        for method in METHODS:
            own = [item for gpus in model.gpus if (item := figure(model, method, gpus)) is not None]
            fewer = [gpus for gpus in model.gpus if gpus < own[0].gpus]
            others = [stage for stage in ZERO_STAGES if stage != STAGE]
            found += own
            smaller += [item for gpus in fewer if (item := figure(model, method, gpus, others)) is not None][:1]
    return found + smaller


def to_json(found: Iterable[Figure]) -> str:
    """A line per figure."""
    return "[\n" + ",\n".join(json.dumps(asdict(item)) for item in found) + "\n]\n"


class Figures:
    """All figures of the page, looked up."""

    def __init__(self, text: str) -> None:
        found = [Figure(**values) for values in json.loads(text)]
        self.all = [item for item in found if item.stage == STAGE]
        self.smaller = [item for item in found if item.stage != STAGE]

    def of(self, model: str, method: str) -> list[Figure]:
        """By number of GPUs, the smallest first."""
        return [item for item in self.all if (item.model, item.method) == (model, method)]

    def at(self, model: str, method: str, gpus: int) -> Figure:
        return next(item for item in self.of(model, method) if item.gpus == gpus)

    def both(self, model: str, gpus: int) -> tuple[Figure, Figure]:
        """Ternary, ordinary."""
        return self.at(model, "ternary", gpus), self.at(model, "ordinary", gpus)


# ---- text ----


def paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def bullets(texts: Iterable[str]) -> str:
    return "\n".join(
        textwrap.fill(
            " ".join(text.split()), WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False,
            break_on_hyphens=False,
        )
        for text in texts
    ) + "\n"  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cell or '-' for cell in cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


def layout(item: Figure) -> str:
    return f"{item.tensor} x {item.pipeline} x {item.data}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def part(item: Figure, name: str) -> float:
    """Share of the step that a part takes."""
    return item.seconds.get(name, 0.0) / item.step


def samples_and_tokens(model: Model) -> tuple[int, int]:
    config = load_config(model.path, model.overrides)
    samples = config.training.global_batch_size
    return samples, samples * config.model.seq_length


def weights_of(model: Model) -> int:
    """In linears, embedding and head."""
    shape = load_config(model.path, model.overrides).model
    return shape.num_layers * shape.linear_weights_per_block + 2 * shape.vocab_size * shape.hidden_size


def smallest_table(found: Figures) -> str:
    rows = []
    for model in MODELS:
        samples, tokens = samples_and_tokens(model)
        cells = [model.name, f"{weights_of(model) / 1e9:.2f} B", f"{samples:,} samples, {tokens / 1e6:.1f} M tokens"]
        for method in METHODS:
            first = found.of(model.name, method)[0]
            cells.append(f"{first.gpus}: {layout(first)}, {first.gib:.0f} GiB")
        rows.append(cells)
    return table(["model", "weights", "global batch", *METHODS], rows)


def speed_table(items: Iterable[Figure]) -> str:
    parts = ("again", "tensor", "pipeline", "data", "network")
    head = ["GPUs", "method", "TP x PP x DP", "micro-batches", "recompute", "s/step", "tokens/s", "of ideal", *parts]
    rows = [
        [
            f"{item.gpus:,}", item.method, layout(item), f"{item.micro_batches} of {item.micro_batch}", item.recompute,
            f"{item.step:,.3f}", f"{item.tokens_per_second:,.0f}", f"{item.of_ideal:.2f}",
            *(percent(part(item, name)) if item.seconds.get(name) else "" for name in parts),
        ]
        for item in items
    ]  # fmt: skip
    return table(head, rows)


def memory_table(items: Sequence[Figure]) -> str:
    kinds = list(items[0].memory)
    rows = [
        [
            f"{item.gpus:,}", item.method,
            *(f"{size / 2**30:.2f}" if size else "" for size in item.memory.values()),
            f"{item.gib:.1f}", percent(item.gib / DEVICE.memory_gib),
        ]
        for item in items
    ]  # fmt: skip
    return table(["GPUs", "method", *kinds, "all", f"of {DEVICE.memory_gib}"], rows)


def sent_table(items: Iterable[Figure]) -> str:
    columns = {
        "gradients": ("gradients",),
        "codes": ("codes", "means"),  # the sums from which their scales are refitted: 8 bytes per matrix
        "weights": ("weights",),
        "activations": ("activations", "activation_maxima", "megatron"),
        "pipeline": ("pipeline",),
    }
    rows = []
    for item in items:
        sizes = [sum(item.sent.get(kind, 0) for kind in kinds) for kinds in columns.values()]
        assert sum(sizes) == sum(item.sent.values()), "every kind has a column"
        cells = [f"{size / 1e9:.2f}" if size else "" for size in [*sizes, sum(sizes), item.far]]
        rows.append([f"{item.gpus:,}", item.method, *cells])
    return table(["GPUs", "method", *columns, "all", "to other machines"], rows)


def model_text(found: Figures, model: Model) -> str:
    items = sorted(
        (item for item in found.all if item.model == model.name), key=lambda item: (item.gpus, item.method != "ternary")
    )
    samples, tokens = samples_and_tokens(model)
    source = f"`configs/{model.config}.json`" + (" with the shape of Llama 3.1 405B" if model.overrides else "")
    return "\n".join(
        [
            f"## {model.name}\n",
            paragraph(f"{source}, {samples:,} samples = {tokens:,} tokens a step. The suggested layout and its time:"),
            speed_table(items),
            "GiB of the largest rank by kind:\n",
            memory_table(items),
            "GB that this rank sends in a step by kind:\n",
            sent_table(items),
        ]
    )


HEAD = f"""\
# 1 to {MOST_GPUS:,} GPUs

Memory, traffic and speed of five models on 1 to {MOST_GPUS:,} H100, as the planner (`dqt_dist/plan`) computes them.

**Nothing on this page was run.** Measured were [one GPU](benchmarks/train_step.md) and [two GPUs of one
machine](benchmarks/layouts.md), at 1.36 B weights. Everything beyond is the cost model's word; its constants
[stand below](#what-the-cost-model-takes). `docs/scaling_page.py` makes the page. `launchers/pretrain.py --plan` and
`--suggest` say the same of your own config ([planning](planning.md)).

![Memory per GPU and tokens/s against the number of GPUs](scaling.svg)

- **ternary**: method dqt, fp8 products, codes of 8-bit latents, 8-bit moments, bf16 gradients.
- **ordinary**: method none, bf16 products, fp32 masters and moments, bf16 gradients. Masters and moments are divided
  over data-parallel ranks, as in Megatron's distributed optimizer. Megatron's default, gradients in fp32, would take 2
  more bytes per weight and send twice the gradients.
- Both with ZeRO stage {STAGE}, and a global batch that stays the same at every number of GPUs. The layout of each row
  is the first that `--suggest` finds for that method and stage: the fastest, not the one that needs least memory.
- "of ideal": against so many single GPUs of the same method that compute nothing twice, as if each held the model.
"""


def of_both(say: Callable[[list[Figure]], str], found: Figures) -> str:
    """What `say` makes of the figures of each model, ternary and ordinary."""
    return ", ".join(
        f"{model.name} " + " and ".join(say(found.of(model.name, method)) for method in METHODS) for model in MODELS
    )


def what_breaks(found: Figures) -> Iterator[str]:
    """Sentences, with numbers of the figures."""
    held = of_both(
        lambda items: f"{max((item.gpus for item in items if item.tensor * item.pipeline == 1), default=0):,}", found
    )
    yield f"""**First, memory.** With ZeRO {STAGE} each rank holds all weights of its part of the model: ordinary
        weights take 2 bytes, codes a quarter. So ternary models start on fewer GPUs (table above) and need less
        cutting. The largest number of GPUs at which the best layout has neither tensor nor pipeline parallelism,
        ternary and ordinary (0: never): {held}. Beyond these numbers 1B, 7B and ternary 13B are cut not for memory
        but because a part of a model has fewer gradients to send over the network, or because the batch is used up."""
    whole, once = found.at("13B", "ternary", 256), found.at("13B", "ternary", 512)
    yield f"""**Then gradients are most of the memory.** They are bf16 in both methods and whole while a step has
        several micro-batches, whatever the number of ranks: 13B at 256 GPUs holds
        {whole.memory["gradients"] / 2**30:.1f} GiB of gradients beside {whole.memory["codes"] / 2**30:.1f} GiB of
        codes and {whole.memory["moments"] / 2**30:.2f} GiB of moments. With one micro-batch per rank they leave as
        they are made: at 512 GPUs (layout {layout(once)}) a rank keeps {once.memory["gradients"] / 2**30:.2f} GiB of
        them at its fullest moment. `optimizer.gradient_reduction` micro_batch would free them after each
        micro-batch, and send them as often; the page does not use it."""
    ternary, ordinary = found.both("7B", 256)
    over = of_both(
        lambda items: next((f"{item.gpus:,}" for item in items if part(item, "network") > 0.2), "never"), found
    )
    yield f"""**Then gradients on the network.** Gradients do not shrink with the codes. 7B at 256 GPUs sends
        {ternary.sent["gradients"] / 1e9:.1f} GB of gradients and {ternary.sent["codes"] / 1e9:.1f} GB of codes a
        step; ordinary weights send the same gradients and {ordinary.sent["weights"] / 1e9:.1f} GB of weights.
        Gradients go from each rank to each owner of rows, because sums in rank order need all parts. So every GPU of
        a machine sends its own over the network, while a gather leaves the machine once: {ternary.far / 1e9:.1f} of
        {sum(ternary.sent.values()) / 1e9:.1f} GB leave it. A faster step with the same gradients waits longer:
        {percent(part(ternary, "network"))} of the ternary step and {percent(part(ordinary, "network"))} of the
        ordinary one are network. It first takes more than a fifth of the step at this number of GPUs, ternary and
        ordinary: {over}."""
    advantage = []
    for model in MODELS:
        shared = [
            (item.gpus, item.tokens_per_second / other.tokens_per_second)
            for item in found.of(model.name, "ternary")
            for other in found.of(model.name, "ordinary")
            if item.gpus == other.gpus and item.gpus % model.cuts[-1] == 0
        ]
        (few, first), (many, last) = shared[0], shared[-1]
        advantage.append(f"{model.name} {first:.2f} at {few:,} and {last:.2f} at {many:,}")
    yield f"""**So the lead in speed shrinks, for 1B, 7B and 13B.** Tokens/s of ternary over ordinary:
        {"; ".join(advantage)} GPUs. Where ternary 70B and 405B have pipelines, a guess decides (below), and the
        ratio says little."""
    shares = of_both(lambda items: f"{items[-1].of_ideal:.2f}", found)
    fastest = max(found.of("1B", "ternary"), key=lambda item: item.tokens_per_second)
    largest = found.at("1B", "ternary", MOST_GPUS)
    samples, tokens = samples_and_tokens(MODELS[0])
    bubble = largest.micro_batches / (largest.micro_batches + largest.pipeline - 1)
    yield f"""**Then the global batch.** Data parallelism ends at one sample per rank. 1B has {samples} samples of
        {tokens // samples:,} tokens, so {MOST_GPUS:,} GPUs must cut the model into at least {MOST_GPUS // samples}
        parts: {layout(largest)}, with {largest.micro_batches} micro-batch per step for {largest.pipeline} stages,
        which leaves {percent(bubble)} of the time. It is fastest at {fastest.gpus:,} GPUs, with
        {fastest.tokens_per_second:,.0f} tokens/s against {largest.tokens_per_second:,.0f} at {MOST_GPUS:,}. Of ideal
        at {MOST_GPUS:,}, ternary and ordinary: {shares}. A larger batch would help speed; what it does to learning
        is not this page's matter."""
    tensor = found.at("70B", "ternary", MOST_GPUS)
    far = tensor.beside / NETWORK_BYTES_PER_SECOND
    yield f"""**Tensor parallelism must not leave the machine.** `--suggest` tries at most TP {MACHINE_GPUS}. A rank
        of 70B at {MOST_GPUS:,} GPUs (TP {tensor.tensor}) sends {tensor.beside / 1e9:.1f} GB to tensor-parallel ranks
        in a step of {tensor.step:.2f} s; over a port of {NETWORK_BYTES_PER_SECOND / 1e9:.0f} GB/s these bytes alone
        would take {far:.2f} s. 70B and 405B have 8 query groups, which end TP at 8 anyway."""
    small = found.at("405B", "ternary", 3584)
    left = small.micro_batches / (small.micro_batches + small.pipeline - 1)
    yield f"""**Pipelines: the bubble grows as micro-batches run out.** 405B at 3,584 GPUs, ternary, has
        {small.micro_batches} micro-batches for {small.pipeline} stages: the bubble leaves {percent(left)}. The rest
        of what the column "pipeline" shows there ({percent(part(small, "pipeline"))} of the step) is the loss per
        doubling that the model takes from PP 2. Interleaving (`parallel.virtual_pipeline`) would make the bubble
        smaller; `--suggest` does not try it."""
    powers = {
        method: next(item.gpus for item in found.of("405B", method) if item.gpus & (item.gpus - 1) == 0)
        for method in METHODS
    }
    yield f"""**405B: layers must divide evenly.** 126 = 2 * 3^2 * 7 layers and a power of two of GPUs allow
        pipelines of 1 and 2 stages only. So among powers of two it fits from {powers["ternary"]:,} GPUs on (ternary)
        and {powers["ordinary"]:,} (ordinary). Multiples of 7 give pipelines of 7 and 14 stages: it fits from
        {found.of("405B", "ternary")[0].gpus} and {found.of("405B", "ordinary")[0].gpus}. The page has both series."""


def cost_model() -> str:
    def rate(seconds: float) -> str:
        return f"{1e-9 / seconds:.0f} GB/s"

    graph = ", CUDA graph"
    rows = [
        [
            f"one GPU, of {DEVICE.bf16_tflops:.0f} TFLOP/s",
            f"{MFU['dqt-fp8' + graph][LARGE]:.3f}", f"{MFU['none-bf16' + graph][LARGE]:.3f}",
            "[one H200](benchmarks/train_step.md), 1.36 B weights; taken for every size and for an H100",
        ],
        [
            "tensor: bytes to tensor-parallel ranks, at",
            rate(TENSOR_SECONDS_PER_BYTE["dqt-fp8" + graph]), rate(TENSOR_SECONDS_PER_BYTE["none" + graph]),
            "[TP 2](benchmarks/layouts.md), two H100; TP 4 and 8 are guesses",
        ],
        [
            "pipeline: left per doubling, beside the bubble",
            f"{PIPELINE_FACTORS['dqt-fp8' + graph]:.2f}", f"{PIPELINE_FACTORS['none' + graph]:.2f}",
            "[PP 2](benchmarks/layouts.md), two H100, micro-batches of 2 short samples; more stages are guesses",
        ],
        [
            "data: bytes to data-parallel ranks of the machine, at",
            rate(SECONDS_PER_BYTE["dqt-fp8" + graph]), rate(SECONDS_PER_BYTE["none"]),
            "DP 2, two H100: [ternary](benchmarks/layouts.md), [ordinary](planning.md); nothing was hidden there",
        ],
        [
            "network: bytes to other machines, at",
            *[f"{NETWORK_BYTES_PER_SECOND / 1e9:.0f} GB/s"] * 2,
            f"not measured: a port of 400 Gb/s a GPU, {MACHINE_GPUS} GPUs a machine; nothing is hidden",
        ],
        [
            "again: slower by computing twice, mlp and full",
            *[", ".join(f"{RECOMPUTE_MFU['none'] / RECOMPUTE_MFU[kind]:.2f}" for kind in ("mlp", "full"))] * 2,
            "[one H200](benchmarks/train_step.md), ternary",
        ],
    ]  # fmt: skip
    return table(["part", *METHODS, "from"], rows)


LIMITS = (
    """Memory of weights, moments and gradients is exact by shapes, and traffic is exact call by call, as far as
    [planning](planning.md) says; activations and scratch are estimates within 5 % of what one GPU measured.""",
    """Products are as efficient on a 64th of a layer as on a whole one. They are not: 1B over 512 GPUs or more has
    matrices too small to fill a GPU, and its rows there are too good. Larger models are likely to do better than 1.36 B
    weights did.""",
    """The pipeline's loss at PP 2 was measured with micro-batches of 4,096 tokens of the 1.36 B model, which make fp8
    products short. At 70B and 405B this makes ternary pipelines look worse than they should be: 0.85 per doubling
    against 0.99 of ordinary weights. It is the weakest number here.""",
    """The network has no latency, no congestion, no slow machine and no failure. A message to one of 512 owners is
    small, and sends less than 50 GB/s. On the other side, gradients leave during the last backward pass, which would
    hide some of their time.""",
)


def page(found: Figures) -> str:
    fewer = ", ".join(f"{item.model} {item.method} from {item.gpus}" for item in found.smaller) or "none"
    parts = [HEAD, "## Smallest numbers of GPUs\n"]
    parts.append(
        paragraph(
            f"""The smallest of the numbers tried (powers of two; for 405B also times 7) at which a rank fits
            {DEVICE.memory_gib} - {RESERVED_GIB} GiB, with TP x PP x DP. Fewer with ZeRO 0, 2 or 3: {fewer}. Over
            several micro-batches gradients are whole in every stage, and ordinary weights then gain little from stage
            3."""
        )
    )
    parts += [smallest_table(found), "## What breaks first\n", bullets(what_breaks(found))]
    parts += ["## What the cost model takes\n", cost_model(), bullets(LIMITS)]
    parts += ["## How to read the tables\n", HOW_TO_READ]
    parts += [model_text(found, model) for model in MODELS]
    return "\n".join(parts)


HOW_TO_READ = paragraph(
    """Micro-batches: how many a rank has in a step, of how many samples. The last columns of a first table are shares
    of the step: what is computed again, what tensor and pipeline parallelism add (bubble included), what goes to
    data-parallel ranks within the machine, and what goes to other machines. "activations" sent are all bytes to
    tensor-parallel ranks but those of norms' gradients, which are among "gradients". "weights" are DeepSpeed's gathers.
    "to other machines" counts gradients, codes and weights, and is part of "all"."""
)


# ---- plots ----


def digest(figures_text: str) -> str:
    return hashlib.sha256(figures_text.encode()).hexdigest()


def draw(figures_text: str) -> None:
    """Memory and tokens/s against GPUs, a column per model. The picture names the digest of its figures."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scaling", "font.size": 8})
    found, colors = Figures(figures_text), {"ternary": "tab:blue", "ordinary": "tab:orange"}
    drawing, axes = pyplot.subplots(2, len(MODELS), figsize=(14, 5.4), sharex=True, layout="constrained")
    for column, model in enumerate(MODELS):
        memory, speed = axes[:, column]
        for method, color in colors.items():
            items = found.of(model.name, method)
            gpus = [item.gpus for item in items]
            memory.plot(gpus, [item.gib for item in items], "o-", color=color, markersize=3, label=method)
            speed.plot(gpus, [item.tokens_per_second for item in items], "o-", color=color, markersize=3, label=method)
            ideal = [item.single * item.gpus for item in items]
            speed.plot(gpus, ideal, "--", color=color, linewidth=0.8, label=f"{method}, ideal")
        memory.axhline(DEVICE.memory_gib - RESERVED_GIB, color="gray", linewidth=0.8, linestyle=":")
        memory.set(title=model.name, ylim=(0, DEVICE.memory_gib + 4))
        speed.set(xscale="log", yscale="log", xlabel="GPUs", xlim=(0.7, 1.4 * MOST_GPUS))
        speed.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4,096"])
        speed.minorticks_off()
    axes[0, 0].set_ylabel("GiB of the largest rank")
    axes[1, 0].set_ylabel("tokens/s, expected")
    axes[0, 0].legend()
    axes[1, 0].legend()
    temporary = PLOTS.with_suffix(".tmp.svg")
    drawing.savefig(temporary, metadata={"Date": None, "Description": digest(figures_text)})
    temporary.replace(PLOTS)


if __name__ == "__main__":
    text = to_json(figures())
    code = write_or_check({FIGURES: text, PAGE: page(Figures(text))}, __doc__)
    if "--check" not in sys.argv:
        draw(text)
    sys.exit(code)
