"""One contender from search to figures, in a process of its own that uses one thread."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alter_cli.demo.artefacts import package_folder, sources
from alter_core.errors import AlterError
from alter_eval import fluency
from alter_eval.judge import Judge
from benchmarks.tofu.experiment import Figures
from benchmarks.tofu.reference import CACHE
from trainer.checkpoint import write_atomically

from . import alter, attacks, eco, gradient
from .contenders import Alter, Contender, Eco, Gradient
from .search import Criterion, best
from .tasks import RwkuTask, Task, TofuTask, reference_figures
from .unlearned import Unlearned

TOFU, RWKU = TofuTask.name, RwkuTask.name
_FLUENCY_PROMPTS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run for every contender."""

    data: Path
    tasks: tuple[str, ...] = (TOFU, RWKU)
    num_seeds: int = 3
    num_trials: int = 4
    """Trainings of the search at most, on TOFU's task and the first seed."""
    judge_url: str | None = None
    judge_model: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A row of the tables."""

    figures: dict[str, list[Figures]]
    """By task, of every seed."""
    settings: dict[str, Any]
    """What the search found, and what it tried."""
    num_parameters: int
    refused: str | None = None
    """Why there are no figures, or fewer."""
    is_kept: bool = False
    """Whether an earlier call measured it, by the same code."""


def prepare(plan: Plan, task: str) -> dict[str, Figures]:
    """Figures of a task's base and retrained model, which are trained if need be."""
    torch.set_num_threads(1)
    return reference_figures(_task(plan, task))


def measure(plan: Plan, name: str, contender: Contender) -> Measured:
    """Searches, trains and measures a contender; what this code measured before is found again."""
    torch.set_num_threads(1)
    key = json.dumps([str(plan), name, repr(contender), _code(contender)])
    kept = CACHE / f"method-{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    if kept.exists():
        return Measured(**json.loads(kept.read_bytes()) | {"is_kept": True})
    try:
        found = _Job(plan, contender).run()
    except AlterError as error:
        return Measured(figures={}, settings={}, num_parameters=0, refused=str(error))
    if found.refused is None:
        write_atomically(kept, json.dumps(dataclasses.asdict(found), indent=1).encode())
    return found


def _code(contender: Contender) -> list[str]:
    """The sources that a contender's figures follow from."""
    own = {Alter: "alter", Eco: "eco"}.get(type(contender))
    evaluation, here = (
        "fluency,judge,metrics,models,prompts,rwku,tofu",
        "attacks,gradient,search,tasks",
    )
    return [
        sources(package_folder("trainer")),
        sources(package_folder("alter_core")),
        sources(package_folder("alter_eval"), f"{evaluation},eco" if own == "eco" else evaluation),
        sources(Path(__file__).parent, f"{here},{own}" if own else here),
    ]


class _Job:
    def __init__(self, plan: Plan, contender: Contender) -> None:
        self.plan, self.contender = plan, contender
        self.settings: dict[str, Any] = {}
        self.num_parameters = 0
        self.refused: str | None = None

    def run(self) -> Measured:
        with tempfile.TemporaryDirectory() as folder:
            self.scratch = Path(folder)
            if isinstance(self.contender, Gradient):
                self._search(self.contender)
            figures = {
                name: [self._measured(_task(self.plan, name), seed) for seed in self._seeds()]
                for name in self.plan.tasks
                if name == TOFU or not self.contender.is_ablation
            }
        return Measured(
            figures=figures,
            settings=self.settings,
            num_parameters=self.num_parameters,
            refused=self.refused,
        )

    def _seeds(self) -> range:
        return range(self.plan.num_seeds)

    def _search(self, contender: Gradient) -> None:
        task = _task(self.plan, TOFU)
        trials = gradient.searched(
            contender,
            task,
            Criterion.of(task, 0),
            num_trials=self.plan.num_trials,
            seed=0,
            scratch=self.scratch,
        )
        self.settings["learning_rate"] = best(trials).value
        self.settings["trials"] = [dataclasses.astuple(trial) for trial in trials]

    def _measured(self, task: Task, seed: int) -> Figures:
        unlearned = self._unlearned(task, seed)
        self.num_parameters = unlearned.num_parameters
        with unlearned.open() as opened:
            figures = task.figures(opened.model, opened.judge)
            if seed == 0 and task.name == TOFU and self.plan.judge_url:
                figures |= self._fluency(opened.model, task)
        figures["train_s"] = unlearned.train_s
        if seed == 0 and task.name == TOFU:
            figures |= attacks.recovery(unlearned, task, seed)
        return figures

    def _unlearned(self, task: Task, seed: int) -> Unlearned:
        if isinstance(self.contender, Gradient):
            rate = self.settings["learning_rate"]
            return gradient.run(self.contender, task, rate, seed=seed, scratch=self.scratch)
        if isinstance(self.contender, Alter):
            return alter.run(self.contender, task, seed=seed, cache=CACHE)
        made = eco.run(task, Criterion.of(task, seed), seed=seed)
        self.settings[f"strength/{task.name}/{seed}"] = made.settings["strength"]
        return made

    def _fluency(self, model: Any, task: Task) -> Figures:
        judge = Judge(self.plan.judge_url or "", self.plan.judge_model or "")
        questions = [row.question for row in task.asked()[:_FLUENCY_PROMPTS]]
        try:
            log = fluency.evaluate_prompts(model, judge, questions, seed=0)
        except AlterError as error:
            self.refused = str(error)
            return {}
        finally:
            judge.close()
        return fluency.figures([log])


def _task(plan: Plan, name: str) -> Task:
    return TofuTask(plan.data) if name == TOFU else RwkuTask(plan.data, CACHE)


def refused(rows: Sequence[tuple[str, Measured]]) -> dict[str, str]:
    """Reasons by contender."""
    return {name: found.refused for name, found in rows if found.refused}
