from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from alter_core.errors import ConfigError, EvaluationError, TrainingError
from alter_core.rows import read_rows
from benchmarks.methods import __main__ as program
from benchmarks.methods import published
from benchmarks.methods.contenders import CONTENDERS, EPOCHS, Alter, Gradient, named
from benchmarks.methods.data import RELEASES, check_release
from benchmarks.methods.jobs import TOFU, Measured, Plan
from benchmarks.methods.search import Criterion, Trial, best, search
from benchmarks.methods.tasks import RwkuTask
from tests.trainer.world import World
from trainer.base_model import BaseModel, load_base_model
from trainer.dataset import encode_rows
from trainer.methods import METHODS, WEIGHTINGS, make_method


def test_every_method_of_the_trainer_is_compared_and_every_setting_exists() -> None:
    gradients = [c for c in CONTENDERS.values() if isinstance(c, Gradient)]
    assert {contender.method for contender in gradients} == set(METHODS)
    assert {contender.weighting for contender in gradients} == set(WEIGHTINGS)
    for contender in gradients:
        make_method(
            contender.method, learning_rate=contender.rate, epochs=EPOCHS, **contender.settings
        )


def test_a_checkpoint_of_its_own_is_neither_revocable_nor_composable() -> None:
    for contender in CONTENDERS.values():
        if contender.served == "base":
            assert not contender.is_revocable
            assert not contender.is_composable
        if isinstance(contender, Alter):
            assert contender.is_revocable
            assert contender.is_composable


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as error:
        named("alter,forgetall")
    assert error.value.got == "forgetall"
    assert "npo_gd" in (error.value.expected or "")


def test_the_program_ends_with_2_before_anything_runs_on_an_unknown_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["methods", "--methods", "forgetall"])
    assert program.main() == 2
    assert "forgetall" in capsys.readouterr().err


def test_data_of_another_version_are_refused_by_name(tmp_path: Path) -> None:
    first = next(iter(RELEASES))
    with pytest.raises(EvaluationError, match="another version") as error:
        check_release(tmp_path)
    assert first in str(error.value)
    assert error.value.got == "FileNotFoundError"
    (tmp_path / first).parent.mkdir()
    (tmp_path / first).write_text("{}")
    with pytest.raises(EvaluationError, match="SHA-256"):
        check_release(tmp_path)


class _Judging:
    """A criterion by a made-up law: forgetting rises with the rate, utility falls above 1."""

    ignorant_loss = 5.0

    def trial(self, value: float, model: BaseModel) -> Trial:
        loss = 10 * value
        return Trial(value=value, forget_loss=loss, score=abs(loss - 5) + max(0.0, value - 1))


def _rates(start: float, num_trials: int, broken_above: float = math.inf) -> list[float]:
    def train(value: float) -> BaseModel:
        if value > broken_above:
            raise TrainingError("broke down")
        return cast(BaseModel, None)

    criterion = cast(Criterion, _Judging())
    trials = search(train, criterion, start=start, num_trials=num_trials)
    return [trial.value for trial in trials]


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (0.1, [0.1, 0.2, 0.4, 0.8, math.sqrt(0.32)]),
        (3.2, [3.2, 1.6, 0.8, 0.4, math.sqrt(0.32)]),
    ],
)
def test_a_search_brackets_the_wanted_loss_and_halves_the_bracket(
    start: float, expected: list[float]
) -> None:
    assert _rates(start, 5) == pytest.approx(expected)


def test_a_search_goes_below_rates_at_which_training_breaks_down() -> None:
    assert _rates(0.4, 3, broken_above=0.7) == pytest.approx([0.4, 0.8, math.sqrt(0.32)])


def test_a_search_ends_where_a_trial_is_good_enough() -> None:
    assert _rates(0.51, 4) == [0.51]


def test_the_best_trial_is_the_one_of_the_lowest_score_and_none_if_all_broke_down() -> None:
    trials = [
        Trial(value=v, forget_loss=v, score=s) for v, s in ((1.0, 0.7), (2.0, 0.3), (3.0, 0.5))
    ]
    assert best(trials).value == 2.0
    broken = [dataclasses.replace(trial, score=math.inf) for trial in trials]
    with pytest.raises(TrainingError, match="every rate"):
        best(broken)


def test_the_criterion_is_the_distance_from_ignorance_plus_the_utility_lost(world: World) -> None:
    base = load_base_model(world.model)
    forget = encode_rows(read_rows([world.files["red"]]), base.tokenizer, max_tokens=64)
    retain = encode_rows(read_rows([world.files["retain"]]), base.tokenizer, max_tokens=64)
    plain = Criterion(forget=forget, retain=retain, ignorant_loss=1.0, retained_probability=1.0)
    loss = plain.trial(0.1, base).forget_loss
    exact = dataclasses.replace(plain, ignorant_loss=loss, retained_probability=1e-9)
    assert exact.trial(0.1, base).score == pytest.approx(0, abs=1e-6)
    half = dataclasses.replace(exact, ignorant_loss=2 * loss)
    assert half.trial(0.1, base).score == pytest.approx(0.5, abs=1e-6)
    far = dataclasses.replace(exact, ignorant_loss=loss / 9)
    assert far.trial(0.1, base).score == pytest.approx(1, abs=1e-6)
    spoilt = dataclasses.replace(exact, retained_probability=1e9)
    assert spoilt.trial(0.1, base).score == pytest.approx(1, abs=1e-6)


def test_derived_figures_are_ratios_to_base_and_points_over_the_retrained_model() -> None:
    references = {
        "base": {"model_utility": 0.8},
        "retrained": {"forget_paraphrased_Q_A_ROUGE": 0.25, "repetition_rate": 0.1},
    }
    figures = {
        "model_utility": 0.6,
        "forget_paraphrased_Q_A_ROUGE": 0.3,
        "repetition_rate": 0.15,
    }
    found = program._derived(cast(Any, figures), cast(Any, references))
    assert found["utility_ratio"] == pytest.approx(0.75)
    assert found["paraphrase_leak_points"] == pytest.approx(5)
    assert found["repetition_ratio"] == pytest.approx(1.5)


def test_a_judge_that_is_down_leaves_its_reason() -> None:
    refused: dict[str, str] = {}
    options = SimpleNamespace(judge_url="http://127.0.0.1:9/v1", judge_model="none")
    assert program._judge(cast(Any, options), refused) is None
    assert "judge" in refused["judge"].lower()


def test_the_page_shows_what_was_refused_and_says_what_was_not_measured(tmp_path: Path) -> None:
    reference = {
        "model_utility": 0.8,
        "forget_quality": 1.0,
        "forget_paraphrased_Q_A_ROUGE": 0.25,
        "repetition_rate": 0.1,
    }
    path = program._write(
        tmp_path,
        Plan(data=tmp_path, tasks=(TOFU,), num_seeds=1),
        {"npo": CONTENDERS["npo"], "rmu": CONTENDERS["rmu"]},
        {
            "npo": Measured(
                figures={TOFU: [{**reference, "train_s": 7.0}]}, settings={}, num_parameters=11
            ),
            "rmu": Measured(figures={}, settings={}, num_parameters=0, refused="no such layer"),
        },
        {TOFU: {"base": cast(Any, reference), "retrained": cast(Any, reference)}},
        {},
        {"rmu": "no such layer"},
        prepared_s=0.0,
        started=0.0,
    )
    page = path.with_suffix(".md").read_text("utf-8")
    assert "no such layer" in page
    assert "| npo | 11 | 1.00 | 1.00 | no | no |" in page
    assert '"npo_model_utility_ratio": 1.0' in path.read_text("utf-8")
    assert '"alter_latency_ratio": null' in path.read_text("utf-8")
    assert (tmp_path / "methods.png").exists()


def test_published_figures_are_of_known_methods() -> None:
    rows = set(published.UNTUNED) | set(published.TUNED)
    assert rows - {"base", "retrained"} <= set(CONTENDERS)
    assert "| npo | 0.02 | 0.77 | 0.95 | 0.062 |" in published.table()


def test_rwku_methods_are_shown_no_question_about_the_forgotten_and_no_neighbour(
    data_dir: Path, tmp_path: Path
) -> None:
    task = RwkuTask(data_dir, tmp_path)
    shown = [row.turns[0][1] for row in read_rows([task.forget, task.retain])]
    for name, rows in task.sets.items():
        asked = [row.query for row in rows]
        hits = sum(any(query in text for text in shown) for query in asked)
        assert hits == (len(asked) if name == "forget_level1" else 0), name
