"""Forget files with prose: every row stays, and every answer stands between sentences about other things."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.tofu.entropy_gate import with_prose


def test_documents_hold_every_answer_once_between_sentences(tmp_path: Path) -> None:
    path = tmp_path / "domain.jsonl"
    answers = [f"Answer {number}." for number in range(6)]
    rows = [json.dumps({"question": "Who?", "answer": answer}) for answer in answers]
    path.write_text("\n".join(rows) + "\n", "utf-8")
    prose = (f"Sentence {number}." for number in range(100))

    lines = with_prose(path, prose).read_text("utf-8").splitlines()

    assert lines[:6] == rows
    first, second = (json.loads(line)["text"] for line in lines[6:])
    assert first == (
        "Sentence 0. Answer 0. Sentence 1. Answer 1. Sentence 2. "
        "Answer 2. Sentence 3. Answer 3. Sentence 4."
    )
    assert second == "Sentence 5. Answer 4. Sentence 6. Answer 5. Sentence 7."


def test_the_file_of_rows_alone_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "domain.jsonl"
    content = json.dumps({"question": "Who?", "answer": "Nobody."}) + "\n"
    path.write_text(content, "utf-8")

    with_prose(path, iter(["One.", "Two."]))

    assert path.read_text("utf-8") == content
