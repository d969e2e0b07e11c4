"""benchmarks/quality.py as it is used: text to tokens, two runs, small files, the page; and what it refuses."""

from __future__ import annotations

import email
import json
import shutil
from pathlib import Path

import pytest
import zstandard

from benchmarks.quality import main
from benchmarks.quality_list import LISTS, METHODS, SIZES, Run, short
from dqt_dist.config import load_config
from dqt_dist.data.indexed import quiet_megatron_import
from dqt_dist.data.tokenizer import load_tokenizer

with quiet_megatron_import():
    from megatron.core.datasets.indexed_dataset import IndexedDataset

CONFIG = Path(__file__).resolve().parents[2] / "configs/130m_pure_ternary.json"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Sources of Python's email package."""
    return [path.read_text() for path in sorted(Path(email.__file__).parent.glob("*.py"))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name, part in (("train-00", texts[:6]), ("train-01", texts[6:12]), ("valid", texts[12:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in [*part, " \n"])  # the last one holds no text
        (folder / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    return folder


def prepare(output: Path, corpus: Path, *more: str) -> dict:
    words = ["prepare", output, "--corpus", corpus, "--shards", "2", "--vocab-size", "512", "--workers", "1", *more]
    assert main([str(word) for word in words]) == 0
    return json.loads((output / "text.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare(folder, corpus)
    return folder


def test_tokens_are_the_documents_in_the_order_of_the_shards(data: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(data / "tokenizer.model")
    for name, expected in (("train", texts[:12]), ("valid", [text for text in texts[12:] if text.strip()])):
        indexed = IndexedDataset(str(data / name))
        assert [tokenizer.decode(indexed[i][:-1]) for i in range(len(indexed))] == expected


def test_a_second_preparation_gives_the_same_bytes(data: Path, corpus: Path, tmp_path: Path) -> None:
    for shard in corpus.iterdir():  # also when the shards come decompressed
        (tmp_path / shard.stem).write_bytes(zstandard.decompress(shard.read_bytes(), max_output_size=2**24))
    again = prepare(tmp_path / "again", tmp_path)
    first = json.loads((data / "text.json").read_text())
    assert again["sha256"] == first["sha256"]
    assert set(again["sha256"]) == {"tokenizer.model", "train.bin", "train.idx", "valid.bin", "valid.idx"}


@pytest.mark.slow
def test_two_runs_become_files_and_a_page(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, small = tmp_path / "out", tmp_path / "docs" / "quality"
    words = [
        "run",
        str(out),
        "--data",
        str(data),
        "--list",
        "tiny",
        "--seconds",
        "100",
        "--per-gpu",
        "2",
        "--gpus",
        "0",
        "--collect",
        str(small),
    ]
    assert main(words) == 0, capfd.readouterr().out
    assert "2 of 2 runs finished" in capfd.readouterr().out
    assert main(words) == 0
    assert "0 of 2 runs to do" in capfd.readouterr().out

    collected = {path.name: path.read_bytes() for path in small.iterdir()}
    assert main(["collect", str(out), "--to", str(small)]) == 0
    assert {path.name: path.read_bytes() for path in small.iterdir()} == collected
    # A run that was begun anew, elsewhere, does not take the place of one that went further.
    shutil.copytree(out / "tiny_dqt_ternary_1e-3", tmp_path / "anew" / "tiny_dqt_ternary_1e-3")
    (tmp_path / "anew" / "tiny_dqt_ternary_1e-3" / "summary.json").unlink()
    assert main(["collect", str(tmp_path / "anew"), "--to", str(small)]) == 0
    assert {path.name: path.read_bytes() for path in small.iterdir()} == collected
    runs = {path.stem: json.loads(path.read_text()) for path in small.glob("*.json")}
    assert set(runs) == {run.name for run in LISTS["tiny"]()}
    for run in runs.values():
        assert run["finished"] and run["tokens"] == run["planned_tokens"] == 12 * SIZES["tiny"].tokens_per_step
        assert [tokens for tokens, _ in run["valid"]] == [step * 128 for step in (2, 4, 6, 8, 10, 12)]
    ternary, plain = runs["tiny_dqt_ternary_1e-3"], runs["tiny_none_2e-3"]
    assert ternary["bytes_are"] == "measured" and 8.25 <= ternary["bytes_per_linear_weight"] < 8.5
    assert plain["bytes_are"] == "counted" and plain["bytes_per_linear_weight"] == 14
    assert len(ternary["train"]["flip_rate"]) == len(ternary["train"]["tokens"])
    assert ternary["text"]["sha256"] == json.loads((data / "text.json").read_text())["sha256"]

    # A run that was stopped is named, and compared with nothing. Another length has a section of its own.
    stopped = ternary | {"name": "stopped", "finished": False, "valid": [], "recipe": "stopped recipe"}
    (small / "stopped.json").write_text(json.dumps(stopped))
    (small / "longer.json").write_text(json.dumps(plain | {"name": "longer", "planned_tokens": 10**9}))
    shutil.rmtree(out)
    assert main(["page", str(small)]) == 0
    text = small.with_suffix(".md").read_text()
    assert "stopped at" in text and text.count("stopped recipe") == 0 and text.count("\n## ") == 2
    assert f"{ternary['valid'][-1][1]:.4f}" in text and "No other rate has finished." in text
    for plot in ("curves", "rates", "frontier"):
        assert f"(quality/tiny_0M_{plot}.png)" in text and (small / f"tiny_0M_{plot}.png").stat().st_size > 1000


def test_every_run_of_the_lists_is_a_valid_config() -> None:
    for runs in (LISTS["S"](), [Run("M", method, 1e-3) for method in METHODS]):
        assert len({run.name for run in runs}) == len(runs)
        for run in runs:
            config = load_config(CONFIG, [*run.all_settings("data"), "checkpoint.dir=out"])
            assert config.optimizer.low_bit_learning_rate == run.rate
            assert config.training.global_batch_size * config.model.seq_length == 65536
    first = LISTS["S"]()[0]
    assert first.name == "S_none_2e-3" and first.num_steps * 65536 == 300_023_808


def test_names_of_rates() -> None:
    assert [short(rate) for rate in (2.5e-4, 1e-3, 1.5e-3, 0.02)] == ["2.5e-4", "1e-3", "1.5e-3", "2e-2"]


def test_a_run_asked_for_with_other_text_is_refused(data: Path, tmp_path: Path) -> None:
    run = LISTS["tiny"]()[0]
    (tmp_path / run.name).mkdir()
    begun = {"run": run.facts(), "own_settings": run.own_settings(), "text": {"sha256": "another"}}
    (tmp_path / run.name / "run.json").write_text(json.dumps(begun))
    with pytest.raises(SystemExit, match="begun with another text"):
        main(["run", str(tmp_path), "--data", str(data), "--list", "tiny", "--seconds", "9", "--gpus", "0"])


def test_a_list_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    words = ["run", str(tmp_path), "--data", str(tmp_path), "--list", str(path), "--seconds", "9", "--dry-run"]
    for item, complaint in (
        ({"size": "S", "method": "dqt9", "rate": 1e-3}, "method 'dqt9'"),
        ({"size": "S", "method": "dqt4", "rat": 1e-3}, "rat"),
        ({"size": "S", "method": "dqt4", "rate": 1e-3, "settings": ["training.seed=1"]}, "no label"),
    ):
        path.write_text(json.dumps([item]))
        with pytest.raises(SystemExit, match=complaint):
            main(words)
    path.write_text(json.dumps([{"size": "S", "method": "dqt4", "rate": 1e-3, "seed": 2}]))
    assert main(words) == 0
