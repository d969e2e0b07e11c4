"""A tokenizer.json for documents: which token ends one, what of the file takes effect, what is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer

from dqt_dist.data.indexed import encode_documents, text_loss
from dqt_dist.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from dqt_dist.data.tokenizer_json import JsonTokenizer
from dqt_dist.errors import UserError
from tests.data.test_tokenizer import AWKWARD
from tests.json_tokenizers import GPT2_END, MAKERS, special, t5, write

Values = dict[str, Any]
Load = Callable[..., JsonTokenizer]


@pytest.fixture(scope="module")
def made(documents: list[str]) -> dict[str, Values]:
    return {name: make(documents[:20]) for name, make in MAKERS.items()}


@pytest.fixture
def load(made: dict[str, Values], tmp_path: Path) -> Load:
    """load(name, change=None, end_of_text=None, **beside): the tokenizer of a file changed by `change(values)`, with
    JSON files beside it."""

    def loaded(
        name: str, change: Callable[[Values], object] = lambda _: None, end_of_text: str | None = None, **beside: object
    ) -> JsonTokenizer:
        values = copy.deepcopy(made[name])
        change(values)
        for file, content in beside.items():
            (tmp_path / f"{file}.json").write_text(json.dumps(content))
        tokenizer = load_tokenizer(write(tmp_path / "tokenizer.json", values), end_of_text)
        assert isinstance(tokenizer, JsonTokenizer)
        return tokenizer

    return loaded


# ---- text and ids ----


@pytest.mark.parametrize("name", MAKERS)
def test_decode_gives_back_what_was_encoded(load: Load, documents: list[str], name: str) -> None:
    tokenizer = load(name)
    texts = [*AWKWARD, *documents[:5]]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert min(ids) >= 0 and max(ids) < tokenizer.vocab_size
    batch = tokenizer.encode_batch(texts)
    assert batch == [tokenizer.encode(text) for text in texts]
    assert tokenizer.decode_batch(batch) == texts
    loss = text_loss(tokenizer, texts, batch)
    assert loss.largest_share == 0 and loss.tokens == sum(map(len, batch))


@pytest.mark.parametrize("name", MAKERS)
def test_the_text_of_a_special_token_is_text(load: Load, made: dict[str, Values], name: str) -> None:
    tokenizer = load(name)
    special_ids = {token["id"] for token in made[name]["added_tokens"]}
    for token in made[name]["added_tokens"]:
        text = f"a{token['content']} b {token['content']}"
        ids = tokenizer.encode(text)
        assert not special_ids & set(ids) and tokenizer.decode(ids) == text
        # Negative control: the library, left alone, finds them.
        assert special_ids & set(FastTokenizer.from_str(json.dumps(made[name])).encode(text).ids)
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eod_id]) == "a"


def test_marks_of_a_unigram_model_are_no_text(documents: list[str], tmp_path: Path) -> None:
    values = t5(documents[:20])
    tokenizer = load_tokenizer(write(tmp_path / "tokenizer.json", values))
    text = "the end </s> of<unk></s> it"
    ids = tokenizer.encode(text)
    assert tokenizer.eod_id == 1 and tokenizer.unknown_id == 2
    assert tokenizer.decode(ids) == text and not {0, 1, 2} & set(ids)
    (tmp_path / "form").write_bytes(tokenizer.model)
    assert load_tokenizer(tmp_path / "form").model == tokenizer.model
    # Negative control: with the scores as they are the library takes the marks.
    library = FastTokenizer.from_str(json.dumps(values))
    library.encode_special_tokens = True
    assert 1 in library.encode(text).ids


def test_a_token_that_is_not_special_is_found_in_text_unless_it_ends_documents(load: Load) -> None:
    def add(values: Values) -> None:
        values["added_tokens"] += [special("<x>", 400, special=False), special("<y>", 401, special=False)]

    tokenizer = load("gpt2", add, "<x>")
    ids = tokenizer.encode("a<x>b<y>")
    assert tokenizer.eod_id == 400 and 400 not in ids and ids[-1] == 401
    assert tokenizer.decode([*ids, 400]) == "a<x>b<y>"


def test_what_is_not_about_text_and_ids_has_no_effect(load: Load) -> None:
    def settings(values: Values) -> None:
        values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        values["padding"] = {
            "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
            "pad_token": GPT2_END,
        }  # fmt: skip
        values["model"]["dropout"] = 0.5

    text = "the cat sat on the mat and looked at the other documents"
    plain, changed = load("gpt2"), load("gpt2", settings)
    assert all(changed.encode(text) == plain.encode(text) for _ in range(5))
    assert changed.encode_batch([text, "a"]) == plain.encode_batch([text, "a"])
    assert changed.model == plain.model
    # Negative control: the library, left alone, pads and cuts.
    assert len(FastTokenizer.from_str(changed.path.read_text()).encode(text).ids) == 50


def test_workers_make_the_same_tokens_in_any_number(load: Load, documents: list[str], monkeypatch) -> None:
    monkeypatch.setattr("dqt_dist.data.indexed._BATCH_CHARACTERS", 20_000)
    tokenizer = load("llama3")
    one, three = (
        [b.ids.tolist() for b in encode_documents(documents, tokenizer.path, workers=workers)] for workers in (1, 3)
    )
    assert len(one) > 3 and one == three
    assert one[0][-1] == tokenizer.eod_id


# ---- the one form ----


@pytest.mark.parametrize("name", MAKERS)
def test_the_form_of_the_form_is_the_form(load: Load, tmp_path: Path, name: str) -> None:
    tokenizer = load(name)
    kept = tmp_path / "kept" / "any_name"
    kept.parent.mkdir()
    kept.write_bytes(tokenizer.model)
    again = load_tokenizer(kept)
    assert (again.model, again.sha256, again.eod_id) == (tokenizer.model, tokenizer.sha256, tokenizer.eod_id)
    # A file beside it changes nothing: the form says itself what ends a document.
    (kept.parent / "tokenizer_config.json").write_text('{"eos_token": "<other>"}')
    assert load_tokenizer(kept).model == tokenizer.model
    # transformers and others can read it.
    assert FastTokenizer.from_file(str(kept)).encode("a").ids == [*tokenizer.encode("a"), tokenizer.eod_id]


def test_the_form_does_not_depend_on_how_json_is_written(load: Load, made: dict[str, Values], tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("\n" + json.dumps(made["gpt2"]))
    assert load_tokenizer(tmp_path / "other.json").sha256 == load("gpt2").sha256


# ---- the token that ends a document ----


def two_ends(values: Values) -> None:
    values["added_tokens"] += [special("</s>", 400), special("<|im_end|>", 401)]


def no_usual_end(values: Values) -> None:
    text = json.dumps(values).replace(GPT2_END, "<stop>")
    values.clear()
    values.update(json.loads(text))


def ends_by_template(values: Values) -> None:
    """T5's post-processor."""
    two_ends(values)
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [401], "tokens": ["<|im_end|>"]}},
    }


ENDS: dict[str, tuple[Callable[[Values], object], dict[str, object], str]] = {
    "only usual one": (lambda _: None, {}, GPT2_END),
    "config": (two_ends, {"tokenizer_config": {"eos_token": "</s>"}}, "</s>"),
    "config, an object": (two_ends, {"tokenizer_config": {"eos_token": {"content": "</s>"}}}, "</s>"),
    "config without": (two_ends, {"tokenizer_config": {"eos_token": None}, "generation_config": {}}, ""),
    "config before map": (
        two_ends,
        {"tokenizer_config": {"eos_token": "</s>"}, "special_tokens_map": {"eos_token": "<|im_end|>"}},
        "</s>",
    ),
    "map": (two_ends, {"special_tokens_map": {"eos_token": "<|im_end|>"}}, "<|im_end|>"),
    "generation": (two_ends, {"generation_config": {"eos_token_id": 401}}, "<|im_end|>"),
    "generation, one of a list": (two_ends, {"generation_config": {"eos_token_id": [401]}}, "<|im_end|>"),
    "generation, two": (two_ends, {"generation_config": {"eos_token_id": [400, 401]}}, ""),
    "template before all": (ends_by_template, {"tokenizer_config": {"eos_token": "</s>"}}, "<|im_end|>"),
    "two usual ones": (two_ends, {}, ""),
    "no usual one": (no_usual_end, {}, ""),
    "no usual one, named": (no_usual_end, {"tokenizer_config": {"eos_token": "<stop>"}}, "<stop>"),
}


@pytest.mark.parametrize("name", ENDS)
def test_end_of_a_document_is_what_the_file_and_its_neighbours_say(load: Load, name: str) -> None:
    change, beside, wanted = ENDS[name]
    if wanted:
        tokenizer = load("gpt2", change, **beside)
        assert tokenizer.piece(tokenizer.eod_id) == wanted
        return
    with pytest.raises(UserError, match="cannot tell which token ends a document") as refusal:
        load("gpt2", change, **beside)
    assert "--end-of-text of tools/prepare_data.py" in str(refusal.value)
    end = "<stop>" if change is no_usual_end else "</s>"
    named = load("gpt2", change, end, **beside)
    assert named.piece(named.eod_id) == end


def test_the_given_end_goes_before_all_and_stays_in_the_form(load: Load, tmp_path: Path) -> None:
    tokenizer = load("gpt2", ends_by_template, "</s>", tokenizer_config={"eos_token": "<|im_end|>"})
    assert tokenizer.eod_id == 400
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.model)
    assert load_tokenizer(tmp_path / "tokenizer.json").eod_id == 400


def test_an_end_that_the_file_does_not_have_is_refused_with_what_names_it(load: Load, documents, tmp_path) -> None:
    for given, beside, where in (
        ("<none>", {}, "--end-of-text names '<none>'"),
        ("the", {}, "--end-of-text names 'the'"),
        (None, {"tokenizer_config": {"eos_token": "<none>"}}, "tokenizer_config.json names '<none>'"),
        (None, {"tokenizer_config": {}, "generation_config": {"eos_token_id": 999}}, "_config.json names 'id 999'"),
    ):
        with pytest.raises(UserError, match=re.escape(where)) as refusal:
            load("gpt2", two_ends, given, **beside)
        assert "none of its special tokens '<|endoftext|>', '</s>', '<|im_end|>'" in str(refusal.value)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not JSON"):
        load("gpt2")


# ---- what is refused ----


def word_level(values: Values) -> None:
    """A model that knows whole words, and the mark as one of them."""
    values["model"] = {"type": "WordLevel", "vocab": {GPT2_END: 0, "a": 1, "[UNK]": 2}, "unk_token": "[UNK]"}
    values["pre_tokenizer"] = {"type": "WhitespaceSplit"}


def same_ids(values: Values) -> None:
    vocabulary = values["model"]["vocab"]
    vocabulary["b"] = vocabulary["a"]


def broken_rules(values: Values) -> None:
    """Which the library reads, and panics of in use."""
    values["pre_tokenizer"] = {"type": "FixedLength", "length": 0}


REFUSED: dict[str, tuple[Callable[[Values], object], str]] = {
    "no model": (lambda v: v.pop("model"), 'not a tokenizer.json of Hugging Face: it has no "model"'),
    "unknown model": (lambda v: v["model"].update(type="Own"), "the library `tokenizers` cannot use it"),
    "wrong type": (lambda v: v["model"].update(vocab=[]), "the library `tokenizers` cannot use it"),
    "no tokens": (
        lambda v: v.update(added_tokens=[], model=v["model"] | {"vocab": {}, "merges": []}),
        "its vocabulary is empty",
    ),
    "same ids": (same_ids, "have the same id"),
    "large id": (lambda v: v["model"]["vocab"].update(zzzz=2**31), "holds token id 2147483648; ids must be below"),
    "other id": (lambda v: v["added_tokens"].append(special("<x>", 999)), "'<x>' has id 999, but the library"),
    "no decoder": (lambda v: v.update(decoder=None), "its decoder (none) is not one whose tokens have bytes"),
    "word pieces": (
        lambda v: v.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
        "its decoder (WordPiece) is not one",
    ),
    "end in text": (word_level, "has the id 0 of <|endoftext|>, which has to end documents and nothing else"),
    "panic": (broken_rules, "the library `tokenizers` cannot use it (chunk size must be non-zero)"),
    "bad merge": (lambda v: v["model"]["merges"].append(["zq", "qz"]), "Token `zq` out of vocabulary"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_used_is_one_message(load: Load, capfd, tmp_path: Path, name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(UserError) as refusal:
        load("gpt2", change)
    assert str(refusal.value).startswith(f"tokenizer {tmp_path / 'tokenizer.json'}: ") and message in str(refusal.value)
    assert capfd.readouterr().err == ""  # not a word of the library's own


def test_the_content_decides_and_not_the_name(load: Load, prepared, tmp_path: Path) -> None:
    tokenizer = load("gpt2")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    assert load_tokenizer(tmp_path / "tokenizer.model").sha256 == tokenizer.sha256
    tokenizer.path.write_bytes(prepared.tokenizer.model)
    assert isinstance(load_tokenizer(tokenizer.path), SentencePieceTokenizer)
    with pytest.raises(UserError, match=r"--end-of-text x: .* is a SentencePiece model, which names its own \(</s>\)"):
        load_tokenizer(tokenizer.path, "x")
    # A model whose first piece has 123 bytes begins with a line end and a brace.
    (tmp_path / "odd.model").write_bytes(b"\n{\n\x74" + b"x" * 116 + b"\x15\0\0\0\0")
    with pytest.raises(UserError, match="neither a SentencePiece"):
        load_tokenizer(tmp_path / "odd.model")


def test_unknown_tokens_are_counted_as_for_sentencepiece(load: Load) -> None:
    def without_bytes(values: Values) -> None:
        values["model"]["byte_fallback"] = False

    tokenizer = load("llama2", without_bytes)
    text = "the \u4f60 cat"
    loss = text_loss(tokenizer, [text], tokenizer.encode_batch([text]))
    assert tokenizer.unknown_id == 0 and loss.unknown_tokens == 1 and loss.lost_characters == 1
    assert "\u4f60" in loss.example
