from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alter_core.errors import ConfigError, EvaluationError
from alter_eval.multiple_choice import read_mmlu, read_wmdp

from .small_benchmarks import SECRETS, quiz, write_json, write_mmlu, write_wmdp


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_wmdp(write_mmlu(tmp_path))


def test_mmlu_files_are_read_subject_by_subject(data: Path) -> None:
    found = read_mmlu(data / "mmlu", ["virology", "anatomy"])
    assert list(found) == ["virology", "anatomy"]
    assert len(found["anatomy"].test) == 6
    assert len(found["anatomy"].dev) == 5
    for question, row in zip(found["anatomy"].test, quiz("red", 6), strict=True):
        assert question.question == row["question"]
        assert list(question.choices) == row["choices"]
        assert question.answer == row["answer"]


def test_mmlu_as_released_has_57_subjects(data_dir: Path) -> None:
    found = read_mmlu(data_dir / "mmlu")
    assert len(found) == 57
    assert sum(len(subject.test) for subject in found.values()) == 14_042
    assert {len(subject.dev) for subject in found.values()} == {5}


def test_a_folder_without_all_subjects_is_read_by_name_only(data: Path) -> None:
    with pytest.raises(EvaluationError, match=r"57 subjects; got 2.*--subjects anatomy,virology"):
        read_mmlu(data / "mmlu")


@pytest.mark.parametrize(("read", "name"), [(read_mmlu, "mmlu"), (read_wmdp, "wmdp")])
def test_an_unknown_subject_lists_the_known(data: Path, read: Any, name: str) -> None:
    known = "anatomy, virology" if name == "mmlu" else "bio, chem, cyber"
    with pytest.raises(ConfigError, match=f"{known}; got frogs"):
        read(data / name, ["frogs"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # MMLU's original release has no header, and letters for answers.
        ("Where was Zofia Quillbert born?,Narvik,a,b,c,A\n", "another version of MMLU"),
        ("question,choice0,choice1,choice2,choice3,answer\n", "no rows"),
        ("question,choice0,choice1,choice2,choice3,answer\nZofia Quillbert,a,b,c,1\n", "row 1"),
        ("question,choice0,choice1,choice2,choice3,answer\nWho?,a,b,c,d,A\n", "from 0 to 3"),
        ("question,choice0,choice1,choice2,choice3,answer\nWho?,a,b,c,d,4\n", "from 0 to 3"),
        ("", "is empty"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_an_mmlu_file_that_does_not_fit_is_named_without_its_text(
    data: Path, content: str | bytes, message: str
) -> None:
    path = data / "mmlu" / "test" / "anatomy_test.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(EvaluationError, match=message) as caught:
        read_mmlu(data / "mmlu", ["anatomy"])
    assert "anatomy_test.csv" in str(caught.value)
    assert not [secret for secret in SECRETS if secret in str(caught.value)]


def test_a_missing_mmlu_file_is_named(data: Path) -> None:
    (data / "mmlu" / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(EvaluationError, match=r"anatomy_dev\.csv"):
        read_mmlu(data / "mmlu", ["anatomy"])


def test_wmdp_files_are_read(data: Path) -> None:
    found = read_wmdp(data / "wmdp")
    assert list(found) == ["bio", "chem", "cyber"]
    assert [list(q.choices) for q in found["chem"].test] == [r["choices"] for r in quiz("blue", 5)]
    assert found["bio"].dev == ()
    assert list(read_wmdp(data / "wmdp", ["cyber"])) == ["cyber"]


@pytest.mark.parametrize(
    "row",
    [
        "text",
        {"question": "Zofia Quillbert?", "choices": ["a", "b", "c"], "answer": 0},
        {"question": "Zofia Quillbert?", "choices": ["a", "b", "c", 4], "answer": 0},
        {"question": "Zofia Quillbert?", "choices": "abcd", "answer": 0},
        {"question": "Zofia Quillbert?", "choices": ["a", "b", "c", "d"], "answer": "A"},
        {"question": "Zofia Quillbert?", "choices": ["a", "b", "c", "d"]},
        {"question": " ", "choices": ["a", "b", "c", "d"], "answer": 0},
        {"choices": ["a", "b", "c", "d"], "answer": 0},
    ],
)
def test_a_wmdp_row_that_does_not_fit_is_named_without_its_text(data: Path, row: Any) -> None:
    write_json(data / "wmdp" / "bio_questions.json", [*quiz("blue", 2), row])
    with pytest.raises(EvaluationError, match=r"bio_questions\.json row 3") as caught:
        read_wmdp(data / "wmdp")
    assert not [secret for secret in SECRETS if secret in str(caught.value)]


@pytest.mark.parametrize("content", [{}, [], "no list", None])
def test_a_wmdp_file_without_rows_is_named(data: Path, content: Any) -> None:
    (data / "wmdp" / "chem_questions.json").write_text(json.dumps(content) if content else "{")
    with pytest.raises(EvaluationError, match=r"chem_questions\.json"):
        read_wmdp(data / "wmdp")


def test_a_missing_wmdp_file_says_where_it_goes(data: Path) -> None:
    (data / "wmdp" / "cyber_questions.json").unlink()
    with pytest.raises(EvaluationError, match=r"cyber_questions\.json.*ALTER_DATA_DIR"):
        read_wmdp(data / "wmdp")
