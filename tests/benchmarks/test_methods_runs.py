"""Contenders run whole, on the small world instead of TOFU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from alter_core.errors import ConfigError
from alter_core.rows import read_rows
from alter_eval import tofu
from alter_eval.models import LanguageModel
from benchmarks.methods import alter, attacks, eco, gradient
from benchmarks.methods.contenders import CONTENDERS, Alter, Gradient
from benchmarks.methods.search import Criterion
from benchmarks.tofu.experiment import Figures, encoded_files
from tests.trainer.world import World
from trainer.evaluation import answer_losses, mean


@dataclasses.dataclass(frozen=True)
class _WorldTask:
    """One domain of the small world."""

    base_folder: Path
    retrained_folder: Path
    forget: Path
    retain: Path
    general: tuple[Path, ...]
    name: str = "world"
    domain: str = "red"

    def figures(self, model: LanguageModel, judge: LanguageModel | None = None) -> Figures:
        raise NotImplementedError

    def asked(self) -> list[tofu.TofuRow]:
        rows = [dict(row.turns) for row in read_rows([self.forget])]
        return [
            tofu.TofuRow(question=row["user"], answer=row["assistant"], perturbed_answers=())
            for row in rows
        ]


@pytest.fixture(scope="module")
def task(world: World) -> _WorldTask:
    files = world.files
    return _WorldTask(
        world.model, world.model, files["red"], files["retain"], (files["general"], files["blue"])
    )


@pytest.fixture(scope="module")
def criterion(task: _WorldTask) -> Criterion:
    return Criterion.of(task, seed=0)


def test_a_search_leaves_the_model_of_every_trial_and_run_opens_it_again(
    task: _WorldTask, criterion: Criterion, tmp_path: Path
) -> None:
    contender = CONTENDERS["grad_diff"]
    assert isinstance(contender, Gradient)
    contender = dataclasses.replace(contender, rate=1e-3)
    trials = gradient.searched(contender, task, criterion, num_trials=2, seed=0, scratch=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(trials) == 2
    made = gradient.run(contender, task, trials[1].value, seed=0, scratch=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert made.settings == {"learning_rate": trials[1].value}
    with made.open() as opened:
        found = mean(answer_losses(opened.base, criterion.forget))
        assert found == pytest.approx(trials[1].forget_loss)
        before = opened.judge.score(criterion.forget)
    assert mean([scores.nll for scores in before]) < criterion.ignorant_loss / 2


def test_spans_need_tofus_perturbed_answers(
    task: _WorldTask, criterion: Criterion, tmp_path: Path
) -> None:
    contender = CONTENDERS["grad_diff_spans"]
    assert isinstance(contender, Gradient)
    with pytest.raises(ConfigError, match="Knowledge spans"):
        gradient.run(contender, task, 1e-4, seed=0, scratch=tmp_path)


@pytest.mark.slow
def test_alters_masks_share_the_router_and_forget(
    task: _WorldTask, criterion: Criterion, tmp_path: Path
) -> None:
    for name in ("alter", "alter_uniform"):
        contender = CONTENDERS[name]
        assert isinstance(contender, Alter)
        made = alter.run(contender, task, seed=0, cache=tmp_path)
        with made.open() as opened:
            forgotten = mean(answer_losses(opened.base, criterion.forget))
            judged = mean([scores.nll for scores in opened.judge.score(criterion.forget)])
        assert judged < criterion.ignorant_loss / 2 < forgotten
    assert len(list(tmp_path.glob("alter-world-*/run.json"))) == 1


def test_corrupted_prompts_are_told_apart_and_leave_retained_answers_alone(
    task: _WorldTask, criterion: Criterion
) -> None:
    made = eco.run(task, criterion, seed=0)
    assert made.num_parameters == 0
    with made.open() as opened:
        retain = encoded_files(opened.base, task.retain)
        kept = [scores.nll for scores in opened.model.score(retain)]
        assert kept == [scores.nll for scores in opened.judge.score(retain)]
        forgotten = mean([scores.nll for scores in opened.model.score(criterion.forget)])
        known = mean([scores.nll for scores in opened.judge.score(criterion.forget)])
    assert forgotten > known


def test_attacks_change_a_copy(task: _WorldTask, criterion: Criterion) -> None:
    made = eco.run(task, criterion, seed=0)
    figures = attacks.recovery(made, task, seed=0)
    assert set(figures) == {"int4_recovery_points", "relearning_recovery_points"}
    with made.open() as opened:
        known = mean([scores.nll for scores in opened.judge.score(criterion.forget)])
    assert known < criterion.ignorant_loss / 2
