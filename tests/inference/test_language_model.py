"""The model that is evaluated and generates: the trainer's own logits, for any method, bits and layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.data.tokenizer import load_tokenizer
from dqt_dist.errors import UserError
from dqt_dist.export.trainer_model import alone, fill, world_of_one
from dqt_dist.export.weights import Weights
from dqt_dist.inference.language_model import BitNetLinear, CodeLinear, open_model
from tests.export.conftest import TOKENS, Trained, TrainerLogits
from tests.export.test_hf import BITNET, EMBEDDINGS, FLOATS, FP32, FREE_SCALE, INT8, NONE, SUB_NORM, bits

FP8 = "quantization.compute=fp8"
CASES = [(), (bits(4),), (bits(8), FLOATS), (SUB_NORM,), (FREE_SCALE,), (NONE,), (BITNET,), (EMBEDDINGS,), (FP8,)]


def activation_of(run: Path) -> str:
    return CheckpointReader(run).config.quantization.activation


@torch.no_grad()
@pytest.mark.parametrize("overrides", CASES, ids=str)
def test_logits_are_those_of_the_trainer(trained: Trained, trainer_logits: TrainerLogits, overrides: tuple) -> None:
    """Equal to the last bit on one CPU. Another CPU may add in another order, hence the tolerances."""
    run = trained(*overrides)
    opened = open_model(run)
    if EMBEDDINGS in overrides:
        # In training the head rounds its input. trainer_model does not, because exports cannot round there.
        assert opened.model.lm_head.activation_dtype is not None
        opened.model.lm_head.activation_dtype = None
    activation = activation_of(run)
    tolerance = FP32 if activation == "none" else INT8
    tolerance.assert_close(opened.model(TOKENS).logits, trainer_logits(activation, *overrides))


@torch.no_grad()
@pytest.mark.parametrize("overrides", [(), (bits(4),), (bits(8),), (FLOATS,), (BITNET,)], ids=str)
def test_a_linear_is_that_of_the_trainer(trained: Trained, overrides: tuple) -> None:
    """Inputs are equal: no rounding hides a difference. Integer sums below 2^24 are exact in fp32 on any machine.

    The control rounds activations the other way round, and its outputs are not equal.
    """
    from dqt_dist.layers.build import build_model

    run = trained(*overrides)
    weights = Weights(CheckpointReader(run))
    config = alone(weights.config, activation_of(run))
    x = torch.randint(-8, 9, (5, 1, 256)) / 8.0  # sums of floats, where they are not rounded, are exact as well
    ours = open_model(run).model.model.layers[0].self_attn.o_proj
    with world_of_one(config) as groups:
        model_chunks = build_model(config, groups)
        fill(model_chunks, weights)
        theirs: nn.Module = model_chunks[0].decoder.layers[0].self_attention.linear_proj
        wanted = theirs(x)[0]
    if BITNET in overrides:
        # Sums of scaled floats; one row of 256 products.
        FP32.assert_close(ours(x), wanted)
    else:
        assert torch.equal(ours(x), wanted)
    assert isinstance(ours, BitNetLinear if BITNET in overrides else CodeLinear)
    ours.activation_dtype = torch.int8 if ours.activation_dtype is None else None
    assert not torch.allclose(ours(x), wanted, rtol=1e-5, atol=0)


def test_bf16_computes_in_bf16_and_rotates_in_fp32(trained: Trained, trainer_logits: TrainerLogits) -> None:
    opened = open_model(trained(), dtype="bf16")
    dtypes = {parameter.dtype for parameter in opened.model.parameters()}
    assert dtypes == {torch.bfloat16} and opened.model.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        logits = opened.model(TOKENS).logits
    wanted = trainer_logits("int8")
    # bf16 keeps 8 bits: 3 % of the largest logit, measured; a wrong model is off by its size.
    assert float((logits.float() - wanted).abs().max() / wanted.abs().max()) < 0.1


def test_what_is_none_is_refused(trained: Trained, tokenizer_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        open_model(tmp_path / "none")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="which llama"):
        open_model(tmp_path)
    with pytest.raises(UserError, match="no file none"):
        open_model(trained(), tokenizer=Path("none.model"))
    assert open_model(trained(), tokenizer=tokenizer_file).tokenizer.sha256 == load_tokenizer(tokenizer_file).sha256
