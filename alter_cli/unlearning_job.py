"""The job of an unlearning request: trains its expert, and measures it. Started by `server.requests.jobs`.

    python -m alter_cli.unlearning_job FOLDER

Reads FOLDER/job.json, writes FOLDER/out, progress.json and, last, result.json. It prints figures and names of
files, no text of the request.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from alter_core.errors import AlterError, NothingToForgetError, problem_kind
from alter_core.rows import read_rows
from alter_core.substrate import ForgetExpert, Substrate
from alter_eval.request_evaluation import evaluate_request
from server.requests.jobs import LOCK, OUT, PROGRESS, RESULT, SPEC
from server.requests.workspace import write_synced
from trainer.base_model import load_base_model
from trainer.router import EvidenceSettings
from trainer.run import train
from trainer.settings import ExpertSettings, TrainSettings

NICENESS = 9
"""Serving comes first."""
_REPORT_S = 0.5
_FEW_ROWS = 100
_FEW_STEPS = 70
"""Of the expert of a request with so few rows: see decision 0016."""
_MAX_RETAIN_ROWS = 128
"""So many rows of the retain sample are measured."""


class FileReporter:
    """A `trainer.progress.Reporter` that writes into a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written_at = -math.inf

    @contextlib.contextmanager
    def stage(self, name: str, num_steps: int) -> Iterator[_Stage]:
        """See Reporter."""
        self.write("training", name, 0, num_steps, is_due=True)
        yield _Stage(self, name, num_steps)

    def say(self, line: str) -> None:
        """See Reporter."""
        print(line, flush=True)

    def write(self, phase: str, stage: str, done: int, total: int, *, is_due: bool = False) -> None:
        """Replaces what is written, unless that is very recent."""
        now = time.monotonic()
        if is_due or now - self._written_at >= _REPORT_S:
            self._written_at = now
            shown = {"phase": phase, "stage": stage, "done": done, "total": total}
            temporary = self._path.with_suffix(".part")
            temporary.write_text(json.dumps(shown))
            temporary.replace(self._path)


class _Stage:
    def __init__(self, reporter: FileReporter, name: str, total: int) -> None:
        self._reporter, self._name, self._total = reporter, name, total

    def step(self, completed: int, **figures: float) -> None:
        """See `trainer.progress.Stage`."""
        self._reporter.write("training", self._name, completed, self._total)


def training_of(num_rows: int) -> tuple[ExpertSettings, EvidenceSettings]:
    """How an expert of so many rows is trained: small ones with fewer steps than `alter train` takes."""
    expert, evidence = ExpertSettings(), EvidenceSettings()
    if num_rows > _FEW_ROWS:
        return expert, evidence
    return (
        dataclasses.replace(expert, min_steps=_FEW_STEPS),
        dataclasses.replace(
            evidence,
            pointwise_steps=evidence.pointwise_steps // 3,
            bag_steps=evidence.bag_steps // 3,
        ),
    )


def run(folder: Path) -> dict[str, Any]:
    """Does the job; what `result.json` is to hold.

    Raises: AlterError for what no repetition would mend; MemoryError.
    """
    spec = json.loads((folder / SPEC).read_bytes())
    reporter = FileReporter(folder / PROGRESS)
    domain, forget = spec["domain"], Path(spec["forget"])
    rows = read_rows([forget])
    expert, evidence = training_of(len(rows))
    settings = TrainSettings(
        expert_settings=expert,
        evidence_settings=evidence,
        model=Path(spec["model"]),
        out=folder / OUT,
        forget={domain: forget},
        retain=tuple(map(Path, spec["retain"])),
        general=tuple(map(Path, spec["general"])),
        substrate=Path(spec["substrate"]),
        allow_unknown=spec["allow_unknown"],
        device=spec["device"],
        seed=spec["seed"],
        evaluation_rows=0,  # measured below
        resume=True,
    )
    try:
        trained = train(settings, reporter)
    except NothingToForgetError:
        return {"outcome": "nothing-to-forget"}
    base = load_base_model(settings.model, device=settings.device)
    substrate = Substrate.read(Path(spec["substrate"]), base.info)
    made = ForgetExpert.read(trained.experts[domain], substrate)
    figures = evaluate_request(
        base,
        substrate,
        made,
        rows,
        read_rows(settings.retain)[:_MAX_RETAIN_ROWS],
        max_tokens=min(settings.max_tokens, base.max_tokens),
        seed=settings.seed,
        progress=lambda done, total: reporter.write(
            "evaluating", "evaluation", done, total, is_due=True
        ),
    )
    figures["router"] = (made.evaluation or {}).get("router")
    return {
        "outcome": "trained",
        "bundle": str(trained.experts[domain].relative_to(folder)),
        "figures": figures,
    }


def main() -> int:
    """Runs the job of the folder that the command line names; its exit status says nothing."""
    folder = Path(sys.argv[1])
    with (folder / LOCK).open("r+b") as lock:
        lock.write(f"{os.getpid():<20}".encode())
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    try:
        result = run(folder)
    except AlterError as error:
        print(error, flush=True)
        result = {"outcome": "failed", "error": problem_kind(type(error))}
    except MemoryError:
        result = {"outcome": "failed", "error": "out-of-memory"}
    except torch.OutOfMemoryError:
        result = {"outcome": "failed", "error": "out-of-memory"}
    write_synced(folder / RESULT, json.dumps(result).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
