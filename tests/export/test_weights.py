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
from dqt_dist.errors import EXIT_CODE
from dqt_dist.export.perplexity import held_out_windows
from dqt_dist.export.weights import Weights
from dqt_dist.lowbit.latent import codes_of_latents, codes_per_latent
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
    assert figures["trained_codes_bits"] == 8
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


# ---- runs with latents ----

LATENTS = ("quantization.latent_bits=6", "quantization.scale_refit_interval=1")


def test_codes_of_a_checkpoint_are_those_of_its_latents(trained: Trained) -> None:
    weights = Weights(CheckpointReader(trained(*LATENTS)))
    of_latents = Weights(weights.reader, of_latents=True)
    for name in weights.linears:
        (codes, scale), (latents, latent_scale) = weights.codes(name), weights.latents(name)
        ratio = codes_per_latent(scale, latent_scale, None).expand(len(codes))
        assert torch.equal(codes, codes_of_latents(latents, ratio, weights.grid)) and latents.unique().numel() > 20
        assert torch.equal(of_latents.matrix(name), latents * latent_scale)
    assert not of_latents.has_codes and of_latents.method == "none"


def test_latents_are_exported_as_plain_weights_with_both_perplexities(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """transformers computes with the latents' values, and the model card tells both perplexities."""
    output = tmp_path / "out"
    assert convert("--checkpoint", trained(*LATENTS), "--output", output, "--weights", "latent") == 0
    told = capsys.readouterr().out
    assert "with the ternary weights" in told and "with latent ones" in told
    record = json.loads((output / "dqt_dist.json").read_text())
    assert record["weights"] == "latent" and record["config"]["quantization"]["latent_bits"] == 6
    card = (output / "README.md").read_text()
    for name in ("perplexity_with_ternary_weights", "perplexity_with_latent_weights"):
        assert name.replace("_", " ") in card and record["figures"][name] > 1


@pytest.mark.parametrize("arguments", [("--weights", "latent"), ("--format", "hf-bitnet"), ("--format", "hf")], ids=str)
def test_an_export_of_latents_becomes_the_run_again(
    trained: Trained, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """From latents every bit comes back. From codes the codes come back, with the latents nearest to them."""
    run = trained(*LATENTS)
    output = tmp_path / "out"
    assert convert("--checkpoint", run, "--output", output, "--dtype", "fp32", "--no-verify", *arguments) == 0
    assert convert("--from-hf", output, "--output", tmp_path / "again") == 0
    found, wanted = Weights(CheckpointReader(tmp_path / "again")), Weights(CheckpointReader(run))
    assert found.reader.tensors.keys() == wanted.reader.tensors.keys()
    for name in wanted.linears:
        for kind in ("codes", "scale", "latent_scale"):
            assert torch.equal(found.reader.read(f"{kind}/{name}"), wanted.reader.read(f"{kind}/{name}")), (kind, name)
        equal = torch.equal(found.latents(name)[0], wanted.latents(name)[0])
        assert equal == (arguments == ("--weights", "latent"))


def test_weights_that_a_checkpoint_does_not_have_are_refused(trained: Trained, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    assert convert("--checkpoint", trained(), "--output", output, "--weights", "latent") == EXIT_CODE
    assert "has no latents" in capsys.readouterr().err
    arguments = ("--weights", "latent", "--format", "gguf")
    assert convert("--checkpoint", trained(*LATENTS), "--output", output, *arguments) == EXIT_CODE
    assert "use --format hf" in capsys.readouterr().err and not output.exists()
