"""Real prose for the data tests: the documentation of some modules of Python's own library, tokenised for real.

Everything is made once a session, in a folder of its own; tests that change files copy them first.
"""

from __future__ import annotations

import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from dqt_dist.data.indexed import IndexedWriter, encode_documents
from dqt_dist.data.python_docs import read_python_docs
from dqt_dist.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

MODULES = [
    "argparse",
    "ast",
    "calendar",
    "configparser",
    "dataclasses",
    "decimal",
    "difflib",
    "doctest",
    "fractions",
    "functools",
    "heapq",
    "inspect",
    "locale",
    "optparse",
    "pathlib",
    "pickle",
    "random",
    "shutil",
    "smtplib",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "typing",
    "zipapp",
]
VOCAB_SIZE = 600


@dataclass(frozen=True)
class Prepared:
    """Two corpora of one tokenizer: `train` and `other` are path prefixes, `documents` the texts of `train`."""

    documents: list[str]
    tokenizer: Tokenizer
    train: str
    other: str


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("modules")
    for name in MODULES:
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", folder)
    texts = list(read_python_docs(folder))
    assert len(texts) > 20 and sum(map(len, texts)) > 100_000
    return texts


@pytest.fixture(scope="session")
def prepared(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    model = folder / "tokenizer.model"
    model.write_bytes(train_tokenizer(documents, VOCAB_SIZE))
    tokenizer = load_tokenizer(model)
    for name, texts in (("train", documents[:-5]), ("other", documents[-5:])):
        writer = IndexedWriter(folder / name, tokenizer, request="tests")
        for batch in encode_documents(texts, model, workers=1):
            writer.add_batch(batch)
        writer.finish()
    return Prepared(documents[:-5], tokenizer, str(folder / "train"), str(folder / "other"))


@pytest.fixture
def copied(prepared: Prepared, tmp_path: Path) -> Path:
    """The prefix of a copy of `train` that a test may damage; tokenizer.model lies beside it."""
    for path in Path(prepared.train).parent.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path / "train"
