"""Checkpoints and exports of the export tests, session-wide fixtures."""

from __future__ import annotations

from tests.export.conftest import exported, tokenizer_file, trained, trainer_logits

__all__ = ["exported", "tokenizer_file", "trained", "trainer_logits"]
