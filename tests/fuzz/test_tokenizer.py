"""Any tokenizer file: it encodes and decodes within its vocabulary, or it is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from dqt_dist.data.tokenizer import load_tokenizer
from dqt_dist.errors import UserError
from dqt_dist.export.tokenizer_json_model import TokenizerJsonModel, gguf_limits
from dqt_dist.export.tokenizer_model import read_tokenizer
from tests.fuzz.conftest import TEXTS
from tests.fuzz.damage import budget, changed_bytes, changed_values, held
from tests.json_tokenizers import MAKERS

TEXT = "the quick\n\n brown w\u00f6rld \u6f22\u5b57 \uff46\uff55 \0 \u2581"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "tokenizer.model"


def use(path: Path) -> None:
    """All that training, preparing, generating and exporting ask of a tokenizer."""
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(TEXT)
    everything = range(tokenizer.vocab_size)
    assert all(token_id in everything for token_id in (*ids, tokenizer.eod_id, tokenizer.unknown_id or 0))
    assert isinstance(tokenizer.decode(ids), str) and tokenizer.decode_batch(tokenizer.encode_batch([TEXT, ""]))
    for token_id in everything:
        assert tokenizer.piece(token_id) is not None and tokenizer.decode([token_id]) is not None
    model = read_tokenizer(tokenizer)
    assert len(model.piece_bytes()) == tokenizer.vocab_size
    if isinstance(model, TokenizerJsonModel):
        gguf_limits(model)


@pytest.fixture(scope="module")
def json_files() -> dict[str, dict[str, Any]]:
    return {name: make(TEXTS, 290) for name, make in MAKERS.items()}


def names(path: Path) -> Any:
    return lambda message: message.startswith(f"tokenizer {path}: ")


@budget(150, share=0.2)
@given(data=st.data())
def test_whatever_the_bytes(prepared: Path, path: Path, data: Any) -> None:
    path.write_bytes(data.draw(changed_bytes((prepared / "tokenizer.model").read_bytes())))
    held(lambda: use(path), names(path))


NUMBERS = st.sampled_from([-(2**31), -1, 0, 1, 2, 3, 5, 299, 300, 2**31 - 1])
FIELDS = {
    "unk_id": NUMBERS,
    "bos_id": NUMBERS,
    "eos_id": NUMBERS,
    "pad_id": NUMBERS,
    "vocab_size": NUMBERS,
    "eos_piece": st.sampled_from(["", "<s>", "the", "<0x41>"]),
    "model_type": st.sampled_from([1, 2, 3, 4]),
    "byte_fallback": st.booleans(),
}
PIECES = {
    "piece": st.sampled_from(["", "\0", "</s>", "<0x41>", "<0x", "\u2581", "x" * 10000]),
    "score": st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38]),
    "type": st.sampled_from([1, 2, 3, 4, 5, 6]),
}


@budget(150, share=0.2)
@given(
    fields=st.lists(
        st.sampled_from(sorted(FIELDS)).flatmap(lambda name: FIELDS[name].map(lambda v: (name, v))), max_size=2
    ),
    pieces=st.lists(
        st.tuples(
            st.integers(0, 6) | st.integers(0, 299),
            st.sampled_from(sorted(PIECES)).flatmap(lambda name: PIECES[name].map(lambda v: (name, v))),
        ),
        max_size=2,
    ),
    charsmap=st.none() | st.binary(max_size=64),
    left=st.none() | st.integers(0, 300),
)
def test_whatever_the_model_says(
    prepared: Path, path: Path, fields: list, pieces: list, charsmap: bytes | None, left: int | None
) -> None:
    """Well-formed files with other marks, pieces, kinds, scores and rules."""
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString((prepared / "tokenizer.model").read_bytes())
    for name, value in fields:
        setattr(model.trainer_spec, name, value)
    for place, (name, value) in pieces:
        setattr(model.pieces[place], name, value)
    if charsmap is not None:
        model.normalizer_spec.precompiled_charsmap = charsmap
    del model.pieces[left if left is not None else 300 :]
    path.write_bytes(model.SerializeToString())
    held(lambda: use(path), names(path))


@budget(100, share=0.2)
@given(data=st.data())
@pytest.mark.parametrize("kind", MAKERS)
def test_whatever_the_bytes_of_a_tokenizer_json(json_files: Any, path: Path, kind: str, data: Any) -> None:
    path.write_bytes(data.draw(changed_bytes(json.dumps(json_files[kind]).encode())))
    held(lambda: use(path), names(path))


@budget(150, share=0.2)
@given(data=st.data())
@pytest.mark.parametrize("kind", MAKERS)
def test_whatever_a_tokenizer_json_says(json_files: Any, path: Path, kind: str, data: Any) -> None:
    """Well-formed JSON with other values. The vocabulary is large, and most changes would be there: it is put last."""
    values = json_files[kind]
    model = {name: part for name, part in values["model"].items() if name not in ("vocab", "merges")}
    changed = data.draw(changed_values(values | {"model": model}))
    if isinstance(changed.get("model"), dict):
        rest = {name: values["model"][name] for name in ("vocab", "merges")}
        changed["model"] |= data.draw(st.just(rest) | changed_values({k: few(v) for k, v in rest.items()}))
    path.write_text(json.dumps(changed))
    held(lambda: use(path), names(path))


def few(part: Any) -> Any:
    """The first entries of the vocabulary or of the merges."""
    return dict(list(part.items())[:20]) if isinstance(part, dict) else part[:5]


@pytest.mark.parametrize("opening", ["{", '{"a":', "[", '{"model":{"vocab":'])
def test_ten_megabytes_of_nesting_are_refused(path: Path, opening: str) -> None:
    path.write_text(opening * (10 * 2**20 // len(opening)))
    with pytest.raises(UserError, match=r"tokenizer .*: n(either|ot) "):
        load_tokenizer(path)
