"""MMLU (Hendrycks et al. 2021, arXiv 2009.03300) and WMDP (Li et al. 2024, arXiv 2403.03218): their files."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alter_core.errors import ConfigError, EvaluationError

from .data import read_json_list, read_text

WMDP_SUBJECTS = ("bio", "chem", "cyber")
_NUM_MMLU_SUBJECTS = 57
_MMLU_HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
_MMLU_FIX = "Fetch MMLU's CSV files with a header again, and name their folder in ALTER_DATA_DIR."
_WMDP_FIX = (
    "Fetch WMDP's multiple-choice questions (bio, chem and cyber_questions.json) into wmdp/ of the folder "
    "that ALTER_DATA_DIR names."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question with four choices."""

    question: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A subject's questions."""

    test: Sequence[Question]
    dev: Sequence[Question] = ()
    """To be shown before, with their answers."""


def read_mmlu(folder: Path, subjects: Sequence[str] = ()) -> dict[str, Subject]:
    """The named subjects of a folder with `dev/SUBJECT_dev.csv` and `test/SUBJECT_test.csv`, or all 57.

    Raises: ConfigError if a subject is unknown, EvaluationError if a file does not fit.
    """
    known = sorted(path.stem.removesuffix("_test") for path in folder.glob("test/*_test.csv"))
    _check_known(subjects, known, folder)
    if not subjects and len(known) != _NUM_MMLU_SUBJECTS:
        raise EvaluationError(
            f"{folder} is of another version of MMLU, or incomplete",
            expected=f"test files of {_NUM_MMLU_SUBJECTS} subjects",
            got=str(len(known)),
            fix=f"{_MMLU_FIX} Or name those that are there: --subjects {','.join(known[:2])}.",
        )
    return {
        name: Subject(
            test=_read_csv(folder / "test" / f"{name}_test.csv"),
            dev=_read_csv(folder / "dev" / f"{name}_dev.csv"),
        )
        for name in subjects or known
    }


def read_wmdp(folder: Path, subjects: Sequence[str] = ()) -> dict[str, Subject]:
    """The named subjects of a folder with `SUBJECT_questions.json`, or all three.

    Raises: ConfigError if a subject is unknown, EvaluationError if a file does not fit.
    """
    _check_known(subjects, WMDP_SUBJECTS, folder)
    return {
        name: Subject(test=_read_json(folder / f"{name}_questions.json"))
        for name in subjects or WMDP_SUBJECTS
    }


def _check_known(subjects: Sequence[str], known: Sequence[str], folder: Path) -> None:
    if unknown := [name for name in subjects if name not in known]:
        raise ConfigError(
            "A subject is unknown",
            expected=f"some of {', '.join(known) or f'those in {folder}, which has none'}",
            got=", ".join(unknown),
            fix="Name subjects with commas between them.",
        )


def _read_csv(path: Path) -> list[Question]:
    text = read_text(path, fix=_MMLU_FIX)
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    if header != _MMLU_HEADER or not rows:
        raise EvaluationError(
            f"{path.name} is of another version of MMLU, or has no rows",
            expected=f"the header {','.join(_MMLU_HEADER)}, and rows",
            got="another first line" if header != _MMLU_HEADER else "no rows",
            fix=_MMLU_FIX,
        )
    return [
        _question(row[:1], row[1:5], row[5:], f"{path.name} row {number}", _MMLU_FIX)
        for number, row in enumerate(rows, start=1)
    ]


def _read_json(path: Path) -> list[Question]:
    questions = []
    for number, record in enumerate(read_json_list(path, fix=_WMDP_FIX), start=1):
        fields: Mapping[str, Any] = record if isinstance(record, dict) else {}
        questions.append(
            _question(
                [fields.get("question")],
                fields.get("choices"),
                [fields.get("answer")],
                f"{path.name} row {number}",
                _WMDP_FIX,
            )
        )
    return questions


def _question(question: Any, choices: Any, answer: Any, place: str, fix: str) -> Question:
    """Checks one row. Raises: EvaluationError naming its place, never its text."""
    is_text = isinstance(choices, list) and all(isinstance(t, str) for t in (*question, *choices))
    if not is_text or len(choices) != 4 or len(answer) != 1 or not question[0].strip():
        raise EvaluationError(
            f"{place} does not fit",
            expected="a question, four choices and an answer",
            got="another shape",
            fix=fix,
        )
    if str(answer[0]) not in ("0", "1", "2", "3"):
        raise EvaluationError(
            f"{place} does not fit", expected="an answer from 0 to 3", got="another", fix=fix
        )
    return Question(question=question[0], choices=tuple(choices), answer=int(answer[0]))
