"""What the quality study trains: sizes, methods and lists of runs, as data.

A run is a size, a method, a rate of the linears and a seed. Everything else is the same for all runs of a size, so
that two runs differ in what their names say and in nothing else. To add a method, add one line to METHODS, and a line
with its rates to the list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Size:
    """A model with its batch and length."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    vocab: int
    sequence: int
    batch: int
    """Sequences of a step, in one micro-batch."""
    steps: int
    rest_rate: float
    """Peak rate of embeddings, head and norms."""
    eval_batches: int
    about: str

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.sequence

    @property
    def linear_weights(self) -> int:
        """Weights in the linears of the blocks: four of attention, three of the feed-forward half."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.ffn)


SIZES = {
    "S": Size(8, 512, 1408, 8, 8192, 512, 128, 4578, 3e-3, 7, "8 layers x 512, 300 M tokens"),
    "M": Size(12, 768, 2048, 12, 8192, 512, 128, 6104, 3e-3, 7, "12 layers x 768, 400 M tokens"),
    "tiny": Size(2, 32, 64, 2, 512, 32, 4, 12, 3e-3, 1, "only to try these commands; its losses mean nothing"),
}


@dataclass(frozen=True)
class Method:
    label: str
    """In tables and plots."""
    settings: tuple[str, ...]
    master: bool = False
    """Whether there is a float weight and an fp32 master beside it."""


# Ternary codes of latents, with the scale of BitNet (mean magnitude, made anew in every step) and its decay.
OF_LATENTS = (
    "quantization.method=dqt",
    "quantization.bits=ternary",
    "optimizer.low_bit_weight_decay=0.1",
)

METHODS = {
    "none": Method("bf16, fp32 master", ("quantization.method=none",), master=True),
    "bitnet": Method("BitNet b1.58, fp32 master", ("quantization.method=bitnet",), master=True),
    "dqt8": Method("DQT 8 bit", ("quantization.method=dqt", "quantization.bits=8")),
    "dqt4": Method("DQT 4 bit", ("quantization.method=dqt", "quantization.bits=4")),
    "dqt3": Method("DQT 3 bit", ("quantization.method=dqt", "quantization.bits=3")),
    "dqt_ternary": Method("DQT ternary", ("quantization.method=dqt", "quantization.bits=ternary")),
    "ternary_of_8": Method("DQT ternary of 8-bit latents", (*OF_LATENTS, "quantization.latent_bits=8")),
    "ternary_of_6": Method("DQT ternary of 6-bit latents", (*OF_LATENTS, "quantization.latent_bits=6")),
    "ternary_of_4": Method("DQT ternary of 4-bit latents", (*OF_LATENTS, "quantization.latent_bits=4")),
    "ternary_of_3": Method("DQT ternary of 3-bit latents", (*OF_LATENTS, "quantization.latent_bits=3")),
}

SEED = 1234


@dataclass(frozen=True)
class Run:
    """One training run of the study."""

    size: str
    method: str
    rate: float
    """Peak rate of the linears of the blocks."""
    seed: int = SEED
    rest_rate: float | None = None
    """Peak rate of everything else. Default: the size's."""
    steps: int | None = None
    """Default: the size's."""
    settings: tuple[str, ...] = ()
    """Further section.key=value settings. A run that has some needs a label."""
    label: str = ""
    """Names the further settings in run names, tables and plots; without spaces."""

    @property
    def name(self) -> str:
        """Folder of the run; equal for equal runs, whatever the order of the list."""
        parts = [self.size, self.method, *([self.label] if self.label else []), short(self.rate)]
        if self.rest_rate is not None:
            parts.append(f"rest{short(self.rest_rate)}")
        if self.steps is not None:
            parts.append(f"{self.steps}steps")
        if self.seed != SEED:
            parts.append(f"seed{self.seed}")
        return "_".join(parts)

    @property
    def recipe(self) -> str:
        """What its label in tables and plots is: the method, and the label of the further settings."""
        return METHODS[self.method].label + (f", {self.label.replace('_', ' ')}" if self.label else "")

    @property
    def num_steps(self) -> int:
        return self.steps or SIZES[self.size].steps

    def own_settings(self) -> list[str]:
        """The settings that tell this run from others of its size."""
        rest = self.rest_rate or SIZES[self.size].rest_rate
        rates = [f"optimizer.low_bit_learning_rate={self.rate:g}", f"optimizer.learning_rate={rest:g}"]
        return [*METHODS[self.method].settings, *rates, f"training.seed={self.seed}", *self.settings]

    def all_settings(self, data: str) -> list[str]:
        """Every setting, over configs/130m_pure_ternary.json; `data` is a folder that `quality.py prepare` has made."""
        size, steps = SIZES[self.size], self.num_steps
        evaluation = max(1, steps // 6)
        return [
            f"model.num_layers={size.layers}",
            f"model.hidden_size={size.hidden}",
            f"model.ffn_hidden_size={size.ffn}",
            f"model.num_attention_heads={size.heads}",
            f"model.vocab_size={size.vocab}",
            f"model.seq_length={size.sequence}",
            "data.train=" + json.dumps([{"path": f"{data}/train"}]),
            "data.valid=" + json.dumps([{"path": f"{data}/valid"}]),
            f"data.tokenizer={data}/tokenizer.model",
            f"training.steps={steps}",
            f"training.micro_batch_size={size.batch}",
            f"training.global_batch_size={size.batch}",
            f"training.eval_interval={evaluation}",
            f"training.eval_batches={size.eval_batches}",
            "training.replica_check_interval=0",
            f"optimizer.warmup_steps={min(100, steps)}",
            "optimizer.min_learning_rate_ratio=0.0",
            "optimizer.low_bit_beta1=0.9",
            f"logging.interval={max(1, evaluation // 7)}",
            "logging.tensorboard=false",
            "checkpoint.interval=0",
            *self.own_settings(),
        ]

    def facts(self) -> dict[str, Any]:
        """The fields, as plain data."""
        return asdict(self) | {"settings": list(self.settings)}


def short(rate: float) -> str:
    """0.0025 as 2.5e-3."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def study(size: str = "S") -> list[Run]:
    """The study: every method at rates a factor of two apart. What tells most comes first."""
    order = (
        ("none", 2e-3),
        ("bitnet", 2e-3),
        ("dqt8", 1e-3),
        ("dqt8", 2e-3),
        ("dqt4", 1e-3),
        ("ternary_of_8", 2e-3),
        ("ternary_of_4", 2e-3),
        ("ternary_of_6", 2e-3),
        ("ternary_of_4", 4e-3),
        ("ternary_of_8", 4e-3),
        ("ternary_of_4", 1e-3),
        ("ternary_of_8", 1e-3),
        ("bitnet", 1e-3),
        ("none", 1e-3),
        ("none", 4e-3),
        ("bitnet", 4e-3),
        ("dqt_ternary", 5e-4),
        ("dqt4", 5e-4),
        ("dqt4", 2e-3),
        ("dqt3", 1e-3),
        ("dqt8", 4e-3),
        ("dqt_ternary", 1e-3),
        ("dqt3", 5e-4),
        ("dqt3", 2e-3),
        ("dqt8", 5e-4),
        ("ternary_of_3", 2e-3),
        ("ternary_of_3", 1e-3),
        ("ternary_of_6", 1e-3),
        ("ternary_of_6", 4e-3),
        ("none", 5e-4),
        ("dqt_ternary", 2.5e-4),
        ("dqt_ternary", 2e-3),
    )
    runs = [Run(size, method, rate) for method, rate in order]
    # A slow first moment helps codes alone, so it may help the coarser latents and grids, and the rate with it.
    runs += [
        with_beta1(Run(size, method, rate), beta1)
        for method, rate, beta1 in (
            ("dqt_ternary", 1e-3, 0.98),
            ("ternary_of_4", 2e-3, 0.98),
            ("dqt_ternary", 5e-4, 0.98),
            ("ternary_of_8", 2e-3, 0.95),
            ("dqt4", 1e-3, 0.98),
            ("dqt_ternary", 2e-3, 0.98),
        )
    ]
    # What the scale, the decay and the range of the latents do.
    variants = {
        "fixed_scale": ("quantization.scale_refit_interval=0",),
        "scale_every_16": ("quantization.scale_refit_interval=16",),
        "no_decay": ("optimizer.low_bit_weight_decay=0.0",),
        "2_sigmas": ("quantization.latent_sigmas=2.0",),
        "5_sigmas": ("quantization.latent_sigmas=5.0",),
        "threshold_2": ("quantization.latent_threshold=2", "quantization.latent_sigmas=2.0"),
    }
    runs += [Run(size, "ternary_of_4", 2e-3, label=label, settings=settings) for label, settings in variants.items()]
    # BitNet's own recipe (sources: dqt_dist/optim/schedule.py), and the same for latents.
    steps = SIZES[size].steps
    two_stages = ("optimizer.schedule=two_stage", f"optimizer.weight_decay_steps={steps // 2}")
    runs += [
        Run(size, method, rate, label="two_stages", settings=two_stages)
        for method in ("bitnet", "ternary_of_4", "ternary_of_8")
        for rate in (2e-3, 4e-3)
    ]
    # What may help pure ternary: decay, and a schedule of its own that ends earlier, so that the rest settles on codes
    # that do not move.
    of_ternary = {
        "decay_0.1": ("optimizer.low_bit_weight_decay=0.1",),
        "ends_at_80_percent": (f"optimizer.low_bit_schedule_steps={steps * 4 // 5}",),
        "two_stages": ("optimizer.schedule=two_stage",),
    }
    runs += [Run(size, "dqt_ternary", 5e-4, label=label, settings=settings) for label, settings in of_ternary.items()]
    runs.append(with_beta1(Run(size, "dqt_ternary", 5e-4), 0.95))
    # 4-bit codes are clamped often (saturation 0.08 at half the run): a wider range, or decay.
    runs += [
        Run(size, method, 1e-3, label=label, settings=settings)
        for method, label, settings in (
            ("dqt4", "5_sigmas", ("quantization.scale_sigmas=5.0",)),
            ("dqt4", "decay_0.1", ("optimizer.low_bit_weight_decay=0.1",)),
            ("dqt8", "decay_0.1", ("optimizer.low_bit_weight_decay=0.1",)),
        )
    ]
    # The rate of the rest, at the middle rate of the linears.
    runs += [Run(size, method, 2e-3, rest_rate=rest) for method in ("none", "bitnet") for rest in (1.5e-3, 6e-3)]
    return runs


def with_beta1(run: Run, beta1: float) -> Run:
    """The run with another decay of the first moment of its linears."""
    return replace(run, label=f"beta1_{beta1:g}", settings=(f"optimizer.low_bit_beta1={beta1:g}",))


def ternary(size: str = "S") -> list[Run]:
    """Recipes for ternary codes, at 100 M tokens each.

    Codes alone have no memory of what they did not round to. A first moment that decays slowly is such a memory, and
    its update of a noisy gradient is smaller by sqrt((1 - beta1) / (1 + beta1)). Gradients that agree move as many
    codes as before: at 2e-3 and above codes run into the ends of the grid in the first steps. Latents are such a memory
    as well; with them the first moment may be what is superfluous.
    """
    steps = 1526
    codes = {rate: Run(size, "dqt_ternary", rate, steps=steps) for rate in (5e-4, 1e-3, 2e-3, 3e-3, 6e-3)}
    latents = Run(size, "ternary_of_8", 2e-3, steps=steps)
    return [
        codes[1e-3],
        *(with_beta1(codes[rate], beta1) for rate, beta1 in ((1e-3, 0.98), (2e-3, 0.99), (3e-3, 0.995))),
        latents,
        replace(latents, label="adafactor", settings=("optimizer.name=adafactor",)),
        *(with_beta1(codes[rate], beta1) for rate, beta1 in ((2e-3, 0.98), (1e-3, 0.99), (5e-4, 0.98), (5e-4, 0.99))),
        *(with_beta1(codes[rate], beta1) for rate, beta1 in ((1e-3, 0.995), (6e-3, 0.998))),
        with_beta1(latents, 0),
    ]


def tiny() -> list[Run]:
    """Two runs that take seconds."""
    return [Run("tiny", "none", 2e-3), Run("tiny", "dqt_ternary", 1e-3)]


LISTS = {"S": study, "S_ternary": ternary, "tiny": tiny}


def read_list(word: str) -> list[Run]:
    """The runs of a list by name, or of a JSON file with a list of objects whose keys are the fields of Run."""
    if word in LISTS:
        return LISTS[word]()
    path = Path(word)
    if not path.is_file():
        raise SystemExit(f"--list {word}: no such list or file; lists: {', '.join(LISTS)}")
    return list(_from_json(json.loads(path.read_text()), word))


def _from_json(items: list[dict[str, Any]], word: str) -> Iterator[Run]:
    for number, item in enumerate(items, start=1):
        try:
            run = Run(**item | {"settings": tuple(item.get("settings", ()))})
        except TypeError as error:
            raise SystemExit(f"--list {word}: run {number}: {error}") from error
        for value, known, field in ((run.size, SIZES, "size"), (run.method, METHODS, "method")):
            if value not in known:
                raise SystemExit(f"--list {word}: run {number}: {field} {value!r}; known: {', '.join(known)}")
        if run.settings and not run.label:
            raise SystemExit(f"--list {word}: run {number}: has settings but no label, which names them")
        yield run
