"""What belongs to a run stays with it: its folder has one writer and one course, its tokenizer is not another one."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from dqt_dist.checkpoint.folder import read_manifest
from dqt_dist.data.tokenizer import load_tokenizer
from dqt_dist.errors import EXIT_CODE, UserError, told
from dqt_dist.export.convert import Request, convert
from dqt_dist.export.import_hf import import_hf
from dqt_dist.inference.language_model import open_model
from dqt_dist.training.run_folder import only_writer
from tests import forked
from tests.distributed import run_distributed
from tests.small import small_config
from tests.training.conftest import ROOT, Train, command, environment

COURSE = {"checkpoints", "metrics.jsonl", "tb", "summary.json", "config.json", "tokenizer.model"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps(run: Path) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def test_a_new_course_sets_the_old_one_aside_whole_and_auto_goes_on_with_the_new_one(train: Train, tmp_path: Path):
    run, short = tmp_path / "run", ("training.steps=6", "checkpoint.interval=2", "checkpoint.keep_last=9")
    assert train(*short).returncode == 0
    first = contents(run)
    for number, (resume, seed) in enumerate([("none", 77), (str(run / "left_run_1"), 78)], start=1):
        # The second course is stopped early, the third comes from a checkpoint that is not in this folder any more.
        steps_now = 4 if resume == "none" else 8
        done = train(f"training.steps={steps_now}", f"training.seed={seed}", "checkpoint.interval=2", resume=resume)
        assert done.returncode == 0, done.stderr
        left = run / f"left_run_{number}"
        assert f"is set aside as {left}" in done.stdout.replace("\n", "")
        assert {path.name for path in left.iterdir()} == COURSE
        assert json.loads((run / "config.json").read_text())["training"]["seed"] == seed
    old = contents(run / "left_run_1")
    assert {name: first[name] for name in old} == old and {n.split("/")[0] for n in first} - {"data_index"} == COURSE
    assert steps(run) == [8] and steps(run / "left_run_2") == [1, 2, 4]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000008"]
    assert "at step 8" in train("training.steps=10", "training.seed=78").stdout


def test_one_run_writes_to_a_folder_and_is_named_to_the_next(config_file: Path, train: Train, tmp_path: Path):
    run = tmp_path / "run"
    first = subprocess.Popen(command(config_file, "training.steps=500"), env=environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "step_00000005").exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        first.send_signal(signal.SIGSTOP)
        before = contents(run)
        second = train("training.seed=9", resume="none", processes=2)
        assert second.stderr.count(f"error: {run}: in use by launchers/pretrain.py (process {first.pid} on ") == 1
        assert second.returncode == EXIT_CODE and "UserError" not in second.stderr
        assert contents(run) == before
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert (
            "at step 5" in train("training.steps=6", "training.sample_prompt=null").stdout
        )  # a dead run holds nothing
    finally:
        first.kill()
    assert not (run / ".lock").exists()


@pytest.fixture
def other_corpus(corpus: Path, tmp_path: Path) -> Path:
    """The same text with another tokenizer, in a folder of its own."""
    tool = [ROOT / "tools/prepare_data.py", "--input", corpus / "text.txt", "--output", tmp_path / "other"]
    done = forked.run([*tool, "--vocab-size", 500, "--valid-fraction", 0.2, "--workers", 1])
    assert done.returncode == 0, done.stderr
    return tmp_path / "other"


def test_another_tokenizer_is_refused_wherever_the_model_is_used(
    corpus: Path, config_file: Path, other_corpus: Path, train: Train, tmp_path: Path
):
    """data.tokenizer and the data are replaced together, as a preparation with --force does."""
    data, run, export = tmp_path / "data", tmp_path / "run", tmp_path / "export"
    shutil.copytree(corpus, data)
    config_file.write_text(config_file.read_text().replace(str(corpus), str(data)))
    assert train("training.steps=5").returncode == 0
    model, sha256 = data / "tokenizer.model", load_tokenizer(data / "tokenizer.model").sha256
    manifest = read_manifest(run / "checkpoints" / "step_00000005")
    assert manifest["tokenizer_sha256"] == sha256 == load_tokenizer(run / "tokenizer.model").sha256
    shutil.copytree(other_corpus, data, dirs_exist_ok=True)
    other = load_tokenizer(model).sha256
    assert other != sha256

    again = train()
    assert again.returncode == EXIT_CODE and "Traceback" not in again.stderr
    for part in ("data.tokenizer: ", f"{model} (sha256 {other})", f"{run / 'tokenizer.model'} (sha256 {sha256})"):
        assert part in again.stderr, again.stderr

    tool = [ROOT / "tools/evaluate.py", "--checkpoint", run, "--tokenizer", model, "--data", corpus / "text.txt"]
    done = forked.run(tool, environment())
    assert done.returncode == EXIT_CODE and "Traceback" not in done.stderr
    refusal = f"--tokenizer: {model} (sha256 {other}) is not the tokenizer that "
    assert refusal in done.stderr and f"{run / 'tokenizer.model'} (sha256 {sha256})" in done.stderr
    convert(Request(run, export))  # with the file that the run keeps
    assert open_model(run).tokenizer.sha256 == open_model(export).tokenizer.sha256 == sha256
    for use in (
        lambda: open_model(export, tokenizer=model),
        lambda: convert(Request(run, tmp_path / "refused", tokenizer=model)),
        lambda: import_hf(export, tmp_path / "refused", None, model),
    ):
        with pytest.raises(UserError, match=re.escape(refusal) + r".*/tokenizer\.model \(sha256 " + sha256):
            use()
    assert not (tmp_path / "refused").exists()
    shutil.copyfile(model, run / "tokenizer.model")
    with pytest.raises(UserError, match=re.escape(f"(sha256 {other}) is not the tokenizer")):
        open_model(run)


def test_an_id_outside_of_the_vocabulary_stops_a_tensor_parallel_run_before_it_trains(
    corpus: Path, config_file: Path, train: Train, tmp_path: Path
):
    """Where each rank has a part of the embedding, such an id would be a vector of zeros without a word."""
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    config_file.write_text(config_file.read_text().replace(str(corpus), str(data)))
    ids = np.memmap(data / "train.bin", np.uint16, "r+")
    ids[len(ids) // 2] = 600
    ids.flush()
    done = train("parallel.tensor=2", processes=2)
    message = f"error: data.train[0].path: {data / 'train'}.bin holds token id 600, but model.vocab_size is 512"
    assert done.stderr.count(message) == 1, done.stderr
    assert done.returncode == EXIT_CODE and "UserError" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def hold(rank: int, world_size: int, folder: str) -> tuple[str, bool, int]:
    """Message of a folder that cannot be made, whether it is this rank's alone, and the exit code."""
    with pytest.raises(OSError) as caught, only_writer(small_config(f"checkpoint.dir={folder}")):
        pass
    message = told(caught.value)
    assert message is not None
    return str(message), message.local, message.exit_code


def test_a_run_folder_that_cannot_be_made_is_told_of_by_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    of_ranks = run_distributed(hold, 2, str(tmp_path / "file" / "run"))
    text = f"rank 0: {tmp_path}/file/run: Not a directory; give another path, or the right to use this one"
    assert of_ranks == [(text, False, EXIT_CODE)] * 2
