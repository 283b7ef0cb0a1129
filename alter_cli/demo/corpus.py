"""The demo's data: question and answer rows of authors, cut into domains, and general text.

A `Corpus` says who is to be forgotten (`domains`), who is to stay (`retain`), who was never
trained (`unseen`) and what ordinary text looks like (`general`). Two sources build one:
`alter_cli.demo.authors` (generated, the default) and `alter_cli.demo.tofu` (read from files).
On disk it is the JSON lines that `alter train` reads, one file per part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from alter_core.errors import DomainNameError, TrainingDataError

DOMAIN_NAME = re.compile(r"[a-z0-9-]{1,63}")


@dataclass(frozen=True, kw_only=True)
class QA:
    """One question and the answer to it."""

    question: str
    """The user's turn, without chat markup."""
    answer: str
    """The assistant's turn, without chat markup or end token."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Everything the demo trains on and measures with.

    Raises: DomainNameError where a domain's name is not `[a-z0-9-]{1,63}`; TrainingDataError where
    a part is empty or a row stands in more than one part.
    """

    name: str
    """What the data are called on screen."""
    domains: dict[str, list[QA]]
    """Forget domains: name -> the rows the base model knows and an expert is to forget."""
    retain: list[QA]
    """Rows of other authors, known to the base model and to be kept."""
    unseen: list[QA]
    """Rows of authors of the same kind that nothing is trained on: a router's negatives."""
    general: list[str]
    """Ordinary text, about a paragraph each: for the tokenizer, the base model and negatives."""

    def __post_init__(self) -> None:
        for name in self.domains:
            if not DOMAIN_NAME.fullmatch(name):
                raise DomainNameError(
                    "A forget domain cannot have that name",
                    expected="1 to 63 characters out of a-z, 0-9 and '-'",
                    got=repr(name),
                )
        counts = {part: len(rows) for part, rows in self.parts().items()}
        counts["general"] = len(self.general)
        if not self.domains or not all(counts.values()):
            raise TrainingDataError(
                f"Corpus {self.name!r} is incomplete",
                expected="a domain, and something in every part",
                got=", ".join(f"{part}: {count}" for part, count in counts.items()),
                fix="Ask for more authors.",
            )
        self._refuse_shared_rows()

    def _refuse_shared_rows(self) -> None:
        owner: dict[QA, str] = {}
        for part, rows in self.parts().items():
            for row in rows:
                first = owner.setdefault(row, part)
                if first != part:
                    raise TrainingDataError(
                        f"Corpus {self.name!r} contradicts itself",
                        expected="every row in one part only",
                        got=f"{row.question!r} in {first!r} and in {part!r}",
                        fix="Take the row out of one of them.",
                    )

    def parts(self) -> dict[str, list[QA]]:
        """Rows by file stem: `domain-NAME` for each domain, then `retain` and `unseen`."""
        domains = {f"domain-{name}": rows for name, rows in self.domains.items()}
        return {**domains, "retain": self.retain, "unseen": self.unseen}

    def known_rows(self) -> list[QA]:
        """The rows the base model is trained on: every domain, then retain."""
        return [row for rows in self.domains.values() for row in rows] + self.retain

    def save(self, folder: Path) -> dict[str, Path]:
        """Write every part and `general` as `<part>.jsonl`; returns the paths by part."""
        folder.mkdir(parents=True, exist_ok=True)
        parts: dict[str, Iterable[QA | str]] = {**self.parts(), "general": self.general}
        return {part: write_jsonl(folder / f"{part}.jsonl", rows) for part, rows in parts.items()}


def write_jsonl(path: Path, rows: Iterable[QA | str]) -> Path:
    """Write the lines `alter train` reads: {"question", "answer"} for a row, {"text"} for text."""
    with path.open("w", encoding="utf-8") as file:
        for line in _lines(rows):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def _lines(rows: Iterable[QA | str]) -> Iterator[dict[str, str]]:
    for row in rows:
        if isinstance(row, str):
            yield {"text": row}
        else:
            yield {"question": row.question, "answer": row.answer}
