#!/usr/bin/env python3
"""How well does each method learn? Trains a list of runs on one text and compares their losses.

Four commands, in this order:

    prepare   text to tokens, once: tokenizer, training tokens, validation tokens, a second text
    run       the runs of a list, several at once on each GPU; goes on where it was stopped
    collect   a small JSON file of each run, which is kept in the repository
    page      docs/benchmarks/quality.md and its plots, from those files alone

Each has --help. The runs, their sizes and methods are data in benchmarks/quality_list.py.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from benchmarks.common import ROOT, commit
from benchmarks.quality_list import LISTS, METHODS, SIZES, Run, read_list
from dqt_dist.errors import STOPPED_EXIT_CODE
from dqt_dist.training.metrics_file import read_lines

EXAMPLES = """\
the study, on a machine with GPUs:
  benchmarks/quality.py prepare data/quality --corpus corpus --second-text wikitext2/test.txt.gz
  benchmarks/quality.py run runs/quality --data data/quality --list S --seconds 3000 --per-gpu 3
  benchmarks/quality.py collect runs/quality --to docs/benchmarks/quality
  benchmarks/quality.py page docs/benchmarks/quality

to draw the page again from the files in the repository:
  benchmarks/quality.py page docs/benchmarks/quality
"""
CONFIG = ROOT / "configs/130m_pure_ternary.json"
VOCABULARY = 8192
TEXT_FILE = "text.json"
"""In the folder of the text: what it is, with the sha256 of each file."""
RUN_FILE = "run.json"
"""In a run's folder: what was asked for, where and when."""
SECOND_FILE = "second_text.json"
EVALUATION = "evaluation.out"
GRACE_SECONDS = 180
"""A run that was told to stop has so long to save before it is killed."""
CURVE_POINTS = 100
"""Points of a training curve that are kept, at most."""
CURVES = ("loss", "grad_norm", "flip_rate", "zero_fraction", "saturation")


def parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    main = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=style)
    commands = main.add_subparsers(dest="command", required=True)

    def command(name: str, function: Any, about: str, epilog: str) -> Any:
        made = commands.add_parser(name, description=about, epilog=epilog, help=about, formatter_class=style)
        made.set_defaults(function=function)
        return made.add_argument

    add = command("prepare", prepare, "Turn the study's text into tokens.", PREPARE_HELP)
    add("output", type=Path, metavar="OUT", help="folder of the tokens; made when missing")
    add("--corpus", type=Path, nargs="+", required=True, metavar="DIR", help="folders with the shards")
    add("--shards", type=int, default=10, metavar="N", help="training shards, from train-00 on (default: %(default)s)")
    add("--tokenizer", type=Path, metavar="MODEL", help="take this SentencePiece model instead of training one")
    vocabulary = "pieces of a tokenizer that is trained (default: %(default)s)"
    add("--vocab-size", type=int, default=VOCABULARY, metavar="N", help=vocabulary)
    add("--second-text", type=Path, metavar="FILE", help="a .txt or .txt.gz to measure too: the test set of WikiText-2")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="tokenising processes (default: all cores)")

    add = command("run", run, "Train the runs of a list, several at once on each GPU.", RUN_HELP)
    add("output", type=Path, metavar="OUT", help="folder of the run folders")
    add("--data", type=Path, required=True, metavar="DIR", help="what prepare has made")
    add("--list", required=True, metavar="NAME|FILE", help=f"{', '.join(LISTS)}, or a JSON file")
    add("--only", metavar="REGEX", help="only runs whose name contains a match")
    add("--steps", type=int, metavar="N", help="steps of every run, to try it out; the schedule ends there")
    add(
        "--seconds",
        type=float,
        required=True,
        metavar="N",
        help="after so long nothing is started, and what runs is stopped",
    )
    add("--per-gpu", type=int, default=2, metavar="K", help="runs at once on each GPU (default: %(default)s)")
    add("--gpus", type=int, metavar="N", help="use the first N GPUs (default: all; without any, the CPU)")
    add("--done", type=Path, metavar="DIR", help="leave out runs that have a finished JSON file there")
    add("--collect", type=Path, metavar="DIR", help="collect into DIR too, every minute and at the end")
    add("--discard-checkpoints", action="store_true", help="remove the checkpoints of a finished run")
    add("--commit", default=None, metavar="HASH", help="commit of this code, where it is a copy without a repository")
    add("--dry-run", action="store_true", help="print the runs and stop")

    add = command("collect", collect, "Write a small JSON file of each run.", COLLECT_HELP)
    add("output", type=Path, metavar="OUT", help="folder of the run folders")
    add("--to", type=Path, required=True, metavar="DIR", help="folder of the JSON files; made when missing")

    add = command("page", page, "Write the page and its plots from the JSON files.", PAGE_HELP)
    add("folder", type=Path, metavar="DIR", help="folder of the JSON files; DIR.md and DIR/*.png are written")
    return main


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return args.function(args)


# ---------------------------------------------------------------- prepare

PREPARE_HELP = """\
The shards are train-00, train-01, ... and valid, each .jsonl or .jsonl.zst, with a "text" in every line. The
tokenizer is trained on train-00 alone. Tokens keep the order of the shards and of their lines, whatever --workers is.
OUT then holds

    tokenizer.model   train.bin/.idx/.json   valid.bin/.idx/.json   second.bin/.idx/.json (with --second-text)
    text.json         sha256 of the files above and of the shards, and counts of tokens

The same shards and tokenizer give the same files byte for byte: compare text.json of two days. The second text is one
document. A .zst file is read with the package zstandard, or without it by the command zstd.
"""


def prepare(args: argparse.Namespace) -> int:
    from dqt_dist.data.indexed import IndexedWriter, encode_documents
    from dqt_dist.data.tokenizer import load_tokenizer

    start = time.perf_counter()
    shards = [find_shard(args.corpus, f"train-{number:02}") for number in range(args.shards)]
    texts = {"train": shards, "valid": [find_shard(args.corpus, "valid")]}
    if args.second_text:
        texts["second"] = [args.second_text]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / TEXT_FILE).unlink(missing_ok=True)  # written last: without it the folder is not complete
    model = args.output / "tokenizer.model"
    if args.tokenizer is None:
        train_tokenizer_on(shards[0], args.vocab_size, model)
    elif args.tokenizer.resolve() != model.resolve():
        shutil.copyfile(args.tokenizer, model)
    tokenizer = load_tokenizer(model)
    sources = {path.name: sha256(path) for paths in texts.values() for path in paths}
    facts: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "sources": sources, "tokens": {}, "sha256": {}}
    request = hashlib.sha256(json.dumps([tokenizer.sha256, sources]).encode()).hexdigest()
    for name, paths in texts.items():
        writer = IndexedWriter(args.output / name, tokenizer, request)
        documents = (text for path in paths for text in read_texts(path))
        for batch in encode_documents(documents, model, workers=args.workers):
            writer.add_batch(batch)
        writer.close()
        manifest = writer.finish()
        facts["tokens"][name] = manifest.tokens
        print(f"{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens", flush=True)
    for path in sorted(args.output.glob("*.*")):
        if path.suffix in (".bin", ".idx", ".model") and path.stem in {"tokenizer", *texts}:
            facts["sha256"][path.name] = sha256(path)
    (args.output / TEXT_FILE).write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts["sha256"], indent=1))
    print(f"{args.output}: prepared in {time.perf_counter() - start:.0f} s")
    return 0


def find_shard(folders: list[Path], name: str) -> Path:
    """NAME.jsonl or NAME.jsonl.zst in one of the folders."""
    for folder in folders:
        for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.zst"):
            if path.is_file():
                return path
    raise SystemExit(f"--corpus {' '.join(map(str, folders))}: no {name}.jsonl or {name}.jsonl.zst")


def train_tokenizer_on(shard: Path, vocab_size: int, model: Path) -> None:
    from dqt_dist.data.tokenizer import HashSample, train_tokenizer

    sample = HashSample()
    for text in read_texts(shard):
        sample.add(text)
    model.write_bytes(train_tokenizer(sample.documents(), vocab_size))
    print(f"{model}: trained on {shard.name}, sha256 {sha256(model)}", flush=True)


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a file that hold text, in order; a .txt file is one."""
    if path.name.endswith((".txt", ".txt.gz")):
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
        if text.strip():
            yield text
        return
    with open_lines(path) as lines:
        for line in lines:
            text = json.loads(line)["text"]
            if text.strip():
                yield text


def open_lines(path: Path) -> io.TextIOBase:
    if path.suffix != ".zst":
        return open(path, encoding="utf-8")
    try:
        import zstandard
    except ImportError:
        if not shutil.which("zstd"):
            raise SystemExit(
                f"{path}: needs the package zstandard or the command zstd; or decompress it first"
            ) from None
        done = subprocess.run(["zstd", "-dcq", "--long=27", str(path)], stdout=subprocess.PIPE, check=True)
        return io.TextIOWrapper(io.BytesIO(done.stdout), encoding="utf-8")
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**27)
    return io.TextIOWrapper(decompressor.stream_reader(open(path, "rb"), closefd=True), encoding="utf-8")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- run

RUN_HELP = """\
Each run is a process of launchers/pretrain.py in the folder OUT/NAME, with a log in OUT/NAME.log. A run that has
finished is not repeated. After --seconds the runs save and stop; the same command goes on with them. When a run has
finished, its loss on the second text is measured, if the text has one. A line is printed for each run that ends, and
one a minute with the time that is left. With --collect a machine that is taken away in the middle leaves what its runs
have measured until then, if DIR lies elsewhere.

A JSON file of --list holds the fields of `Run` in benchmarks/quality_list.py, for example
    [{"size": "S", "method": "dqt4", "rate": 0.001, "seed": 2},
     {"size": "S", "method": "dqt4", "rate": 0.001, "label": "decay_0.1",
      "settings": ["optimizer.low_bit_weight_decay=0.1"]}]

Small runs leave a GPU idle between kernels, so several at once are faster together. Speeds measured so are those of a
shared GPU.
"""


@dataclass
class Task:
    """One process to run: a training run, or the evaluation of one that has finished."""

    run: Run
    evaluation: bool = False
    process: subprocess.Popen[bytes] | None = None
    slot: int = 0
    told_at: float | None = None
    start_step: int = 0


@dataclass
class Machine:
    """What the runs share."""

    args: argparse.Namespace
    devices: dict[str, Any]
    text: dict[str, Any]
    queue: list[Task]
    free: list[int]
    start: float = field(default_factory=time.monotonic)
    stopping: bool = False
    running: list[Task] = field(default_factory=list)
    steps_done: int = 0
    """Steps of runs that have ended, made since the start."""
    failed: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


def run(args: argparse.Namespace) -> int:
    runs = [replace(item, steps=args.steps) if args.steps else item for item in read_list(args.list)]
    runs = [item for item in runs if args.only is None or re.search(args.only, item.name)]
    if not runs:
        raise SystemExit(f"--only {args.only}: no run of --list {args.list} has such a name")
    if len({item.name for item in runs}) < len(runs):
        raise SystemExit(f"--list {args.list}: two runs have the same name")
    args.output, args.data = args.output.resolve(), args.data.resolve()
    todo = tasks_of(runs, args)
    if args.dry_run:
        for task in todo:
            print(task.run.name, "evaluation" if task.evaluation else " ".join(task.run.own_settings()))
        return 0
    if not (args.data / TEXT_FILE).is_file():
        raise SystemExit(f"--data {args.data}: has no {TEXT_FILE}; `quality.py prepare` makes it")
    args.output.mkdir(parents=True, exist_ok=True)
    devices = find_devices()
    gpus = len(devices["gpus"]) if args.gpus is None else min(args.gpus, len(devices["gpus"]))
    slots = [gpu for _ in range(args.per_gpu) for gpu in range(max(1, gpus))]
    where = f"{gpus} x {devices['gpus'][0]}" if gpus else "the CPU"
    print(f"{len(todo)} of {len(runs)} runs to do on {where}, {args.per_gpu} at once on each", flush=True)
    machine = Machine(args, devices, json.loads((args.data / TEXT_FILE).read_text()), todo, slots)

    def stop(*_: Any) -> None:
        machine.stopping = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        work(machine)
    finally:
        for task in machine.running:
            if task.process is not None:
                task.process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
    left = [item.name for item in runs if not finished(item, args)]
    print(f"{len(runs) - len(left)} of {len(runs)} runs finished, {machine.seconds:.0f} s", flush=True)
    if left:
        print(f"left: {' '.join(left)}", flush=True)
    return 1 if machine.failed else 0


def tasks_of(runs: list[Run], args: argparse.Namespace) -> list[Task]:
    """What is left to do: runs that have not finished, and measures on the second text that are missing."""
    todo = []
    for item in runs:
        if not finished(item, args):
            todo.append(Task(item))
        elif (args.output / item.name / "checkpoints").is_dir() and wants_second_text(item, args):
            todo.append(Task(item, evaluation=True))
    return todo


def finished(item: Run, args: argparse.Namespace) -> bool:
    if (args.output / item.name / "summary.json").exists():
        return True
    collected = args.done / f"{item.name}.json" if args.done else None
    return collected is not None and collected.exists() and json.loads(collected.read_text())["finished"]


def wants_second_text(item: Run, args: argparse.Namespace) -> bool:
    return (args.data / "second.idx").exists() and not (args.output / item.name / SECOND_FILE).exists()


def find_devices() -> dict[str, Any]:
    """Names of the GPUs and the version of torch, found in another process so that this one holds nothing on a GPU."""
    code = (
        "import json, torch; n = torch.cuda.device_count(); "
        "print(json.dumps({'gpus': [torch.cuda.get_device_name(i) for i in range(n)], 'torch': torch.__version__}))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def work(machine: Machine) -> None:
    """Until nothing is left, or the time is over and what ran has saved."""
    shown = machine.seconds
    while machine.queue or machine.running:
        machine.stopping = machine.stopping or machine.seconds > machine.args.seconds
        for task in [task for task in machine.running if task.process is not None and task.process.poll() is not None]:
            machine.running.remove(task)
            if not task.evaluation:
                machine.free.append(task.slot)
            ended(machine, task)
        if machine.stopping:
            machine.queue.clear()
            tell_to_stop(machine)
        while machine.queue and machine.free:
            begin(machine, machine.queue.pop(0))
        if machine.seconds - shown > 60 and machine.running:
            shown = machine.seconds
            at = ", ".join(f"{task.run.name} {step_of(task.run, machine.args)}" for task in machine.running)
            print(f"{time_left(machine)}; at step: {at}", flush=True)
            collect_on_the_way(machine)
        time.sleep(0.2)


def tell_to_stop(machine: Machine) -> None:
    """SIGTERM makes a run save and end; one that does not end in time is killed."""
    for task in machine.running:
        assert task.process is not None
        if task.told_at is None:
            task.told_at = machine.seconds
            task.process.terminate()
        elif machine.seconds - task.told_at > GRACE_SECONDS:
            task.process.kill()


def begin(machine: Machine, task: Task) -> None:
    args, name = machine.args, task.run.name
    folder = args.output / name
    folder.mkdir(exist_ok=True)
    if not task.evaluation:  # short and small: it runs beside the next run
        task.slot = machine.free.pop(0)
    task.start_step = step_of(task.run, args)
    if task.evaluation:
        command = [ROOT / "tools/evaluate.py", "--checkpoint", folder, "--data", args.data / "second", "--json"]
        command += ["--batch-size", "32"]
    else:
        write_run_file(machine, task)
        settings = [*task.run.all_settings(str(args.data)), f"checkpoint.dir={folder}"]
        command = [ROOT / "launchers/pretrain.py", "--config", CONFIG, "--resume", "auto"]
        command += [part for setting in settings for part in ("--set", setting)]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": str(task.slot) if machine.devices["gpus"] else "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        # Runs share compiled kernels; on a disk of this machine, as file locks of network disks are slow.
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", f"{tempfile.gettempdir()}/dqt_quality_triton"),
    }
    with ExitStack() as files:
        log = files.enter_context(open(args.output / f"{name}.log", "ab"))
        output = files.enter_context(open(folder / EVALUATION, "wb")) if task.evaluation else log
        command = [sys.executable, *map(str, command)]
        task.process = subprocess.Popen(command, env=environment, stdout=output, stderr=log, cwd=tempfile.gettempdir())
    machine.running.append(task)


def write_run_file(machine: Machine, task: Task) -> None:
    """What a result depends on. A run that goes on keeps its file; one that was asked for differently is refused."""
    path = machine.args.output / task.run.name / RUN_FILE
    now = {
        "run": task.run.facts(),
        "own_settings": task.run.own_settings(),
        "commit": machine.args.commit or commit(),
        "date": str(date.today()),
        "device": machine.devices["gpus"][task.slot] if machine.devices["gpus"] else "CPU",
        "runs_at_once": machine.args.per_gpu,
        "torch": machine.devices["torch"],
        "text": machine.text,
    }
    if path.exists():
        before = json.loads(path.read_text())
        for key in ("run", "own_settings", "text"):
            if before[key] != now[key]:
                raise SystemExit(
                    f"{path}: this run was begun with another {key}; remove its folder, or use another OUT"
                )
        for key in ("commit", "device", "torch"):
            now[key] = before[key] if now[key] in before[key].split(", ") else f"{before[key]}, {now[key]}"
        now["date"] = before["date"]
    path.write_text(json.dumps(now, indent=1) + "\n")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ended(machine: Machine, task: Task) -> None:
    """Prints what became of a process; a run that has finished is measured on the second text next."""
    args, name = machine.args, task.run.name
    folder = args.output / name
    assert task.process is not None
    code = task.process.returncode
    about = f"{name}: "
    if code == 0 and task.evaluation:
        figures = json.loads((folder / EVALUATION).read_text().strip().splitlines()[-1])
        (folder / SECOND_FILE).write_text(json.dumps(figures) + "\n")
        about += f"second text {figures['loss']:.4f}"
    elif code == 0:
        valid = [f"{line['valid_loss']:.4f}" for line in read_lines(folder)[0] if "valid_loss" in line]
        speed = json.loads((folder / "summary.json").read_text())["tokens_per_s"]
        about += f"validation {' '.join(valid)}, {speed:,.0f} tokens/s"
        if wants_second_text(task.run, args):
            begin(machine, Task(task.run, evaluation=True, slot=task.slot))
    elif code == STOPPED_EXIT_CODE:
        about += f"saved at step {step_of(task.run, args)}"
    elif task.told_at is not None:
        about += "stopped before it could save"
    else:
        machine.failed += 1
        log = (args.output / f"{name}.log").read_text(errors="replace")
        about += f"failed with exit code {code}: ... {' | '.join(log[-400:].split(chr(10)))}"
    if not task.evaluation:
        machine.steps_done += max(0, step_of(task.run, args) - task.start_step)
    if args.discard_checkpoints and finished(task.run, args) and not wants_second_text(task.run, args):
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    print(f"{about}; {time_left(machine)}", flush=True)
    collect_on_the_way(machine)


def collect_on_the_way(machine: Machine) -> None:
    if machine.args.collect:
        collect_into(machine.args.output, machine.args.collect)


def step_of(item: Run, args: argparse.Namespace) -> int:
    """The last step in the run's metrics."""
    return max((line["step"] for line in read_lines(args.output / item.name)[0]), default=0)


def time_left(machine: Machine) -> str:
    """Steps that are left, weighted by the size of their model, over the speed so far."""

    def cost(task: Task) -> int:
        return SIZES[task.run.size].tokens_per_step * SIZES[task.run.size].linear_weights

    running = [task for task in machine.running if not task.evaluation]
    at = {task.run.name: step_of(task.run, machine.args) for task in running}
    done = machine.steps_done + sum(at[task.run.name] - task.start_step for task in running)
    queued = [task for task in machine.queue if not task.evaluation]
    left = sum((task.run.num_steps - at[task.run.name]) * cost(task) for task in running)
    left += sum((task.run.num_steps - step_of(task.run, machine.args)) * cost(task) for task in queued)
    after = f"after {machine.seconds:.0f} s"
    tasks = running + queued
    if not tasks or done <= 0:
        return f"{after}, {len(tasks)} left"
    mean = sum(map(cost, tasks)) / len(tasks)
    return f"{after}, {len(tasks)} left, some {left / mean / done * machine.seconds:.0f} s more"


# ---------------------------------------------------------------- collect

COLLECT_HELP = """\
A file holds what was asked for, the losses, the shares of codes that flip, are zero or were clamped, the bytes of a
linear weight, speed, commit, device, versions, date, and the sha256 of the text. A run that has not finished is
written with "finished": false and takes no part in the page's comparisons. A file of more tokens is not replaced.
"""


def collect(args: argparse.Namespace) -> int:
    collected = collect_into(args.output, args.to)
    if not collected:
        raise SystemExit(f"{args.output}: no run folder with a {RUN_FILE}")
    for target, facts in collected:
        print(f"{target}: {'finished' if facts['finished'] else 'not finished'}, step {facts['step']}")
    return 0


def collect_into(output: Path, to: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Writes the file of each run and returns what it has written, or kept because it says more."""
    to.mkdir(parents=True, exist_ok=True)
    collected = []
    for path in sorted(output.glob(f"*/{RUN_FILE}")):
        facts = small_form(path.parent)
        target = to / f"{facts['name']}.json"
        kept = json.loads(target.read_text()) if target.exists() else {"finished": False, "tokens": 0}
        if (facts["finished"], facts["tokens"]) >= (kept["finished"], kept["tokens"]):
            temporary = target.with_suffix(".tmp")
            temporary.write_text(one_line_a_field(facts))
            temporary.replace(target)
        else:
            facts = kept
        collected.append((target, facts))
    return collected


def small_form(folder: Path) -> dict[str, Any]:
    """What is kept of a run."""
    asked = json.loads((folder / RUN_FILE).read_text())
    item = Run(**asked["run"] | {"settings": tuple(asked["run"]["settings"])})
    size, method = SIZES[item.size], METHODS[item.method]
    summary_path = folder / "summary.json"
    summary = json.loads(summary_path.read_text()) if summary_path.exists() else {}
    second_path = folder / SECOND_FILE
    lines, _ = read_lines(folder)  # the last line may be in the making
    steps = [line for line in lines if "loss" in line]
    curve = thinned(steps)
    a_step = size.tokens_per_step
    breakdown = summary.get("static_bytes_breakdown")
    # A CUDA graph keeps the gradient between steps, in every method: what a recipe needs is the rest.
    measured = sum(size for kind, size in breakdown.items() if kind != "gradient") if breakdown else None
    bytes_per_weight, how = (measured, "measured") if measured else (counted_bytes(item), "counted")
    return {
        "name": item.name,
        "finished": bool(summary),
        "size": item.size,
        "about_size": size.about,
        "linear_weights": size.linear_weights,
        "method": item.method,
        "recipe": item.recipe,
        "master": method.master,
        "rate": item.rate,
        "rest_rate": item.rest_rate or size.rest_rate,
        "seed": item.seed,
        "settings": asked["own_settings"],
        "planned_tokens": item.num_steps * a_step,
        "step": max((line["step"] for line in lines), default=0),
        "tokens": max((line["tokens"] for line in steps), default=0),
        "tokens_per_step": a_step,
        "valid": [[line["step"] * a_step, round(line["valid_loss"], 5)] for line in lines if "valid_loss" in line],
        "valid_tokens": size.eval_batches * a_step,
        "train": {"tokens": [line["tokens"] for line in curve]}
        | {key: [significant(line[key]) for line in curve] for key in CURVES if curve and key in curve[-1]},
        "second_text": json.loads(second_path.read_text())["loss"] if second_path.exists() else None,
        "bytes_per_linear_weight": bytes_per_weight,
        "bytes_are": how,
        "bytes_breakdown": breakdown,
        "tokens_per_s": round(summary["tokens_per_s"]) if summary else None,
        "runs_at_once_per_device": asked["runs_at_once"],
        "peak_memory_bytes": summary.get("peak_memory_bytes"),
        "commit": asked["commit"],
        "device": asked["device"],
        "torch": asked["torch"],
        "date": asked["date"],
        "text": {"tokens": asked["text"]["tokens"], "sha256": asked["text"]["sha256"]},
    }


def counted_bytes(item: Run) -> float | None:
    """Bytes per linear weight between steps where nothing is measured: bf16 weight 2, fp32 master 4, moments 8."""
    plain = METHODS[item.method].master and not any("compute" in setting for setting in item.settings)
    return 14.0 if plain else None


def thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most CURVE_POINTS of them, evenly, the last one too."""
    stride = -(-len(lines) // CURVE_POINTS) if lines else 1
    return lines[::-1][::stride][::-1]


def significant(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def one_line_a_field(facts: dict[str, Any]) -> str:
    """JSON that is short and still shows in a diff what changed."""
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items()) + "\n}\n"


# ---------------------------------------------------------------- page

PAGE_HELP = """\
Needs matplotlib. Reads nothing but DIR/*.json, so anyone can draw the page again. Runs of another size, length or
text get sections of their own.
"""


def page(args: argparse.Namespace) -> int:
    from benchmarks.quality_page import write_page

    return write_page(args.folder)


if __name__ == "__main__":
    sys.exit(main())
