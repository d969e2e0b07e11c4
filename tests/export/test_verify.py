"""The tool's own verification: a right export passes; each known kind of wrong export is found and told in numbers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dqt_dist.export import bitnet, compressed, gguf_file, hf, verify
from dqt_dist.export.errors import VerificationError
from dqt_dist.export.verify import Bound, compare, eight_bit_bound
from tests.export.conftest import Trained, convert
from tests.export.test_hf import FREE_SCALE, bits

VERIFICATION_FAILED = 1


@pytest.mark.parametrize(
    ("export_format", "overrides", "numbers"),
    [
        ("hf", (), ["activations none: logits differ by at most"]),
        ("hf-bitnet", (), ["activations int8: logits differ by at most"]),
        ("hf-compressed", (bits(4),), ["activations none: logits", "as its format says: logits", "int8: logits"]),
        ("gguf", (), ["transformers (GGUF as floats)", "activations none: logits"]),
        ("hf", (FREE_SCALE,), ["no powers of two are rounded to the precision of the file"]),
    ],
)
def test_a_right_export_passes_and_tells_its_numbers(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture, export_format: str, overrides: tuple, numbers: list
) -> None:
    output = tmp_path / "out"
    arguments = ("--format", export_format, "--dtype", "bf16")
    assert convert("--checkpoint", trained(*overrides), "--output", output, *arguments) == 0
    told = capsys.readouterr().out
    assert all(number in told for number in numbers), told
    assert output.is_dir() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_products_are_bit_equal_with_power_of_two_scales(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tolerance for the packed linears of transformers. With free scales, the control, the last bit may differ."""
    monkeypatch.setattr(verify, "LINEAR_BOUND", 0.0)
    assert convert("--checkpoint", trained(), "--output", tmp_path / "out", "--format", "hf-bitnet") == 0
    free = ("--checkpoint", trained(FREE_SCALE), "--output", tmp_path / "free", "--format", "hf-bitnet")
    assert convert(*free) == VERIFICATION_FAILED


def inverted_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale of autobitlinear, which multiplies, in a file for bitlinear, which divides."""
    entries = bitnet.entries

    def wrong(weights: Any) -> list:
        return [
            e if "scale" not in e.name else type(e)(e.name, e.shape, e.dtype, lambda e=e: 1 / e.make())
            for e in entries(weights)
        ]

    monkeypatch.setattr(bitnet, "entries", wrong)


def neighbouring_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four neighbouring rows in a byte instead of four blocks of rows."""
    pack = bitnet.pack_rows

    def wrong(codes: Tensor) -> Tensor:
        return pack(codes.view(-1, 4, codes.shape[1]).transpose(0, 1).reshape(codes.shape))

    monkeypatch.setattr(bitnet, "pack_rows", wrong)


def gate_for_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of gate_proj and up_proj exchanged."""
    key = hf.key

    def wrong(name: str, kind: str = "weight") -> str:
        swapped = name.replace("gate_", "x_").replace("up_", "gate_").replace("x_", "up_")
        return key(swapped, kind)

    monkeypatch.setattr(hf, "key", wrong)


def unsigned_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two's complement instead of code + 2^(n-1)."""
    pack = compressed.pack_words
    monkeypatch.setattr(compressed, "pack_words", lambda codes, bits: pack(codes ^ -(1 << (bits - 1)), bits))


def coarse_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of 4 bits in place of 8."""
    config = compressed.quantization_config

    def wrong(weights: Any) -> dict[str, Any]:
        found = config(weights)
        found["config_groups"]["group_0"]["input_activations"]["num_bits"] = 4
        return found

    monkeypatch.setattr(compressed, "quantization_config", wrong)


def rotary_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of q and k in Hugging Face's order."""
    monkeypatch.setattr(gguf_file, "swap_rotary_rows", lambda matrix, heads: matrix)


def other_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another activation function in config.json."""
    config_json = hf.config_json
    monkeypatch.setattr(hf, "config_json", lambda *args: config_json(*args) | {"hidden_act": "relu"})


def forgotten_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        hf, "parameter_entries", lambda weights, names, entries=hf.parameter_entries: entries(weights, names[:-1])
    )


@pytest.mark.parametrize(
    ("export_format", "overrides", "fault", "message"),
    [
        ("hf-bitnet", (), inverted_scale, "the engine's product differs by"),
        ("hf-bitnet", (), neighbouring_rows, "the engine's product differs by"),
        ("hf-bitnet", (), other_activation, "logits differ by at most"),
        ("hf", (), gate_for_up, "logits differ by at most"),
        ("hf", (), other_activation, "logits differ by at most"),
        ("hf", (), forgotten_tensor, "bits a weight make"),
        ("hf-compressed", (bits(4),), unsigned_fields, "logits differ by at most"),
        ("hf-compressed", (bits(4),), coarse_activations, "as its format says: logits differ by at most"),
        ("gguf", (), rotary_order, "logits differ by at most"),
    ],
)
def test_a_wrong_export_is_found_and_not_left_behind(
    trained: Trained,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    export_format: str,
    overrides: tuple,
    fault: Callable[[pytest.MonkeyPatch], None],
    message: str,
) -> None:
    fault(monkeypatch)
    arguments = ("--checkpoint", trained(*overrides), "--output", tmp_path / "out", "--format", export_format)
    assert convert(*arguments) == VERIFICATION_FAILED
    told = capsys.readouterr().err
    assert message in told and "verification failed" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("difference", [0.02, float("nan")])
def test_compare_is_loud(difference: float) -> None:
    trainer = torch.randn(1, 5, 7)
    trainer /= trainer.abs().max()
    engine = trainer.clone()
    assert compare(engine, trainer, Bound(0.01, 0.001, "none"), "same").largest == 0
    engine[0, 3, 2] += difference
    with pytest.raises(VerificationError, match=r"allowed 1\.0e-02 and 1\.0e-03"):
        compare(engine, trainer, Bound(0.01, 0.001, "none"), "one logit is off")


def test_the_bound_of_eight_bits_is_the_size_of_the_rounding() -> None:
    """Two independent roundings of one function pass; three times as large an error fails, and no error is not free."""
    exact = torch.randn(1, 200, 50)
    first, second = (exact + 0.01 * torch.randn(exact.shape) for _ in range(2))
    bound = eight_bit_bound(first, exact)
    compare(second, first, bound, "another rounding")
    with pytest.raises(VerificationError):
        compare(exact + 0.03 * torch.randn(exact.shape), first, bound, "something else")
    with pytest.raises(VerificationError):
        compare(first + 1e-6, first, eight_bit_bound(exact, exact), "no rounding at all")


def test_the_world_of_one_leaves_no_trace(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves no process group, and no variables by which a later process would take itself for one of its ranks."""
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert convert("--checkpoint", trained(), "--output", tmp_path / "out", "--format", "hf") == 0
    assert os.environ["WORLD_SIZE"] == "7" and "LOCAL_RANK" not in os.environ
    assert not torch.distributed.is_initialized()
