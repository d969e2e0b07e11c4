"""The tokenizer that a model was trained with: token ids mean nothing without it.

    RUN/tokenizer.model or .json              the file, as the trainer read it
    RUN/checkpoints/step_.../manifest.json    `tokenizer_sha256`; the record of an export has it too

Whoever puts a model and a tokenizer together compares: resuming, evaluating, generating and exporting refuse another
one. Models of elsewhere, which do not say what they were trained with, take any.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dqt_dist.data.tokenizer import Tokenizer, kept_tokenizer
from dqt_dist.errors import UserError

TOKENIZER_SHA256 = "tokenizer_sha256"


def check_tokenizer(tokenizer: Tokenizer, facts: dict[str, Any], model: Path, folder: Path, where: str) -> None:
    """Raises UserError naming both files and both hashes when the model was trained with another tokenizer.

    facts: the manifest of the checkpoint, or the record of the export, `model`. folder: where its tokenizer should
    lie, a run or an export. where: what named `tokenizer`.
    """
    sha256 = facts.get(TOKENIZER_SHA256)
    if sha256 is None or sha256 == tokenizer.sha256:
        return
    kept = kept_tokenizer(folder)
    its_own = kept if kept is not None and kept != tokenizer.path else facts["config"]["data"]["tokenizer"]
    raise UserError(
        f"{where}: {tokenizer.path} (sha256 {tokenizer.sha256}) is not the tokenizer that {model} was trained with,"
        f" {its_own} (sha256 {sha256}); use that one, with data that were prepared with it"
    )
