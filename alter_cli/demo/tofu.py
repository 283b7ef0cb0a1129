"""The demo's corpus from TOFU's files (Maini et al. 2024, 200 fictitious authors of 20 rows each).

The forget domains are taken from the end of `tofu/full.json`, four authors each, as TOFU's own
forget sets are. Of the authors before them, `seed` draws those the model is to know and keep, and
those it never sees. General text is WikiText-2 (valid), GSM8K and TOFU's own sets on real authors
and world facts. The folder is `ALTER_DATA_DIR`, or `../shared/data` beside the repository.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from alter_cli.demo.corpus import QA, Corpus
from alter_core.errors import ConfigError, TrainingDataError

ROWS_PER_AUTHOR = 20
NUM_AUTHORS = 200
AUTHORS_PER_DOMAIN = 4
NUM_UNSEEN_AUTHORS = 8
MIN_PARAGRAPH_CHARS = 80

_GSM8K_CALCULATION = re.compile(r"<<[^>]*>>")
_FIX = "Set ALTER_DATA_DIR to a folder that holds tofu/, text/ and gsm8k/."


def load(data_dir: Path, *, num_authors: int = 40, num_domains: int = 2, seed: int = 0) -> Corpus:
    """TOFU as a Corpus: `num_authors` known authors, `num_domains` domains of four among them.

    Raises: TrainingDataError where a file is missing or malformed; ConfigError where the numbers
    do not fit together.
    """
    num_forget = num_domains * AUTHORS_PER_DOMAIN
    if num_domains < 1 or not num_forget < num_authors <= NUM_AUTHORS - NUM_UNSEEN_AUTHORS:
        raise ConfigError(
            "TOFU's authors do not go round",
            expected=f"at least 1 domain of {AUTHORS_PER_DOMAIN} authors, more authors than those "
            f"in domains, and at most {NUM_AUTHORS - NUM_UNSEEN_AUTHORS}",
            got=f"{num_domains} domains and {num_authors} authors",
            fix="Change --domains or --authors.",
        )
    authors = _authors(data_dir / "tofu" / "full.json")
    others = list(range(NUM_AUTHORS - num_forget))
    random.Random(seed).shuffle(others)
    num_retain = num_authors - num_forget
    retain, unseen = others[:num_retain], others[num_retain : num_retain + NUM_UNSEEN_AUTHORS]
    return Corpus(
        name="tofu",
        domains=_domains(authors, num_domains),
        retain=[row for author in sorted(retain) for row in authors[author]],
        unseen=[row for author in sorted(unseen) for row in authors[author]],
        general=general_text(data_dir) + _fact_text(data_dir),
    )


def _authors(path: Path) -> list[list[QA]]:
    """The rows of `full.json` by author, in the file's order."""
    rows = read_rows(path)
    expected = NUM_AUTHORS * ROWS_PER_AUTHOR
    if len(rows) != expected:
        raise TrainingDataError(
            f"{path} is not TOFU's full set",
            expected=f"{expected} rows, {NUM_AUTHORS} authors of {ROWS_PER_AUTHOR}",
            got=f"{len(rows)} rows",
            fix="Fetch the file again.",
        )
    return [rows[at : at + ROWS_PER_AUTHOR] for at in range(0, expected, ROWS_PER_AUTHOR)]


def _domains(authors: list[list[QA]], num_domains: int) -> dict[str, list[QA]]:
    """Domains of four authors from the end backwards, named by their places in the file."""
    domains = {}
    for index in range(num_domains):
        end = NUM_AUTHORS - index * AUTHORS_PER_DOMAIN
        members = authors[end - AUTHORS_PER_DOMAIN : end]
        name = f"authors-{end - AUTHORS_PER_DOMAIN + 1}-{end}"
        domains[name] = [row for rows in members for row in rows]
    return domains


def general_text(data_dir: Path) -> list[str]:
    """WikiText-2 (valid) and GSM8K, a paragraph or a problem each."""
    wiki = wikitext_paragraphs(_read_text(data_dir / "text" / "wikitext2_valid.txt"))
    maths = read_rows(data_dir / "gsm8k" / "test.jsonl")
    return wiki + [f"{row.question} {_GSM8K_CALCULATION.sub('', row.answer)}" for row in maths]


def _fact_text(data_dir: Path) -> list[str]:
    """TOFU's real authors and world facts, a row each."""
    return [
        f"{row.question} {row.answer}"
        for name in ("real_authors.json", "world_facts.json")
        for row in read_rows(data_dir / "tofu" / name)
    ]


def wikitext_paragraphs(text: str) -> list[str]:
    """WikiText's paragraphs as ordinary English: headings, `<unk>` sentences and spacing undone."""
    paragraphs = []
    for line in text.split("\n"):
        if line.strip().startswith("="):
            continue
        sentences = [part for part in line.strip().split(" . ") if "<unk>" not in part]
        paragraph = _detokenized(" . ".join(sentences))
        if len(paragraph) >= MIN_PARAGRAPH_CHARS:
            paragraphs.append(paragraph)
    return paragraphs


def _detokenized(text: str) -> str:
    text = re.sub(r" @(.)@ ", r"\1", text)
    text = re.sub(r'" ([^"]*) "', r'"\1"', text)
    text = re.sub(r" ([.,;:!?)\]]|'s\b|n't\b)", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text).strip()
    return text if not text or text[-1] in '.!?"' else text + "."


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        got = "no such file"
    except (OSError, UnicodeDecodeError) as error:
        got = f"{type(error).__name__}: {error}"
    raise TrainingDataError(f"{path} cannot be read", expected="UTF-8 text", got=got, fix=_FIX)


def read_rows(path: Path) -> list[QA]:
    """JSON lines with `question` and `answer`; other keys are left alone."""
    rows = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        try:
            record = json.loads(line)
            question, answer = record["question"], record["answer"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise _malformed(path, number, f"{type(error).__name__}: {error}") from None
        if not (isinstance(question, str) and question and isinstance(answer, str) and answer):
            raise _malformed(path, number, "an empty or non-text value")
        rows.append(QA(question=question, answer=answer))
    return rows


def _malformed(path: Path, line: int, got: str) -> TrainingDataError:
    return TrainingDataError(
        f"Line {line} of {path} is malformed",
        expected='{"question": ..., "answer": ...}, both of them text',
        got=got,
        fix="Fetch the file again.",
    )
