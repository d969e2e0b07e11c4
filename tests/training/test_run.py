"""Whole runs as a user starts them: what a run folder holds, resuming, stopping by a signal."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import time
import warnings
from pathlib import Path

import pytest

from dqt_dist.checkpoint.digest import digest_of
from dqt_dist.checkpoint.folder import verify
from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.commands.pretrain import show_report
from dqt_dist.config import load_config
from dqt_dist.errors import EXIT_CODE, STOPPED_EXIT_CODE
from tests.small import small_config
from tests.training.conftest import Train, command, environment
from tests.training.ranks import Ranks

METRICS = {
    *(
        "step",
        "loss",
        "grad_norm",
        "lr",
        "low_bit_lr",
        "tokens",
        "tokens_per_s",
        "tflops_per_s",
        "mfu",
        "peak_memory_bytes",
    ),
    *("skipped_steps", "flip_rate", "zero_fraction", "saturation"),
    *("gradients_sent_bytes", "codes_sent_bytes", "activation_maxima_sent_bytes", "activations_sent_bytes"),
}
SUMMARY = {
    *("first_loss", "last_loss", "valid_loss", "steps", "tokens", "tokens_per_s", "parameters", "low_bit_parameters"),
    *("static_bytes_per_low_bit_weight", "layout", "versions", "uniform_loss", "diverged", "skipped_steps"),
}


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def step_lines(run: Path) -> dict[int, tuple]:
    """The results of each step, without times: step -> (loss, norm, flips)."""
    return {
        line["step"]: (line["loss"], line["grad_norm"], line["flip_rate"]) for line in metrics(run) if "loss" in line
    }


VALID = {"step", "valid_loss", "valid_perplexity"}
SAVE = {"step", "save_blocked_seconds", "save_seconds", "save_bytes"}


def assert_saves(lines: list[dict], run: Path, steps: list[int]) -> None:
    """Checks that metrics.jsonl has one line per save of these steps, with the size on disk."""
    saves = [line for line in lines if "save_bytes" in line]
    assert [line["step"] for line in saves] == steps and all(line.keys() == SAVE for line in saves)
    for line in saves:
        assert line["save_bytes"] == verify(run / "checkpoints" / f"step_{line['step']:08d}")
        assert 0 < line["save_blocked_seconds"] <= line["save_seconds"]


def test_a_run_folder_holds_everything(train: Train, config_file: Path, tmp_path: Path) -> None:
    done = train("parallel.tensor=2", processes=2)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert load_config(run / "config.json") == load_config(config_file, ["parallel.tensor=2"])
    lines = metrics(run)
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 4, 6, 8, 10]
    assert all(line.keys() == METRICS for line in logged)
    assert all(0 <= line[name] <= 1 for line in logged for name in ("flip_rate", "zero_fraction", "saturation"))
    assert logged[0]["flip_rate"] > 0
    assert [line["step"] for line in lines if "valid_loss" in line] == [10]
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    assert (summary["steps"], summary["tokens"]) == (10, 10 * 8 * 32)
    assert (summary["first_loss"], summary["last_loss"]) == (logged[0]["loss"], logged[-1]["loss"])
    assert summary["last_loss"] < summary["first_loss"]
    # 2 layers: q and o 32 x 32, k and v 16 x 32, gate, up and down 48 x 32; then embedding, head and 5 norms.
    assert summary["low_bit_parameters"] == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert summary["parameters"] == summary["low_bit_parameters"] + 2 * 512 * 32 + 5 * 32
    breakdown = summary["static_bytes_breakdown"]
    assert (breakdown["codes"], breakdown["moments"], breakdown["gradient"]) == (0.25, 8.0, 0.0)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000005", "step_00000010"]
    assert_saves(lines, run, [5, 10])
    assert all(line["save_blocked_seconds"] == line["save_seconds"] for line in lines if "save_seconds" in line)
    # The report: once, by rank 0, in this order.
    parts = ["weights after", "what it writes", "sampled in fp32 on cpu", "next: tensorboard"]
    assert [done.stdout.count(part) for part in parts] == [1] * len(parts)
    assert sorted(parts, key=done.stdout.index) == parts
    assert str(run / "tb") in done.stdout.replace("\n", "")
    following = done.stdout[done.stdout.index("next: ") :].splitlines()
    assert [line[6:].split(" --")[0] for line in following] == [
        "tensorboard",
        "tools/evaluate.py",
        "tools/generate.py",
        "tools/convert_ckpt.py",
        "the command of this run with",
    ]
    assert f"--checkpoint {run} --prompt Sentence" in following[2] and "training.steps=20 goes on" in following[4]


def test_a_complete_run_says_so_and_keeps_its_summary(train: Train, tmp_path: Path) -> None:
    short = ("training.steps=2", "training.sample_prompt=null")
    assert train(*short).returncode == 0
    files = ("summary.json", "metrics.jsonl", "checkpoints/step_00000002/manifest.json")
    before = [(tmp_path / "run" / name).read_bytes() for name in files]
    again = train(*short, "training.steps=1", processes=2)  # any number of steps that are done, in any layout
    assert again.returncode == 0, again.stderr
    assert "complete since step 2; training.steps above 2 goes on" in again.stdout
    assert [(tmp_path / "run" / name).read_bytes() for name in files] == before
    # A damaged one is made anew.
    (tmp_path / "run" / "summary.json").write_bytes(before[0][:40])
    again = train(*short)
    assert again.returncode == 0 and again.stderr.count(f"warning: {tmp_path}/run/summary.json: not JSON") == 1
    assert (
        json.loads((tmp_path / "run" / "summary.json").read_text())["valid_loss"] == json.loads(before[0])["valid_loss"]
    )


@pytest.mark.parametrize("size", ['"few"', "3"])  # of another type, and odd: for ZeRO it must be even
def test_a_value_that_deepspeed_refuses_is_one_message(train: Train, size: str) -> None:
    zero = f'deepspeed.zero_optimization={{"stage": 1, "allgather_bucket_size": {size}}}'
    done = train(zero)
    assert done.returncode == EXIT_CODE and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: deepspeed: DeepSpeed refuses the section: allgather_bucket_size") == 1, done.stderr


def test_a_run_without_a_prompt_has_no_sample(train: Train) -> None:
    done = train("training.steps=1", "training.sample_prompt=null")
    assert done.returncode == 0 and "next: tensorboard" in done.stdout, done.stderr
    assert "what it writes" not in done.stdout and "sample" not in done.stdout


def test_a_sample_that_fails_is_one_line_of_a_run_that_succeeds(train: Train) -> None:
    """A prompt of more tokens than the context, under two ranks."""
    done = train("training.steps=1", f"training.sample_prompt={'word ' * 40}", "parallel.tensor=2", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no sample: ") == done.stdout.count("this makes one: tools/generate.py ") == 1
    assert "the model's context has 32" in done.stdout and "next: tensorboard" in done.stdout


def test_the_curve_and_the_report_are_side_matters(train: Train, config_file: Path, tmp_path: Path) -> None:
    """Damaged lines, then no metrics.jsonl, on a terminal of ASCII with a prompt that is not; each run ends with 0."""
    prompt = "training.sample_prompt=na\u00efve"
    assert train("training.steps=2").returncode == 0
    lines = tmp_path / "run" / "metrics.jsonl"
    kept = lines.read_text()
    lines.write_bytes(b'{"step": 1, "lo\n[3]\n\xff\n' + kept.encode())
    longer = train("training.steps=3", prompt, encoding="ascii")
    assert longer.returncode == 0, longer.stderr
    assert f"warning: 3 lines of {lines} are damaged and left out" in longer.stdout
    assert lines.read_text().startswith(kept) and "na?ve" in longer.stdout and "next: tensorboard" in longer.stdout
    lines.unlink()
    (tmp_path / "run" / "summary.json").unlink()
    finished = train("training.steps=3", prompt)
    assert finished.returncode == 0 and "not recorded in metrics.jsonl" in finished.stdout, finished.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["first_loss"] is None


def test_a_report_that_fails_is_a_warning(capsys: pytest.CaptureFixture) -> None:
    """A summary without one of its figures."""
    show_report({"parameters": 1}, small_config())
    assert capsys.readouterr().err.startswith("warning: the report failed: KeyError: 'tokens'")


def test_tensorboard_has_the_numbers_and_the_histograms(train: Train, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train().returncode == 0
    events = EventAccumulator(str(tmp_path / "run" / "tb"), size_guidance={"histograms": 0})
    events.Reload()
    scalars, histograms = events.Tags()["scalars"], events.Tags()["histograms"]
    of_matrices = [name for name in scalars + histograms if name.startswith("9_")]
    assert {"9_codes_of_matrices/layers.0.self_attn.q_proj", "9_codes_of_matrices/layers.1.mlp.down_proj"} <= set(
        of_matrices
    )
    assert "9_flip_rate_of_matrices/layers.1.mlp.down_proj" in of_matrices
    # All other tags are few: those of the metrics, and one histogram over the matrices per metric of codes.
    assert {name.split("/")[1] for name in scalars if name not in of_matrices} == (METRICS | SAVE | VALID) - {"step"}
    assert {name for name in histograms if name not in of_matrices} == {
        f"8_over_matrices/{name}" for name in ("flip_rate", "zero_fraction", "saturation")
    }
    first = {name for name in scalars if name < "2"}
    assert first == {f"1_loss/{name}" for name in ("loss", "grad_norm", "skipped_steps", *VALID - {"step"})}
    losses = [(event.step, event.value) for event in events.Scalars("1_loss/loss")]
    logged = [(line["step"], line["loss"]) for line in metrics(tmp_path / "run") if "loss" in line]
    assert [step for step, _ in losses] == [step for step, _ in logged]
    histogram = events.Histograms("9_codes_of_matrices/layers.0.mlp.up_proj")[-1].histogram_value
    assert histogram.num == 48 * 32 and sum(histogram.bucket) == 48 * 32


def test_a_resumed_run_equals_one_that_went_through(train: Train, tmp_path: Path) -> None:
    """10 steps in one run, and again from the checkpoint of step 5: the same bits, and no step is recorded twice."""
    assert train().returncode == 0
    run = tmp_path / "run"
    through = step_lines(run)
    (run / "checkpoints" / "step_00000010").rename(tmp_path / "kept")
    (run / "summary.json").unlink()
    again = train()
    assert again.returncode == 0 and "resumed from" in again.stdout
    assert step_lines(run) == through
    # One line per logged step, and one line each for the saves of steps 5 and 10 and the validation of step 10.
    assert [line["step"] for line in metrics(run)] == [1, 2, 4, 5, 6, 8, 10, 10, 10]
    assert_saves(metrics(run), run, [5, 10])
    first, second = (
        json.loads((path / "manifest.json").read_text())
        for path in (tmp_path / "kept", run / "checkpoints" / "step_00000010")
    )
    counters = [{name: manifest[name] for name in ("step", "tokens", "samples")} for manifest in (first, second)]
    assert counters == [{"step": 10, "tokens": 10 * 8 * 32, "samples": 10 * 8}] * 2
    for name in first["files"]:
        if name.endswith(".distcp"):
            assert (tmp_path / "kept" / name).read_bytes() == (
                run / "checkpoints" / "step_00000010" / name
            ).read_bytes()


def test_asynchronous_saves_hold_the_same_states(train: Train, tmp_path: Path) -> None:
    """Two ranks that save every second step while training goes on, against the same run that waits for each save."""
    often = ("checkpoint.interval=2", "checkpoint.keep_last=9", "parallel.tensor=2")
    waiting, going_on = tmp_path / "waiting", tmp_path / "going_on"
    assert train(*often, f"checkpoint.dir={waiting}", processes=2).returncode == 0
    done = train(*often, f"checkpoint.dir={going_on}", "checkpoint.async_save=true", processes=2)
    assert done.returncode == 0, done.stderr
    assert_saves(metrics(going_on), going_on, [2, 4, 6, 8, 10])
    for step in (2, 4, 6, 8, 10):
        name = f"checkpoints/step_{step:08d}"
        first, second = (digest_of(CheckpointReader(run / name)) for run in (waiting, going_on))
        assert first == second


def test_a_resume_with_another_batch_goes_on_in_the_data_and_counts_on(train: Train, tmp_path: Path) -> None:
    """5 steps of 8 samples, then 5 steps of 4: counters continue, and the manifest has the position in the data."""
    assert train("training.steps=5").returncode == 0
    again = train("training.global_batch_size=4")
    assert again.returncode == 0 and "at step 5" in again.stdout, again.stderr
    reader = CheckpointReader(tmp_path / "run")
    assert (reader.progress.step, reader.progress.samples) == (10, 5 * 8 + 5 * 4)
    assert reader.progress.tokens == 60 * 32
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["tokens"] == 60 * 32
    assert [line["tokens"] for line in metrics(tmp_path / "run") if "loss" in line][-1] == 60 * 32


def test_going_back_sets_later_checkpoints_aside(train: Train, tmp_path: Path) -> None:
    """Otherwise --resume auto would continue from the checkpoint of a step that the run has computed anew."""
    keep = ("checkpoint.interval=2", "checkpoint.keep_last=9")
    assert train(*keep).returncode == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    kept = {path.name: (path / "manifest.json").read_bytes() for path in checkpoints.iterdir()}
    again = train(*keep, "training.steps=5", resume=str(checkpoints / "step_00000004"))
    assert again.returncode == 0, again.stderr
    for step in (6, 8, 10):
        left = checkpoints / f"left_step_{step:08d}"
        assert (left / "manifest.json").read_bytes() == kept[f"step_{step:08d}"]
        assert f"{checkpoints}/step_{step:08d}: a later checkpoint; set aside as {left.name}" in again.stdout
    assert "at step 5" in train(*keep, "training.steps=6").stdout


def test_a_longer_run_sees_the_same_samples_first(train: Train, tmp_path: Path) -> None:
    """Extending training.steps changes neither data nor draws of the steps already made (constant schedule)."""
    assert train("training.steps=6", f"checkpoint.dir={tmp_path / 'short'}").returncode == 0
    assert train("training.steps=12").returncode == 0
    short, long = step_lines(tmp_path / "short"), step_lines(tmp_path / "run")
    assert all(long[step] == numbers for step, numbers in short.items())


def test_a_signal_to_one_rank_saves_and_stops_all(config_file: Path, tmp_path: Path) -> None:
    """SIGTERM to one of two ranks gives exit code 75 and a checkpoint of the current step. The same command resumes."""
    run = tmp_path / "run"
    steps = ("training.steps=400", "checkpoint.interval=0", "logging.interval=1")
    process = subprocess.Popen(
        command(config_file, *steps, "parallel.tensor=2", processes=2),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        ranks = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        assert len(ranks) == 2
        subprocess.run(["kill", f"-{signal.SIGTERM.value}", ranks[1]], check=True)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    # torchrun itself exits with 1 and reports the exit codes of its processes.
    assert f"exitcode  : {STOPPED_EXIT_CODE}" in errors or f"exitcode: {STOPPED_EXIT_CODE}" in errors
    (saved,) = (run / "checkpoints").iterdir()
    stopped_at = int(saved.name.split("_")[1])
    assert 3 <= stopped_at < 400
    again = subprocess.run(
        command(config_file, *steps, "parallel.tensor=2", f"training.steps={stopped_at + 2}", processes=2),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert again.returncode == 0 and f"at step {stopped_at}" in again.stdout
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, stopped_at + 3))


def warn_of_something() -> None:
    """Lets every rank say what a library might, while the model is built and from a logger."""
    from dqt_dist.training import loop

    build = loop.build_model

    def warned(*arguments):
        warnings.warn("a library is deprecated", stacklevel=1)
        logging.getLogger("a_library").warning("a library falls back")
        logging.getLogger("a_library").error("a library fails")
        return build(*arguments)

    loop.build_model = warned


def test_what_libraries_warn_of_is_shown_once(config_file: Path, tmp_path: Path) -> None:
    with Ranks(config_file, tmp_path / "logs", "training.steps=1", prepare=warn_of_something) as ranks:
        assert ranks.exit_codes() == [0, 0], ranks.output()
        for text in ("UserWarning: a library is deprecated", "a library falls back"):
            assert [text in log.read_text() for log in ranks.logs] == [True, False]
        assert all("a library fails" in log.read_text() for log in ranks.logs)
