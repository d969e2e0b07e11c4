"""A run's tokenizer.json, exported: transformers and llama.cpp give its ids, and what GGUF cannot express is refused.

llama.cpp itself runs where it is installed (the tests marked gguf); its keys are read independently in any case.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig

from dqt_dist.data.tokenizer import load_tokenizer
from dqt_dist.data.tokenizer_json import JsonTokenizer
from dqt_dist.errors import UserError
from dqt_dist.export.convert import HF_FORMATS
from dqt_dist.export.errors import VerificationError
from dqt_dist.export.gguf_file import FILE
from dqt_dist.export.gguf_tokenizer import gguf_tokenizer
from dqt_dist.export.sentencepiece_model import SPACE, PieceKind
from dqt_dist.export.text import SAMPLE
from dqt_dist.export.token_bytes import ByteCounter, TextStream
from dqt_dist.export.tokenizer_check import check_gguf, check_hf, hard_strings
from dqt_dist.export.tokenizer_json_model import TokenizerJsonModel
from dqt_dist.export.tokenizer_model import read_tokenizer, refuse
from tests import json_tokenizers
from tests.export.test_tokenizers import ROWS, gguf_file, hf_folder
from tests.json_tokenizers import MAKERS, special, t5
from tests.json_tokenizers import write as write_json

TEXTS = list(topics.values())[:40]
BYTE_LEVEL = {"gpt2": "gpt-2", "llama3": "llama-bpe"}
ANY_TEXT = st.text(
    alphabet=st.one_of(st.sampled_from("abcdef thisreturn'LS\n\t\r  12<|>"), st.characters(exclude_categories=["Cs"]))
)
Make = Callable[..., TokenizerJsonModel]


@pytest.fixture(scope="module")
def files() -> dict[str, dict[str, Any]]:
    """The values of each kind of file; a user-defined token in all of them."""
    made = {name: make(TEXTS) for name, make in MAKERS.items()}
    for values in made.values():
        vocabulary = {*values["model"]["vocab"].values(), *(token["id"] for token in values["added_tokens"])}
        values["added_tokens"].append(special("<tool>", max(vocabulary) + 1, special=False))
    return made


@pytest.fixture
def make(files: dict[str, dict[str, Any]], tmp_path: Path) -> Make:
    """make(name, change=None): the model of a file, changed by `change(values)`."""

    def read(name: str, change: Callable[[dict[str, Any]], object] = lambda _: None) -> TokenizerJsonModel:
        values = copy.deepcopy(files[name])
        change(values)
        model = read_tokenizer(load_tokenizer(write_json(tmp_path / "given" / "tokenizer.json", values)))
        assert isinstance(model, TokenizerJsonModel)
        return model

    return read


# ---- bytes ----


@pytest.mark.parametrize("name", MAKERS)
def test_bytes_of_tokens_are_those_of_the_text(make: Make, name: str) -> None:
    model = make(name)
    tokenizer = load_tokenizer(model.path)
    assert isinstance(tokenizer, JsonTokenizer)
    stream = TextStream(tokenizer)
    for text in [*hard_strings(model), *TEXTS[:3]]:
        ids, shown = model.encode(text), TextStream(tokenizer)
        decoded = tokenizer.decode(ids)
        assert "".join(map(shown.put, ids)) + shown.end() == decoded
        assert ByteCounter(tokenizer).count(np.array([tokenizer.eod_id, *ids])) == len(decoded.encode()), text
        # Llama 2's file puts a space before every part, also behind a token that is cut out.
        if name != "llama2" or "<tool>" not in text:
            assert decoded == (text if tokenizer.byte_level else text.replace(SPACE, " "))  # as SentencePiece does
    assert stream.put(tokenizer.eod_id) == stream.put(tokenizer.vocab_size) == ""


# ---- Hugging Face ----


@pytest.mark.parametrize("name", MAKERS)
def test_transformers_has_the_ids_and_the_end(make: Make, tmp_path: Path, name: str) -> None:
    model = make(name)
    for export_format in HF_FORMATS:
        refuse(model, export_format)
    folder = tmp_path / "export"
    folder.mkdir()
    assert "transformers gives the tokenizer.json's ids" in check_hf(hf_folder(model, folder), model)
    exported = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    for text in TEXTS[:5]:
        assert exported(text)["input_ids"] == model.encode(text)
    assert exported.eos_token_id == model.eos_id and len(exported) == model.num_pieces
    assert exported.unk_token_id == model.unk_id
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == model.eos_id
    # Read again by us, the export is the same tokenizer, byte for byte.
    again = load_tokenizer(folder / "tokenizer.json")
    assert again.model == load_tokenizer(model.path).model


def test_another_file_in_the_export_is_found(make: Make, tmp_path: Path) -> None:
    """Negative control: transformers adds what the post-processor of Llama 3 adds."""
    model = make("llama3")
    hf_folder(model, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(model.path.read_bytes())
    with pytest.raises(VerificationError, match=r"transformers gives other ids than the tokenizer\.json"):
        check_hf(tmp_path, model)


def test_a_unigram_model_goes_to_hugging_face(tmp_path: Path) -> None:
    model = read_tokenizer(load_tokenizer(write_json(tmp_path / "given" / "tokenizer.json", t5(TEXTS, 500))))
    folder = tmp_path / "export"
    folder.mkdir()
    check_hf(hf_folder(model, folder), model)
    with pytest.raises(UserError, match="its model is Unigram, not byte-level BPE"):
        refuse(model, "gguf")


# ---- GGUF ----


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_gguf_keys_have_the_ids_and_the_end(make: Make, tmp_path: Path, name: str) -> None:
    model = make(name)
    refuse(model, "gguf")
    path = gguf_file(model, tmp_path / FILE)
    assert "the tokenizer.json's ids on" in check_gguf(path, model)
    tokenizer = gguf_tokenizer(path)
    for text in TEXTS[:5]:
        assert tokenizer.encode(text) == model.encode(text)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.pre"].contents() == BYTE_LEVEL[name]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == fields["tokenizer.ggml.bos_token_id"].contents()
    assert fields["tokenizer.ggml.eos_token_id"].contents() == model.eos_id
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert len(kinds) == ROWS and kinds[-1] == PieceKind.UNUSED
    assert kinds[model.eos_id] == PieceKind.CONTROL and kinds[model.num_pieces - 1] == PieceKind.USER_DEFINED


def test_merges_of_another_order_are_found(make: Make, tmp_path: Path) -> None:
    """Negative control."""
    model = make("gpt2")
    path = gguf_file(model, tmp_path / FILE, merges=[" ".join(pair) for pair in model.merges[::-1]])
    with pytest.raises(VerificationError, match=r"GGUF keys gives other ids than the tokenizer\.json"):
        check_gguf(path, model)


def add(content: str, **fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda v: v["added_tokens"].append(
        special(content, v["added_tokens"][-1]["id"] + 1, special=False, **fields)
    )


def unreachable(values: dict[str, Any]) -> None:
    values["model"]["vocab"]["zqzqzq"] = values["added_tokens"].pop()["id"]


def a_byte_less(values: dict[str, Any]) -> None:
    vocabulary = values["model"]["vocab"]
    vocabulary["xx"] = vocabulary.pop("\u0100")


REFUSED: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "byte fallback": ("llama2", lambda _: None, "it is not byte-level BPE (the SentencePiece .model"),
    "normalizer": ("gpt2", lambda v: v.update(normalizer={"type": "NFC"}), "it has a normalizer"),
    "space before": (
        "gpt2",
        lambda v: v["pre_tokenizer"].update(add_prefix_space=True),
        "its pre-tokenizer is none of those known by llama.cpp's names 'gpt-2' and 'llama-bpe'",
    ),
    "another pattern": (
        "llama3",
        lambda v: v["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+| "),
        "its pre-tokenizer is none of those known",
    ),
    "takes spaces": (
        "gpt2",
        add("<x>", lstrip=True),
        "added tokens take spaces beside them, or are whole words: '<x",
    ),
    "overlap": ("gpt2", add("l><bcd>"), "added tokens overlap: '<tool><bcd>'"),
    "whole words": ("gpt2", lambda v: (unreachable(v), v["model"].update(ignore_merges=True)), "ignore_merges is true"),
    "a byte is missing": (
        "gpt2",
        lambda v: v["model"]["vocab"].update(xx=v["model"]["vocab"].pop("\u0100")),
        "some byt",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_gguf_cannot_express_is_refused_by_name(make: Make, name: str) -> None:
    kind, change, message = REFUSED[name]
    model = make(kind, change)
    for export_format in HF_FORMATS:
        refuse(model, export_format)
    with pytest.raises(UserError) as refusal:
        refuse(model, "gguf")
    assert message in str(refusal.value) and "use hf-bitnet, hf-compressed or hf" in str(refusal.value)


def test_words_before_merges_matter_only_where_merges_do_not_make_them(make: Make, tmp_path: Path) -> None:
    model = make("llama3", lambda v: v["model"].update(ignore_merges=False))
    refuse(model, "gguf")
    check_gguf(gguf_file(model, tmp_path / FILE), model)


# ---- llama.cpp ----


@pytest.fixture(scope="module", params=BYTE_LEVEL)
def engine(request: pytest.FixtureRequest, files: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(llama.cpp's tokenizer, ours)"""
    import llama_cpp

    folder = tmp_path_factory.mktemp("engine")
    tokenizer = load_tokenizer(write_json(folder / "tokenizer.json", files[request.param]))
    path = gguf_file(read_tokenizer(tokenizer), folder / FILE)
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    yield model, tokenizer
    model.close()


@pytest.mark.gguf
def test_llama_cpp_has_the_ids_and_the_text(engine: Any) -> None:
    model, tokenizer = engine
    for text in (SAMPLE, *TEXTS):
        ids = model.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(text)
        assert model.detokenize(ids).decode() == text
    assert model.token_eos() == tokenizer.eod_id


@pytest.mark.gguf
@given(text=ANY_TEXT)
def test_llama_cpp_has_the_ids_of_any_text(engine: Any, text: str) -> None:
    model, tokenizer = engine
    assert model.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)


@given(text=ANY_TEXT)
@pytest.mark.parametrize("name", MAKERS)
def test_any_text_comes_back(files: Any, tmp_path_factory: pytest.TempPathFactory, name: str, text: str) -> None:
    if name not in _loaded:
        path = tmp_path_factory.mktemp("any") / "tokenizer.json"
        _loaded[name] = load_tokenizer(json_tokenizers.write(path, files[name]))
    tokenizer = _loaded[name]
    ids = tokenizer.encode(text)
    wanted = text.replace(SPACE, " ") if name == "llama2" else text
    assert tokenizer.decode(ids) == wanted and tokenizer.eod_id not in ids


_loaded: dict[str, Any] = {}
