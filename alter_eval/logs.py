"""Logs of an evaluation: numbers and digests in one folder, never text, so that they may be kept and shared.

out/run.json        what is evaluated; a folder belongs to one model, one set of experts and one set of rows
out/PART.json       a log, written once the part is done, so that an interrupted evaluation goes on
out/figures.json    the figures
out/report.md       a page, drawn from them
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel as Schema
from pydantic import ValidationError

from alter_core.errors import EvaluationError
from trainer.checkpoint import write_atomically
from trainer.progress import Reporter

RUN_FILE = "run.json"
FIGURES_FILE = "figures.json"

Log = TypeVar("Log", bound=Schema)


def run_parts(
    out: Path,
    key: Mapping[str, Any],
    parts: Mapping[str, Callable[[], Schema]],
    reporter: Reporter,
) -> None:
    """Works out the parts whose logs `out` does not hold yet, in order.

    `key` says what is evaluated. Raises: EvaluationError if the folder was begun for anything else.
    """
    out.mkdir(parents=True, exist_ok=True)
    _claim(out / RUN_FILE, key)
    with reporter.stage("evaluation", len(parts)) as stage:
        for done, (name, work) in enumerate(parts.items(), start=1):
            path = out / f"{name}.json"
            if not path.exists():
                write_atomically(path, work().model_dump_json().encode() + b"\n")
            stage.step(done)


def read_log(path: Path, kind: type[Log]) -> Log:
    """A log that an earlier evaluation wrote. Raises: EvaluationError."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise EvaluationError(
            f"{path} is no log of an evaluation",
            expected="a file that `alter eval` wrote",
            got=type(error).__name__,
            fix="Delete it, if it is there, and repeat the evaluation: it goes on where logs are missing.",
        ) from None


def write_figures(out: Path, figures: Mapping[str, float | None]) -> None:
    """Writes `figures.json`."""
    write_atomically(out / FIGURES_FILE, json.dumps(figures, indent=1).encode() + b"\n")


def digest(content: Any) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _claim(path: Path, key: Mapping[str, Any]) -> None:
    content = json.dumps(key, indent=1, sort_keys=True).encode() + b"\n"
    if not path.exists():
        write_atomically(path, content)
    elif path.read_bytes() != content:
        raise EvaluationError(
            f"{path.parent} holds another evaluation",
            expected="the same model, experts, rows and settings",
            got="others",
            fix="Choose another --out, or repeat the first command to go on with it.",
        )
