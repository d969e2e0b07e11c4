"""Trains a tiny model for long while its processes are stopped, killed and started again in other layouts.

Three courses of the same steps, and two runs that nothing interrupts to compare them with:

    stages      2 data-parallel ranks, ZeRO 0 to 3           the losses and bits of the uninterrupted DP 2
    pipeline    1 process, or pipeline 2; ZeRO 0 and 1       the losses and bits of the uninterrupted single process
    layouts     DP 2 with ZeRO 0 to 3, TP 2, PP 2            its losses stay beside those of the uninterrupted DP 2

At a random moment of each segment one rank gets SIGTERM, or one or all get SIGKILL; the next segment begins in another
layout. Every layout comes at least once, and its first segment is not interrupted before it has saved a checkpoint, so
the course holds steps of every layout. Ranks write down the SHA-256 of every sample that they train on. At the end:
each step has trained on the samples that are its own in the data set, in their order, whatever the layout; each segment
began where the checkpoint before it ended, which after a SIGTERM is the step that ran; so the course holds every sample
exactly once.

`tests/training/test_faults.py` makes a short course of the same, with SIGKILL only, in every `make test`. This takes
longer: make soak, or make soak SOAK="--steps N".
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from pydoc_data.topics import topics
from signal import SIGKILL, SIGTERM, Signals
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dqt_dist.checkpoint.digest import digest_of
from dqt_dist.checkpoint.folder import complete_checkpoints, step_of
from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.data.dataset import build_datasets
from dqt_dist.errors import RUN_ERROR_EXIT_CODE, STOPPED_EXIT_CODE
from tests import forked
from tests.small import VALUES
from tests.training.conftest import ROOT, VOCABULARY
from tests.training.ranks import Ranks

GLOBAL_BATCH, SEQUENCE_LENGTH = 8, 32
MOST_SECONDS_AFTER = 0.1
"""From the step at which a segment is to be interrupted to the signal: a few steps of an idle machine, so the signal
comes anywhere in a step or a save."""
MEAN_OVER = 50
"""Steps over which losses of different layouts are compared: one step's loss has noise of its own batch."""
CLOSE = 0.05
"""Nats between such means: another order of sums changes codes, so the runs drift apart. The course in
docs/reliability.md stayed within 0.003 over its 2,000 steps."""


@dataclass(frozen=True)
class Layout:
    name: str
    num: int
    """Processes."""
    settings: tuple[str, ...]


def zero(stage: int) -> str:
    return f"deepspeed.zero_optimization.stage={stage}"


STAGES = [Layout(f"DP 2 ZeRO {stage}", 2, (zero(stage),)) for stage in range(4)]
SINGLE = Layout("one process", 1, ())
PIPELINES = [Layout(f"PP 2 ZeRO {stage}", 2, ("parallel.pipeline=2", zero(stage))) for stage in (0, 1)]
TENSOR = Layout("TP 2", 2, ("parallel.tensor=2",))
COURSES: dict[str, tuple[list[Layout], str, bool]] = {
    "stages": (STAGES, "DP 2", True),
    "pipeline": ([SINGLE, *PIPELINES], "one process", True),
    "layouts": ([*STAGES, TENSOR, *PIPELINES], "DP 2", False),
}
"""Layouts, the uninterrupted run to compare with, and whether its bits are the same."""


# ---- in the ranks ----


def observe(folder: str) -> None:
    """From now on this rank appends the step and its samples' SHA-256 to a file of `folder`, after each step."""
    import os

    from dqt_dist.training import loop

    file = open(f"{folder}/{os.environ['RANK']}.jsonl", "a", buffering=1)  # noqa: SIM115
    step, advance, samples = loop.train_step, loop.Trainer._advance, []

    def train_step(engine: Any, chunks: Any, batch: list[dict[str, Any]], *others: Any) -> Any:
        samples[:] = [sha256(row) for micro_batch in batch for row in micro_batch["tokens"]]
        return step(engine, chunks, batch, *others)

    def and_write(trainer: Any) -> None:
        advance(trainer)
        grid, data_rank = trainer.process_grid, trainer.groups.data.rank()
        line = {"step": trainer.step, "data_rank": data_rank, "data": grid.data, "samples": samples}
        file.write(json.dumps(line) + "\n")

    loop.train_step, loop.Trainer._advance = train_step, and_write


def sha256(tokens: Any) -> str:
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()[:16]


# ---- the courses ----


@dataclass(eq=False)
class Soak:
    """The runs in one scratch folder."""

    folder: Path
    steps: int
    restarts: int
    draw: random.Random
    interval: int = 20
    """Steps between checkpoints."""
    began: float = field(default_factory=time.monotonic)

    def prepare(self) -> None:
        """Data and config."""
        text = self.folder / "text.txt"
        text.write_text("\n\n".join(topics.values()))
        tool = [ROOT / "tools/prepare_data.py", "--input", text, "--output", self.folder]
        done = forked.run([*tool, "--vocab-size", VOCABULARY, "--valid-fraction", 0.1, "--workers", 1])
        assert done.returncode == 0, done.stderr
        values = json.loads(json.dumps(VALUES))
        values["model"] |= {"vocab_size": VOCABULARY, "seq_length": SEQUENCE_LENGTH}
        values["data"] = {name: [{"path": str(self.folder / name)}] for name in ("train", "valid")}
        values["data"] |= {"tokenizer": str(self.folder / "tokenizer.model"), "num_workers": 0}
        values["training"] |= {"steps": self.steps, "global_batch_size": GLOBAL_BATCH, "eval_batches": 2}
        values["optimizer"] |= {"learning_rate": 3e-3, "low_bit_learning_rate": 2e-3}
        values["logging"] = {"interval": 1, "tensorboard": False}
        values["checkpoint"] = {"dir": "set", "interval": self.interval, "keep_last": 2}
        (self.folder / "config.json").write_text(json.dumps(values))

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.0f} s] {text}", flush=True)

    def start(self, name: str, layout: Layout, segment: int) -> Ranks:
        """The ranks of one segment of the course `name`, which write their samples into a folder of their own."""
        samples = self.samples_of(name, segment)
        samples.mkdir(parents=True)
        where = f"checkpoint.dir={self.folder / name}"
        observed = functools.partial(observe, str(samples))
        config, logs = self.folder / "config.json", samples / "logs"
        return Ranks(config, logs, *layout.settings, where, num=layout.num, prepare=observed)

    def samples_of(self, name: str, segment: int) -> Path:
        return self.folder / f"{name}_samples" / f"{segment:03d}"

    def through(self, name: str, layout: Layout) -> None:
        """A run that nothing interrupts."""
        with self.start(name, layout, 0) as ranks:
            wait_for_end(ranks)
            assert ranks.exit_codes() == [0] * layout.num, ranks.output()
        self.say(f"{name}: {self.steps} steps without interruption")

    def interrupted(
        self, name: str, layouts: Sequence[Layout], signals: Sequence[Signals] = (SIGTERM, SIGKILL, SIGKILL)
    ) -> list[str]:
        """A course of segments, each of which begins where its checkpoint ended; returns what interrupted them."""
        # The first segment of a layout may run on to its next checkpoint; what is left is for the last segment.
        stops = sorted(self.draw.sample(range(2, self.steps - (len(layouts) + 1) * self.interval), self.restarts))
        begins, events, kept = 0, [], set[Layout]()
        for segment, layout in enumerate(self.order(layouts, len(stops) + 1)):
            with self.start(name, layout, segment) as ranks:
                if segment == len(stops):
                    wait_for_end(ranks)
                    assert ranks.exit_codes() == [0] * layout.num, ranks.output()
                    event, number = "to the end", None
                else:
                    self.wait_until(ranks, name, segment, stops[segment], 0 if layout in kept else begins + 1)
                    time.sleep(self.draw.uniform(0, MOST_SECONDS_AFTER))
                    number = self.draw.choice(signals)
                    event = self.interrupt(ranks, number)
                    events.append(event)
            first, last = self.span(name, segment)
            end = self.saved(name)
            assert first == begins + 1, f"{name}: segment {segment} began with step {first}, saved were {begins}"
            assert end == last or number == SIGKILL, f"{name}: a step was lost {event}"
            self.say(f"{name}: {layout.name}, steps {first} to {last}, {event}; saved up to {end} of {self.steps}")
            if end > begins:
                kept.add(layout)
            begins = end
        assert kept == set(layouts), f"{name}: no step was kept of {set(layouts) - kept}"
        return events

    def order(self, layouts: Sequence[Layout], num: int) -> list[Layout]:
        """`num` layouts: each comes once before any comes again, and none twice in a row."""
        assert num >= len(layouts), f"{num} segments for {len(layouts)} layouts"
        found: list[Layout] = []
        while len(found) < num:
            them = self.draw.sample(layouts, len(layouts))
            found += them if found[-1:] != them[:1] else reversed(them)
        return found[:num]

    def wait_until(self, ranks: Ranks, name: str, segment: int, reached: int, saved: int) -> None:
        """Returns when rank 0 has made the step `reached` and a checkpoint of the step `saved`, or later ones."""
        while self.reached(name, segment) < reached or self.saved(name) < saved:
            assert all(process.is_alive() for process in ranks.processes), ranks.output()
            time.sleep(0.02)

    def interrupt(self, ranks: Ranks, number: Signals) -> str:
        """Sends the signal to one rank or, if it kills, to one or all. Returns what was done, when all have ended."""
        num = len(ranks.processes)
        victims = self.draw.choice([[self.draw.randrange(num)], list(range(num))])
        victims = victims[:1] if number == SIGTERM else victims
        for victim in victims:
            ranks.signal(victim, number)
        left = STOPPED_EXIT_CODE if number == SIGTERM else RUN_ERROR_EXIT_CODE
        gone = STOPPED_EXIT_CODE if number == SIGTERM else -number
        codes, expected = ranks.exit_codes(), [gone if rank in victims else left for rank in range(num)]
        assert codes == expected, f"{codes} instead of {expected}\n{ranks.output()}"
        if number == SIGKILL and len(victims) < num:
            assert f"error: no answer from rank {victims[0]}" in ranks.output(), ranks.output()
            assert ranks.output().count("error: ") == 1 and "Traceback" not in ranks.output(), ranks.output()
        return f"{number.name} to rank {', '.join(map(str, victims))}"

    def saved(self, name: str) -> int:
        """The step of the newest checkpoint, 0 without one."""
        return max(map(step_of, complete_checkpoints(self.folder / name / "checkpoints")), default=0)

    def reached(self, name: str, segment: int) -> int:
        """The last step that rank 0 has made in a segment so far, 0 for none."""
        return max((line["step"] for line in lines_of(self.samples_of(name, segment) / "0.jsonl")), default=0)

    def span(self, name: str, segment: int) -> tuple[int, int]:
        """First and last step that rank 0 has made in a segment."""
        steps = [line["step"] for line in lines_of(self.samples_of(name, segment) / "0.jsonl")]
        assert steps == list(range(steps[0], steps[0] + len(steps)))
        return steps[0], steps[-1]

    # ---- the checks ----

    def check_samples(self, name: str) -> None:
        """Every step of every segment trained on its own samples of the data set, in their order, over all ranks."""
        expected, done = self.samples(), set()
        for folder in sorted((self.folder / f"{name}_samples").iterdir()):
            of_steps: dict[int, dict[int, list[str]]] = {}
            for file in folder.glob("*.jsonl"):
                for line in lines_of(file):
                    data, samples = line["data"], line["samples"]
                    known = of_steps.setdefault(line["step"], {}).setdefault(line["data_rank"], samples)
                    assert known == samples, "ranks of one copy of the model read other samples"
                    stride = VALUES["training"]["micro_batch_size"]
                    first = (line["step"] - 1) * GLOBAL_BATCH + line["data_rank"] * stride
                    places = [
                        first + m * stride * data + i
                        for m in range(GLOBAL_BATCH // stride // data)
                        for i in range(stride)
                    ]
                    assert samples == [expected[place] for place in places], (name, folder.name, line["step"])
                    if len(of_steps[line["step"]]) == data:
                        done.add(line["step"])
        assert done == set(range(1, self.steps + 1)), f"{name}: steps without a record of all of their samples"

    @functools.cache  # noqa: B019
    def samples(self) -> list[str]:
        """SHA-256 of every sample of the training set, in order, read here anew."""
        train = build_datasets(
            train=[(str(self.folder / "train"), 1.0)],
            valid=None,
            valid_fraction=0.0,
            sequence_length=SEQUENCE_LENGTH,
            vocab_size=VOCABULARY,
            tokenizer_path=self.folder / "tokenizer.model",
            seed=1234,
            num_train_samples=self.steps * GLOBAL_BATCH,
            num_valid_samples=0,
            cache_dir=self.folder / "cache",
            build_here=True,
            barrier=lambda: None,
        ).train
        return [sha256(train[number]["tokens"]) for number in range(self.steps * GLOBAL_BATCH)]

    def losses(self, name: str) -> list[float]:
        lines = [line for line in lines_of(self.folder / name / "metrics.jsonl") if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, self.steps + 1)), (
            f"{name}: losses of steps are missing"
        )
        return [line["loss"] for line in lines]

    def check(self, name: str, reference: str, bits: bool) -> str:
        """Samples, losses and, with `bits`, the digest; returns what was found, in words."""
        self.check_samples(name)
        own, other = self.losses(name), self.losses(reference)
        if bits:
            assert own == other, f"{name}: losses differ from those of {reference}"
            digests = [digest_of(CheckpointReader(self.folder / run)).total for run in (name, reference)]
            assert digests[0] == digests[1], f"{name}: ends in other bits than {reference}"
            return f"{name}: losses and digest {digests[0][:12]} are those of {reference}"
        width = min(MEAN_OVER, self.steps)
        means = [[sum(run[i : i + width]) / width for i in range(len(run) - width + 1)] for run in (own, other)]
        most = max(abs(a - b) for a, b in zip(*means, strict=True))
        assert most < CLOSE, f"{name}: means of {width} losses are up to {most:.3f} from those of {reference}"
        return f"{name}: means of {width} losses at most {most:.2g} nats from {reference}"


def lines_of(file: Path) -> list[dict[str, Any]]:
    """Whole lines; one that a kill cut short is left out."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for_end(ranks: Ranks) -> None:
    for process in ranks.processes:
        process.join()


def commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps of each course")
    parser.add_argument(
        "--restarts",
        type=int,
        default=None,
        help="interruptions of each course; default one per 100 steps, and so many that every layout comes",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the interruptions")
    args = parser.parse_args()
    most_layouts = max(len(layouts) for layouts, _, _ in COURSES.values())
    restarts = args.restarts if args.restarts is not None else max(most_layouts - 1, args.steps // 100)
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    revision = commit()
    soak = Soak(folder, args.steps, restarts, random.Random(args.seed))
    soak.prepare()
    soak.through("DP 2", STAGES[0])
    soak.through("one process", SINGLE)
    total, found = 0, []
    for name, (layouts, reference, bits) in COURSES.items():
        total += len(soak.interrupted(name, layouts))
        found.append(soak.check(name, reference, bits))
        soak.say(found[-1])
    seconds = time.monotonic() - soak.began
    today = datetime.now(UTC).date().isoformat()
    print(f"| {today} | {revision} | 3 x {args.steps} | {total} | {seconds:.0f} s | {'; '.join(found)} |")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
