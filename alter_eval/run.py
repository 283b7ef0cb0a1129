"""One evaluation on TOFU: every set through a model, resumable; `logs` says what the folder holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel as Schema

from trainer.dataset import EncodedRow
from trainer.progress import Reporter

from . import tofu
from .logs import read_log, run_parts
from .models import LanguageModel

HOLDOUT_FILE = "holdout.json"


def tofu_rows(data: Path, split: str) -> dict[str, list[tofu.TofuRow]]:
    """Rows of every set of a TOFU split, `01`, `05` or `10`; forgotten ones alone are asked in other words.

    Raises: EvaluationError.
    """
    rows = {"forget": tofu.read_rows(data / "tofu" / f"forget{split}_perturbed.json")}
    for name in tofu.UTILITY_SETS:
        members = tofu.read_rows(data / "tofu" / f"{name}_perturbed.json")
        rows[name] = [dataclasses.replace(row, paraphrased_question=None) for row in members]
    return rows


def evaluate(
    model: LanguageModel,
    rows: Mapping[str, list[tofu.TofuRow]],
    out: Path,
    *,
    what: Mapping[str, Any],
    holdout: Sequence[EncodedRow],
    judge: LanguageModel | None,
    reporter: Reporter,
) -> tofu.ModelLogs:
    """Runs the sets that `out` does not hold yet; returns the logs of all.

    `what` says what is evaluated; a folder that was begun for anything else is refused.
    Raises: EvaluationError.
    """
    key = {
        **what,
        "sets": {name: tofu.dataset_digest(members) for name, members in rows.items()},
        "holdout": tofu.encoded_digest(holdout),
    }
    parts: dict[str, Callable[[], Schema]] = {}
    for name, members in rows.items():
        others = tofu.words_of(row for other in rows if other != name for row in rows[other])
        parts[name] = partial(
            tofu.evaluate_set, model, members, judge if name == "forget" else None, others
        )
    if holdout:
        parts["holdout"] = partial(tofu.evaluate_holdout, model, holdout)
    run_parts(out, key, parts, reporter)
    return read_logs(out)


def read_logs(folder: Path) -> tofu.ModelLogs:
    """The logs of a complete evaluation. Raises: EvaluationError."""
    holdout = folder / HOLDOUT_FILE
    names = ("forget", *tofu.UTILITY_SETS)
    return tofu.ModelLogs(
        sets={name: read_log(folder / f"{name}.json", tofu.SetLog) for name in names},
        holdout=read_log(holdout, tofu.HoldoutLog) if holdout.exists() else None,
    )
