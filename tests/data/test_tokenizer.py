"""The tokenizer: nothing is lost, training is deterministic and bounded, wrong files are refused in clear words."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from dqt_dist.data.tokenizer import HashSample, document_hash, load_tokenizer, train_tokenizer
from dqt_dist.errors import UserError

AWKWARD = [
    "two  spaces\n\n   indented\ttab\r\nend \n",
    " leading",
    "caf\u00e9 \u6f22\u5b57 \U0001f600",
    "</s> <unk> <0x0A>",
    "nul\0",
]


def test_decode_gives_back_what_was_encoded(prepared):
    for text in [*AWKWARD, *prepared.documents[:5]]:
        ids = prepared.tokenizer.encode(text)
        assert prepared.tokenizer.decode(ids) == text
        assert max(ids) < prepared.tokenizer.vocab_size
        # The text "</s>" is text: only prepared data hold the mark itself.
        assert prepared.tokenizer.eod_id not in ids


def test_marks_and_bytes_are_where_llama_has_them(prepared):
    tokenizer = prepared.tokenizer
    assert [tokenizer.piece(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert tokenizer.eod_id == 2


def test_training_twice_gives_the_same_bytes(documents):
    assert train_tokenizer(documents, 400) == train_tokenizer(list(documents), 400)
    # Negative control: other text gives another model.
    assert train_tokenizer(documents, 400) != train_tokenizer(documents[:5], 400)


def test_sample_is_bounded_and_depends_on_the_documents_alone(documents):
    limit = sum(len(text.encode()) for text in documents) // 3
    shuffled = random.Random(0).sample(documents, len(documents))
    samples = []
    for order in (documents, shuffled):
        sample = HashSample(max_bytes=limit)
        for text in order:
            sample.add(text)
        samples.append(sample.documents())
    assert samples[0] == samples[1]
    assert 0 < sum(len(text.encode()) for text in samples[0]) <= limit
    # Negative control: without a limit nothing is left out.
    unlimited = HashSample()
    for text in documents:
        unlimited.add(text)
    assert sorted(unlimited.documents()) == sorted(documents)


def test_split_and_sample_hashes_are_independent_and_even():
    pairs = [document_hash(str(i)) for i in range(4000)]
    # Binomial(4000, 1/4) and (4000, 1/16): 5 standard deviations are 137 and 77. The hashes are fixed: no flakes.
    assert abs(sum(a < 0.25 for a, _ in pairs) - 1000) < 137
    assert abs(sum(a < 0.25 and b < 0.25 for a, b in pairs) - 250) < 77


@pytest.mark.parametrize(("vocab_size", "words"), [(5000, "at most"), (100, "at least")])
def test_vocabulary_out_of_reach_names_the_bound_and_the_bound_works(vocab_size, words):
    texts = ["the cat sat on the mat", "hello world again"] * 5
    with pytest.raises(UserError, match=rf"--vocab-size {vocab_size}: .*{words} (\d+) pieces") as caught:
        train_tokenizer(texts, vocab_size)
    bound = int(str(caught.value).split(words)[1].split()[0])
    assert train_tokenizer(texts, bound)
    with pytest.raises(UserError):
        train_tokenizer(texts, bound + (1 if words == "at most" else -1))


def test_no_text_is_refused():
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 300)


def test_missing_and_foreign_files_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"none\.model: no such file"):
        load_tokenizer(tmp_path / "none.model")
    for content in (b"", b"not a model"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(
            UserError, match=rf"neither a SentencePiece \.model file nor a tokenizer\.json \({len(content)} bytes\)"
        ):
            load_tokenizer(tmp_path / "bad.model")


def test_a_refusal_of_sentencepiece_that_quotes_no_text_is_one_of_ours(tmp_path: Path, documents):
    """Two pieces of the same bytes, which are no UTF-8: SentencePiece's message quotes them and cannot be decoded."""
    good = train_tokenizer(documents, 400)
    pieces = sorted(set(re.findall(rb"\x0a\x02([a-z]{2})\x15", good)))[:2]
    model = good.replace(b"\x0a\x02" + pieces[0], b"\x0a\x02\xbc\xbc").replace(
        b"\x0a\x02" + pieces[1], b"\x0a\x02\xbc\xbc"
    )
    (tmp_path / "tokenizer.model").write_bytes(model)
    with pytest.raises(UserError, match="neither a SentencePiece") as refusal:
        load_tokenizer(tmp_path / "tokenizer.model")
    assert isinstance(refusal.value.__cause__, UnicodeDecodeError)


def test_model_without_end_mark_is_refused(tmp_path: Path):
    import sentencepiece

    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 5)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "m"), vocab_size=16, model_type="bpe", eos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="no end-of-sentence piece"):
        load_tokenizer(tmp_path / "m.model")
