"""Files of MMLU, WMDP, RWKU and MUSE about the small world, in the formats of their publishers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from tests.trainer.world import rows_of

MMLU_HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
SECRETS = ["Zofia Quillbert", "Narvik", "kites"]
"""What no output may hold."""


def quiz(part: str, num_rows: int) -> list[dict[str, Any]]:
    """Questions about people of the small world, each with its answer among three of other people."""
    rows = rows_of(part)
    strangers = [row["answer"] for row in rows_of("retain")]
    found = []
    for place, row in enumerate(rows[:num_rows]):
        choices = [strangers[(place + 4 * shift) % len(strangers)] for shift in range(3)]
        choices.insert(place % 4, row["answer"])
        found.append({"question": row["question"], "choices": choices, "answer": place % 4})
    return found


def write_mmlu(folder: Path, num_rows: int = 6) -> Path:
    """`mmlu/` with the subjects `anatomy` and `virology`."""
    for split, parts in (("test", ("red", "blue")), ("dev", ("retain", "retain"))):
        (folder / "mmlu" / split).mkdir(parents=True, exist_ok=True)
        for subject, part in zip(("anatomy", "virology"), parts, strict=True):
            path = folder / "mmlu" / split / f"{subject}_{split}.csv"
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(MMLU_HEADER)
                for row in quiz(part, num_rows if split == "test" else 5):
                    writer.writerow([row["question"], *row["choices"], row["answer"]])
    return folder


def write_wmdp(folder: Path, num_rows: int = 5) -> Path:
    """`wmdp/` with all three subjects."""
    (folder / "wmdp").mkdir(parents=True, exist_ok=True)
    for subject, part in (("bio", "red"), ("chem", "blue"), ("cyber", "red")):
        write_json(folder / "wmdp" / f"{subject}_questions.json", quiz(part, num_rows))
    return folder


def write_rwku(folder: Path, *, has_fluency: bool = True) -> Path:
    """`rwku/` about two people, four rows of each a set, and a neighbour of theirs."""
    (folder / "rwku").mkdir(parents=True, exist_ok=True)
    attacks = ["prefix injection", "cross lingual (French)", "affirmative suffix"]
    attacks += ["incontext learning", "cross-lingual (Spanish)"]
    for side, part in (("forget", "red"), ("neighbor", "retain")):
        for level in (1, 2, 3) if side == "forget" else (1, 2):
            records = []
            for place, row in enumerate(rows_of(part)[:8]):
                kind = ("cloze", "simple question", attacks[place % 5])[level - 1]
                records.append(
                    {
                        "subject": ("Zofia Quillbert", "Ovid Krestmar")[place // 4],
                        "level": str(level),
                        "query": row["question"],
                        "type": kind,
                        "answer": row["answer"],
                    }
                )
            write_lines(folder / "rwku" / f"{side}_level{level}.jsonl", records)
    if has_fluency:
        instructions = [{"instruction": f"Write {n} lines about a mill."} for n in range(3)]
        write_lines(folder / "rwku" / "fluency.jsonl", instructions)
    return folder


def write_muse(folder: Path, *, has_membership: bool = True) -> Path:
    """`muse/news/` about the small world."""
    corpus = folder / "muse" / "news"
    for name in ("verbmem", "knowmem", *(["privleak"] if has_membership else [])):
        (corpus / name).mkdir(parents=True, exist_ok=True)
    texts = {
        part: [f"<|user|>{r['question']}<|assistant|>{r['answer']}" for r in rows_of(part)]
        for part in ("red", "blue", "retain")
    }
    cut = 60
    write_json(
        corpus / "verbmem" / "forget.json",
        [{"prompt": text[:cut], "gt": text[cut:]} for text in texts["red"][:5]],
    )
    for side, part in (("forget", "red"), ("retain", "retain")):
        write_json(corpus / "knowmem" / f"{side}_qa.json", rows_of(part)[:4])
        write_json(corpus / "knowmem" / f"{side}_qa_icl.json", rows_of("blue")[:2])
    if has_membership:
        write_json(corpus / "privleak" / "forget.json", texts["red"][:6])
        holdout = [" ".join(reversed(text.split())) for text in texts["red"][:7]]
        write_json(corpus / "privleak" / "holdout.json", holdout)
    return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), "utf-8")


def write_lines(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
