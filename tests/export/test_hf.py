"""Exports for transformers, loaded by transformers: the trainer's logits, whatever method, bits and layout trained
them.

The comparison is made here with transformers' own calls; that the tool's verification finds wrong exports is in
test_verify.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dqt_dist.checkpoint.reader import CheckpointReader
from dqt_dist.data.tokenizer import load_tokenizer
from dqt_dist.export.convert import Request, convert
from dqt_dist.export.verify import check_bitnet_linears, quiet_transformers, without_activations
from dqt_dist.export.weights import Weights
from tests.export.conftest import TOKENS, Exported, Trained, TrainerLogits
from tests.tolerances import Tolerance

SUB_NORM, BITNET, NONE = "model.sub_norm=true", "quantization.method=bitnet", "quantization.method=none"
FREE_SCALE, EMBEDDINGS = "quantization.scale_power_of_two=false", "quantization.embeddings=true"
FLOATS = "quantization.activation=none"

FP32 = Tolerance(1e-5, "one layer of fp32 products, sums in another order; 0 to 2e-6 was measured on two CPUs")
INT8 = Tolerance(
    2e-2, "a value within fp32 noise of the border of two int8 codes takes the other one: 1/127 of its token"
)
INT8_OF_127_5 = Tolerance(1e-1, "transformers' compressed-tensors divides by max/127.5; 4.3e-2 was measured")


def bits(number: int) -> str:
    return f"quantization.bits={number}"


@torch.no_grad()
def engine_logits(folder: Path, **load: object) -> Tensor:
    with quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **load
        )
        assert not any(info.values()), info
        return model(TOKENS).logits


def assert_far(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).abs().max() / wanted.abs().max()) > 0.1


# ---- hf ----


@pytest.mark.parametrize(
    "overrides", [(), (SUB_NORM,), (bits(4),), (NONE,), (BITNET,), (FREE_SCALE,), (EMBEDDINGS,)], ids=str
)
def test_plain_floats_have_the_logits_of_the_trainer(
    exported: Exported, trainer_logits: TrainerLogits, overrides: tuple[str, ...]
) -> None:
    found = engine_logits(exported("hf", *overrides))
    FP32.assert_close(found, trainer_logits("none", *overrides))


def test_plain_bf16_holds_power_of_two_scales_exactly(trained: Trained, exported: Exported) -> None:
    tensors = load_file(exported("hf", dtype="bf16") / "model.safetensors")
    weights = Weights(CheckpointReader(trained()))
    for name in weights.linears:
        codes, scale = weights.codes(name)
        assert tensors[f"model.{name}.weight"].dtype == torch.bfloat16
        assert torch.equal(tensors[f"model.{name}.weight"].double(), codes.double() * scale.double())


def test_layouts_export_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    """A checkpoint written by two ranks that share every matrix, against its codes put together by the reader."""
    run = trained("parallel.tensor=2", processes=2)
    convert(Request(run, tmp_path / "out", format="hf", dtype="fp32", say=lambda line: None))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    weights = Weights(CheckpointReader(run))
    assert all(torch.equal(tensors[f"model.{name}.weight"], weights.matrix(name)) for name in weights.linears)


# ---- hf-bitnet ----


@pytest.mark.parametrize("overrides", [(), (SUB_NORM,), (BITNET,), (FREE_SCALE,), (EMBEDDINGS,)], ids=str)
def test_bitnet_has_the_logits_and_products_of_the_trainer(
    trained: Trained, exported: Exported, trainer_logits: TrainerLogits, overrides: tuple[str, ...]
) -> None:
    folder = exported("hf-bitnet", *overrides)
    INT8.assert_close(engine_logits(folder), trainer_logits("int8", *overrides))
    check_bitnet_linears(folder, Weights(CheckpointReader(trained(*overrides))))


def test_other_models_have_other_logits(exported: Exported, trainer_logits: TrainerLogits) -> None:
    """Negative control: what the tests above compare depends on the weights, by far more than their tolerances."""
    assert_far(engine_logits(exported("hf", bits(4))), trainer_logits("none"))
    assert_far(engine_logits(exported("hf-bitnet", SUB_NORM)), trainer_logits("int8"))


@pytest.mark.parametrize(
    ("export_format", "overrides", "bits_a_weight"),
    [
        ("hf-bitnet", (), 2),
        ("hf-compressed", (), 2),
        ("hf-compressed", (bits(3),), 3),
        ("hf-compressed", (bits(8),), 8),
    ],
)
def test_files_have_the_size_of_the_bits(
    exported: Exported, export_format: str, overrides: tuple[str, ...], bits_a_weight: int
) -> None:
    tensors = load_file(exported(export_format, *overrides) / "model.safetensors")
    stored = sum(
        t.nbytes
        for name, t in tensors.items()
        if "_proj.weight" in name and "scale" not in name and "shape" not in name
    )
    weights = 256 * (256 + 128 + 128 + 256) + 3 * 256 * 512
    assert stored * 8 == weights * bits_a_weight


# ---- hf-compressed ----


@pytest.mark.parametrize(
    "overrides", [(), (bits(2),), (bits(3), SUB_NORM), (bits(5),), (bits(8),), (FREE_SCALE,)], ids=str
)
def test_compressed_has_the_logits_of_the_trainer(
    exported: Exported, trainer_logits: TrainerLogits, overrides: tuple[str, ...]
) -> None:
    folder = exported("hf-compressed", *overrides)
    INT8_OF_127_5.assert_close(engine_logits(folder), trainer_logits("int8", *overrides))
    weights_only = engine_logits(folder, quantization_config=None, config=_float_activations(folder))
    FP32.assert_close(weights_only, trainer_logits("none", *overrides))


def _float_activations(folder: Path) -> object:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = without_activations(folder)
    return config


def test_compressed_keeps_float_activations_of_a_model_trained_with_them(
    exported: Exported, trainer_logits: TrainerLogits
) -> None:
    FP32.assert_close(engine_logits(exported("hf-compressed", FLOATS)), trainer_logits("none", FLOATS))


# ---- what lies beside the weights ----


def test_shards_are_loaded(trained: Trained, trainer_logits: TrainerLogits, tmp_path: Path) -> None:
    output = tmp_path / "out"
    convert(
        Request(trained(), output, format="hf", dtype="fp32", verify=False, shard_bytes=600_000, say=lambda line: None)
    )
    assert len(list(output.glob("model-*-of-*.safetensors"))) > 3
    FP32.assert_close(engine_logits(output), trainer_logits("none"))


def test_generation_stops_at_the_end_mark_and_begins_without_one(exported: Exported) -> None:
    folder = exported("hf-bitnet")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        inputs = tokenizer("The list", return_tensors="pt", return_token_type_ids=False)
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert tokenizer.eos_token_id == 2 and 1 not in inputs["input_ids"]
    assert inputs["input_ids"].shape[1] < generated.shape[1] <= inputs["input_ids"].shape[1] + 4


MARKS = ("<unk>", "<s>", "</s>")


@given(
    text=st.text(
        alphabet=st.one_of(st.sampled_from("abcdef thisreturn\n\t  12<>/"), st.characters(exclude_categories=["Cs"]))
    )
)
def test_any_text_has_the_ids_of_sentencepiece(exported: Exported, tokenizer_file: Path, text: str) -> None:
    """Any text but the marks themselves, which Hugging Face reads as marks.

    NUL ends a text for SentencePiece's Python package.
    """
    if "\0" in text or any(mark in text for mark in MARKS):
        return
    tokenizer, exported_tokenizer = _tokenizers(exported("hf"), tokenizer_file)
    ids = tokenizer.encode(text)
    assert exported_tokenizer(text)["input_ids"] == ids
    assert exported_tokenizer.decode(ids, skip_special_tokens=True) == text


_loaded: dict[Path, tuple] = {}


def _tokenizers(folder: Path, model: Path) -> tuple:
    if folder not in _loaded:
        _loaded[folder] = load_tokenizer(model), AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    return _loaded[folder]


def test_model_card_and_record_say_what_was_trained(exported: Exported) -> None:
    folder = exported("hf-compressed", bits(3))
    card = (folder / "README.md").read_text()
    assert "3-bit codes" in card and "384 tokens in 2 steps" in card and "hf-compressed" in card
    record = json.loads((folder / "dqt_dist.json").read_text())
    assert record["config"]["model"]["hidden_size"] == 256 and record["bits"] == 3
    assert len(record["scales"]) == 7 and all(scale > 0 for scale in record["scales"].values())


def test_one_matrix_at_a_time(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export keeps nothing that it has read: no two matrices are alive at once."""
    import weakref

    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    read = CheckpointReader.read

    def counted(self: CheckpointReader, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        if tensor.numel() > 1:
            alive.add(tensor)
            most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(CheckpointReader, "read", counted)
    convert(Request(trained(), tmp_path / "out", format="hf", verify=False, say=lambda line: None))
    assert most == 1
