"""The text of a verdict: who is silent, who failed, who is behind. Real processes are in test_faults.py."""

from __future__ import annotations

from pathlib import Path

from dqt_dist.training.watchdog import MOST_NAMED, Beat, verdict

STACKS = Path("run/stacks")


def beat(marks: int, phase: str, seconds: float = 7.0) -> Beat:
    return Beat(number=9, marks=marks, step=3, phase=phase, seconds=seconds, limit=5.0)


def test_silent_ranks_come_before_the_errors_that_follow_from_them() -> None:
    found = verdict("rank 0 failed: RuntimeError", [beat(5, "training"), None, beat(4, "reading")], [1, 2], 0, STACKS)
    assert found.silent_or_failed == [1, 2] and not found.with_stacks
    assert found.text == (
        "no answer from rank 1 (last heard: never), rank 2 (last heard: step 3, reading, for 7 s); "
        "rank 0 failed: RuntimeError"
    )


def test_a_rank_that_failed_while_all_answer_is_the_one() -> None:
    found = verdict("rank 1 failed: OSError", [beat(5, "training"), beat(5, "training")], [], 1, STACKS)
    assert (found.text, found.silent_or_failed) == ("rank 1 failed: OSError", [1])


def test_the_rank_with_the_fewest_phases_is_behind() -> None:
    beats: list[Beat | None] = [beat(8, "training"), beat(7, "reading a batch"), beat(8, "training", 6.0)]
    found = verdict("no progress", beats, [], None, STACKS)
    assert found.silent_or_failed == [1] and found.with_stacks
    assert "behind: rank 1 (step 3, reading a batch, for 7 s); the others: step 3, training" in found.text


def test_ranks_that_stand_together_are_not_blamed_one_by_one() -> None:
    found = verdict("no progress", [beat(8, "training")] * 3, [], None, STACKS)
    assert "all ranks stand at step 3, training" in found.text


def test_a_message_names_a_few_of_many() -> None:
    found = verdict("no word", [beat(1, "training")] * 100, list(range(50)), None, STACKS)
    assert found.text.count("last heard") == MOST_NAMED and f"and {50 - MOST_NAMED} more" in found.text
