"""One evaluation: every set of a benchmark through a model, resumable, then figures and a page.

out/run.json        what is evaluated; a folder belongs to one model, one set of experts and one split
out/SET.json        a SetLog, written once the set is done
out/figures.json    the figures
out/report.md       a page with plots, drawn from them
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alter_core.errors import EvaluationError
from trainer.checkpoint import write_atomically
from trainer.dataset import EncodedRow
from trainer.progress import Reporter

from . import tofu
from .models import LanguageModel

RUN_FILE = "run.json"
FIGURES_FILE = "figures.json"
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
    out.mkdir(parents=True, exist_ok=True)
    key = {
        **what,
        "sets": {name: tofu.dataset_digest(members) for name, members in rows.items()},
        "holdout": tofu.encoded_digest(holdout),
    }
    _claim(out / RUN_FILE, key)
    with reporter.stage("evaluation", len(rows) + bool(holdout)) as stage:
        for done, (name, members) in enumerate(rows.items(), start=1):
            path = out / f"{name}.json"
            if not path.exists():
                others = (row for other in rows if other != name for row in rows[other])
                log = tofu.evaluate_set(
                    model, members, judge if name == "forget" else None, tofu.words_of(others)
                )
                write_atomically(path, log.model_dump_json().encode() + b"\n")
            stage.step(done)
        if holdout and not (out / HOLDOUT_FILE).exists():
            found = tofu.evaluate_holdout(model, holdout)
            write_atomically(out / HOLDOUT_FILE, found.model_dump_json().encode() + b"\n")
            stage.step(len(rows) + 1)
    return read_logs(out)


def read_logs(folder: Path) -> tofu.ModelLogs:
    """The logs of a complete evaluation. Raises: EvaluationError."""
    holdout = folder / HOLDOUT_FILE
    names = ("forget", *tofu.UTILITY_SETS)
    return tofu.ModelLogs(
        sets={name: tofu.read_log(folder / f"{name}.json", tofu.SetLog) for name in names},
        holdout=tofu.read_log(holdout, tofu.HoldoutLog) if holdout.exists() else None,
    )


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
