"""GGUF exports: transformers reads them and computes the trainer's logits; metadata and tokenizer are llama.cpp's."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.data.tokenizer import load_tokenizer
from dqt_dist.errors import EXIT_CODE
from dqt_dist.export import gguf_file
from dqt_dist.export.weights import Weights
from tests.export.conftest import TOKENS, Exported, Trained, TrainerLogits, convert
from tests.export.test_hf import BITNET, FP32, FREE_SCALE, NONE, SUB_NORM, bits, engine_logits
from tests.tolerances import Tolerance

PADDED = "model.ffn_hidden_size=320"
FP16_SCALES = Tolerance(2e-3, "scales that are no fp16 numbers are off by up to 2^-11")


def export(run: Path, output: Path, *arguments: str) -> gguf.GGUFReader:
    assert convert("--checkpoint", run, "--output", output, "--format", "gguf", "--no-verify", *arguments) == 0
    return gguf.GGUFReader(output / gguf_file.FILE)


def value(reader: gguf.GGUFReader, key: str) -> object:
    return reader.get_field(key).contents()


@pytest.mark.parametrize(
    ("overrides", "block"),
    [
        ((), "TQ2_0"),
        ((bits(2),), "Q4_0"),
        ((bits(4),), "Q4_0"),
        ((bits(5),), "Q5_0"),
        ((bits(6),), "Q6_K"),
        ((bits(8),), "Q8_0"),
        ((NONE,), "F32"),
        ((PADDED,), "TQ2_0"),
        ((BITNET,), "TQ2_0"),
        ((FREE_SCALE,), "TQ2_0"),
    ],
    ids=str,
)
def test_transformers_computes_the_logits_of_the_trainer(
    exported: Exported, trainer_logits: TrainerLogits, overrides: tuple[str, ...], block: str
) -> None:
    folder = exported("gguf", *overrides)
    tensors = {t.name: t for t in gguf.GGUFReader(folder / gguf_file.FILE).tensors}
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == block
    bound = FP16_SCALES if BITNET in overrides or FREE_SCALE in overrides else FP32
    bound.assert_close(engine_logits(folder, gguf_file=gguf_file.FILE), trainer_logits("none", *overrides))


def test_without_the_rotary_order_of_rows_logits_are_others(
    trained: Trained, trainer_logits: TrainerLogits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    monkeypatch.setattr(gguf_file, "swap_rotary_rows", lambda matrix, heads: matrix)
    export(trained(), tmp_path / "out")
    found, wanted = engine_logits(tmp_path / "out", gguf_file=gguf_file.FILE), trainer_logits("none")
    assert float((found - wanted).abs().max() / wanted.abs().max()) > 0.05


@pytest.mark.parametrize(
    ("block", "bits_a_weight"), [("TQ2_0", 2.0625), ("TQ1_0", 1.6875), ("Q2_0", 2.25), ("Q8_0", 8.5)]
)
def test_ternary_codes_come_back_from_every_type_that_holds_them(
    trained: Trained, tmp_path: Path, block: str, bits_a_weight: float
) -> None:
    reader = export(trained(), tmp_path / "out", "--gguf-type", block)
    tensor = next(t for t in reader.tensors if t.name == "blk.0.ffn_down.weight")
    codes, scale = Weights(CheckpointReader(trained())).codes("layers.0.mlp.down_proj")
    assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), (codes * scale).numpy())
    assert tensor.n_bytes * 8 == 256 * 512 * bits_a_weight


def test_ternary_bytes_are_those_of_the_gguf_quantiser(trained: Trained, tmp_path: Path) -> None:
    """gguf's own quantiser, given the weights as floats."""
    for block in ("TQ2_0", "TQ1_0"):
        reader = export(trained(), tmp_path / block, "--gguf-type", block)
        for tensor in reader.tensors:
            if tensor.tensor_type.name == block:
                floats = gguf.dequantize(tensor.data, tensor.tensor_type)
                assert np.array_equal(tensor.data, gguf.quantize(floats, tensor.tensor_type))


def test_metadata_and_tokenizer(exported: Exported, tokenizer_file: Path) -> None:
    reader = gguf.GGUFReader(exported("gguf", PADDED) / gguf_file.FILE)
    wanted = {
        "general.architecture": "llama",
        "general.file_type": 37,
        "general.quantization_version": 2,
        "llama.block_count": 1,
        "llama.context_length": 96,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 408,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: value(reader, key) for key in wanted} == wanted
    tokenizer = load_tokenizer(tokenizer_file)
    tokens, kinds = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    assert tokens[:400] == [tokenizer.piece(i) for i in range(400)] and len(tokens) == len(kinds) == 408
    # <unk>, two marks, 256 bytes, pieces, rows of the embedding without a piece
    assert kinds[:4] == [2, 3, 3, 6] and kinds[258:260] == [6, 1] and kinds[400:] == [5] * 8
    scores = value(reader, "tokenizer.ggml.scores")
    assert scores[259:270] == [-float(i) for i in range(11)]


def test_bf16_keeps_norms_in_fp32(trained: Trained, tmp_path: Path) -> None:
    types = {t.name: t.tensor_type.name for t in export(trained(), tmp_path / "out", "--dtype", "bf16").tensors}
    assert types["token_embd.weight"] == types["output.weight"] == "BF16"
    assert types["output_norm.weight"] == types["blk.0.attn_norm.weight"] == "F32"


# ---- what the format cannot hold ----


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        ((SUB_NORM,), (), "norms before o_proj and down_proj (model.sub_norm); use hf-bitnet, hf-compressed or hf"),
        ((bits(5),), ("--gguf-type", "Q4_0"), "holds codes from -8 to 7, this model has -16 to 15"),
        ((), ("--gguf-type", "IQ1_S"), "unknown; use one of TQ2_0, TQ1_0, Q2_0"),
        ((NONE,), ("--gguf-type", "TQ2_0"), "has no codes"),
        (
            ("model.hidden_size=96",),
            ("--gguf-type", "TQ2_0"),
            "TQ2_0 packs 256 codes of a row together, model.hidden_size is 96; use --gguf-type Q4_0",
        ),
    ],
)
def test_refusals_say_what_is_possible(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture, overrides: tuple, arguments: tuple, message: str
) -> None:
    output = tmp_path / "out"
    assert convert("--checkpoint", trained(*overrides), "--output", output, "--format", "gguf", *arguments) == EXIT_CODE
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("hidden", "block"), [(128, "Q2_0"), (96, "Q4_0")])
def test_a_width_of_no_block_of_256_goes_into_smaller_blocks(
    exported: Exported, trainer_logits: TrainerLogits, hidden: int, block: str
) -> None:
    """The feed-forward size is padded to whole blocks."""
    overrides = (f"model.hidden_size={hidden}", "model.ffn_hidden_size=208")
    folder = exported("gguf", *overrides)
    tensors = {t.name: t.tensor_type.name for t in gguf.GGUFReader(folder / gguf_file.FILE).tensors}
    assert tensors["blk.0.attn_q.weight"] == block
    FP32.assert_close(engine_logits(folder, gguf_file=gguf_file.FILE), trainer_logits("none", *overrides))


def test_padding_is_zero(trained: Trained, tmp_path: Path) -> None:
    reader = export(trained(PADDED), tmp_path / "out")
    floats = {
        t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors if "ffn_" in t.name
    }
    down: Tensor = floats["blk.0.ffn_down.weight"]
    assert down.shape == (256, 512) and not down[:, 320:].any() and bool(down[:, :320].any())
    for name in ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"):
        assert floats[name].shape == (512, 256) and not floats[name][320:].any()


def test_record_lies_beside_the_file(exported: Exported) -> None:
    folder = exported("gguf")
    assert json.loads((folder / "dqt_dist.json").read_text())["format"] == "gguf"
    assert {path.name for path in folder.iterdir()} == {"model.gguf", "README.md", "dqt_dist.json", "tokenizer.model"}
    assert TOKENS.max() < 400
