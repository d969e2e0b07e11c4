"""The weights of a checkpoint as exports see them: codes of every method, and ternary rounding of n-bit codes."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.data.indexed import IndexedWriter, encode_documents
from dqt_dist.data.tokenizer import load_tokenizer
from dqt_dist.export.perplexity import held_out_windows
from dqt_dist.export.weights import Weights
from tests.export.conftest import Trained, convert
from tests.export.test_hf import BITNET, EMBEDDINGS, NONE, SUB_NORM, bits
from tests.small import small_config


@pytest.mark.parametrize("overrides", [(), (bits(4),), (bits(8),), (EMBEDDINGS,)], ids=str)
def test_matrices_are_scale_times_code_on_the_grid(trained: Trained, overrides: tuple[str, ...]) -> None:
    weights = Weights(CheckpointReader(trained(*overrides)))
    for name, shape in weights.linears.items():
        codes, scale = weights.codes(name)
        assert codes.shape == shape and codes.dtype == torch.int8 and scale.shape == ()
        assert weights.grid.qmin <= codes.min() < 0 < codes.max() <= weights.grid.qmax
        assert torch.equal(weights.matrix(name), codes.float() * scale) and scale == weights.scale(name)
    for name, shape in weights.parameters.items():
        assert weights.parameter(name).shape == shape


def test_bitnet_codes_are_those_of_the_paper(trained: Trained) -> None:
    """round(W / mean|W|) in double precision; a weight within fp32 noise of a half may land on the other side."""
    weights = Weights(CheckpointReader(trained(BITNET)))
    for name in weights.linears:
        master = weights.master(name).double()
        codes, scale = weights.codes(name)
        mean = master.abs().mean()
        assert float((scale - mean).abs() / mean) < 1e-6
        assert float(((master / mean).round().clamp(-1, 1) != codes).double().mean()) < 1e-4


def test_every_tensor_of_the_model_is_exported(trained: Trained) -> None:
    """Exports go through all names of the checkpoint but those of the moments."""
    for overrides in ((), (SUB_NORM,), (NONE,), (EMBEDDINGS,)):
        reader = CheckpointReader(trained(*overrides))
        stored = {name.split("/", 1)[1] for name in reader.tensors if name.split("/")[0] in ("codes", "parameter")}
        weights = Weights(reader)
        assert stored == {*weights.linears, *weights.parameters}


# ---- ternary inference of n-bit models ----


@pytest.mark.parametrize("number", [3, 8])
def test_ternary_rounding_is_absmean_of_the_weights(trained: Trained, number: int) -> None:
    reader = CheckpointReader(trained(bits(number)))
    plain, ternary = Weights(reader), Weights(reader, ternary=True)
    assert ternary.grid.bits == ternary.config.quantization.bits == "ternary" and plain.grid.bits == number
    for name in plain.linears:
        weight = plain.matrix(name).double()
        codes, scale = ternary.codes(name)
        mean = weight.abs().mean()
        assert float(scale) == pytest.approx(float(mean), rel=1e-6)
        assert torch.equal(codes, (weight / mean).round().clamp(-1, 1).to(torch.int8))


def test_ternary_export_tells_both_perplexities(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out"
    assert convert("--checkpoint", trained(bits(8)), "--output", output, "--bits", "ternary") == 0
    told = capsys.readouterr().out
    assert "with the 8-bit weights" in told and "with ternary ones" in told
    assert json.loads((output / "config.json").read_text())["quantization_config"]["quant_method"] == "bitnet"
    figures = json.loads((output / "dqt_dist.json").read_text())["figures"]
    assert figures["rounded_from_bits"] == 8
    # Rounding weights of an almost untrained model moves the perplexity a little.
    before, after = figures["perplexity_with_8_bit_weights"], figures["perplexity_with_ternary_weights"]
    assert before != after and 0.3 < before / after < 3


def test_ternary_of_a_ternary_model_is_itself(trained: Trained) -> None:
    reader = CheckpointReader(trained())
    weights = Weights(reader, ternary=True)
    assert not weights.ternarize and torch.equal(
        weights.codes("layers.0.mlp.up_proj")[0], Weights(reader).codes("layers.0.mlp.up_proj")[0]
    )


def test_perplexity_is_measured_on_the_validation_data_where_it_is(tokenizer_file: Path, tmp_path: Path) -> None:
    """Whole windows of the documents one after the other, end marks included; the built-in text without the files."""
    tokenizer = load_tokenizer(tokenizer_file)
    texts = list(topics.values())[40:44]
    writer = IndexedWriter(tmp_path / "valid", tokenizer, request="tests")
    for batch in encode_documents(texts, tokenizer_file, workers=1):
        writer.add_batch(batch)
    writer.finish()
    config = small_config(f'data.valid=[{{"path": "{tmp_path}/valid"}}]')
    windows, where = held_out_windows(config, tokenizer)
    stream = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eod_id]]
    assert windows.shape == (16, 17) and windows.flatten().tolist() == stream[: 16 * 17] and "valid" in where
    windows, where = held_out_windows(small_config(), tokenizer)
    assert windows.shape == (1, 17) and where == "the built-in text"
