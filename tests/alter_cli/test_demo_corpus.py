"""The demo's corpus: its invariants and its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alter_cli.demo.corpus import QA, Corpus, write_jsonl
from alter_core.errors import DomainNameError, TrainingDataError


def _rows(start: int, count: int) -> list[QA]:
    return [QA(question=f"Q{at}?", answer=f"A{at}.") for at in range(start, start + count)]


def _corpus(**changes: object) -> Corpus:
    parts = {
        "name": "toy",
        "domains": {"left": _rows(0, 2), "right": _rows(2, 3)},
        "retain": _rows(5, 5),
        "unseen": _rows(10, 7),
        "general": ["ordinary text"],
    }
    return Corpus(**{**parts, **changes})


def test_known_rows_are_the_domains_then_retain() -> None:
    assert _corpus().known_rows() == _rows(0, 10)


def test_saved_parts_are_the_json_lines_of_rows_and_texts(tmp_path: Path) -> None:
    paths = _corpus().save(tmp_path)
    assert sorted(paths) == ["domain-left", "domain-right", "general", "retain", "unseen"]
    left = [json.loads(line) for line in paths["domain-left"].read_text().splitlines()]
    assert left == [{"question": f"Q{at}?", "answer": f"A{at}."} for at in range(2)]
    assert paths["general"].read_text() == '{"text": "ordinary text"}\n'


def test_line_separators_inside_text_do_not_split_a_json_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", ["a\nb", QA(question="é?", answer="\n")])
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize("name", ["", "Upper", "under_score", "x" * 64, "../up"])
def test_a_domain_name_outside_the_alphabet_is_refused(name: str) -> None:
    with pytest.raises(DomainNameError, match="1 to 63 characters"):
        _corpus(domains={name: _rows(0, 2)})


def test_a_row_in_forget_and_retain_is_refused() -> None:
    with pytest.raises(TrainingDataError, match=r"'Q1\?' in 'domain-left' and in 'retain'"):
        _corpus(retain=_rows(1, 1))


@pytest.mark.parametrize(
    "changes", [{"domains": {}}, {"domains": {"left": []}}, {"retain": []}, {"general": []}]
)
def test_an_incomplete_corpus_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(TrainingDataError, match="incomplete"):
        _corpus(**changes)
