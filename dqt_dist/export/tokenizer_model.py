"""What exports know of a tokenizer: that of a SentencePiece model, or that of a tokenizer.json.

Both have the texts and bytes of their ids, their marks, and `encode` and `decode` to compare with. What a format cannot
express is refused by the name of the property and with the formats that can (`refuse`).
"""

from __future__ import annotations

from dqt_dist.data.tokenizer import SentencePieceTokenizer, Tokenizer
from dqt_dist.data.tokenizer_json import JsonTokenizer
from dqt_dist.errors import UserError
from dqt_dist.export import sentencepiece_model, tokenizer_json_model
from dqt_dist.export.sentencepiece_model import SentencePieceModel
from dqt_dist.export.tokenizer_json_model import TokenizerJsonModel

TokenizerModel = SentencePieceModel | TokenizerJsonModel


def read_tokenizer(tokenizer: Tokenizer) -> TokenizerModel:
    """Reads a loaded tokenizer, whose file is thereby known to be good."""
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer_json_model.read_model(tokenizer)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return sentencepiece_model.read_model(tokenizer)


def refuse(model: TokenizerModel, export_format: str) -> None:
    """Raises UserError for a tokenizer that `export_format` cannot express; names the property and other formats."""
    if isinstance(model, TokenizerJsonModel):
        nowhere, only_gguf = [], tokenizer_json_model.gguf_limits(model) if export_format == "gguf" else []
    else:
        nowhere, only_gguf = sentencepiece_model.limits(model)
    problem = next((text for found, text in nowhere if found), None)
    if problem is not None:
        raise UserError(f"tokenizer {model.path}: {problem}; no format expresses it")
    problem = next((text for found, text in only_gguf if found), None)
    if problem is not None and export_format == "gguf":
        raise UserError(
            f"tokenizer {model.path}: {problem}; {model.engine} has no such thing, so --format gguf cannot express it; "
            "use hf-bitnet, hf-compressed or hf"
        )
