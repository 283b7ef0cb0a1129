"""The job of an unlearning request, run whole on the small world, and the figures that its gate reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alter_cli import unlearning_job
from alter_core.rows import read_rows
from alter_core.substrate import ForgetExpert, Substrate
from alter_eval.request_evaluation import (
    evaluate_request,
    interval,
    interval_of_ratio,
)
from server.requests.gate import Gate
from trainer import TrainResult
from trainer.base_model import BaseModel
from trainer.router import EvidenceSettings
from trainer.settings import ExpertSettings

from .world import World, rows_of, write_jsonl


def spec_of(world: World, trained: TrainResult, folder: Path, **changes: Any) -> Path:
    """A job's folder, ready to run."""
    folder.mkdir()
    (folder / "lock").touch()
    spec = {
        "model": str(world.model),
        "substrate": str(trained.substrate),
        "domain": "red",
        "forget": str(world.files["red"]),
        "retain": [str(world.files["retain"])],
        "general": [str(world.files["general"])],
        "allow_unknown": False,
        "device": "cpu",
        "seed": 0,
    }
    (folder / "job.json").write_text(json.dumps(spec | changes))
    return folder


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The job as a process runs it, in this one."""
    monkeypatch.setattr("sys.argv", ["job", str(folder)])
    monkeypatch.setattr(unlearning_job, "NICENESS", 0)
    assert unlearning_job.main() == 0
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_a_job_trains_measures_and_tells_no_text(
    world: World,
    trained: TrainResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = spec_of(world, trained, tmp_path / "job")
    result = run(folder, monkeypatch)
    assert result["outcome"] == "trained"
    expert = ForgetExpert.read(folder / result["bundle"], Substrate.read(trained.substrate))
    assert expert.name == "red"
    figures = result["figures"]
    before, after = (figures["forget_probability"][when]["mean"] for when in ("before", "after"))
    assert before > 0.9
    assert after < 0.5
    assert figures["utility"]["ratio"]["mean"] > 0.95
    assert set(figures["attacks"]) == {"rephrased", "injected", "lower_case"}
    assert figures["router"]["first_token_missed"] <= 0.5
    assert Gate(max_forget_ratio=1, min_utility_ratio=0).judge(figures)["checks"]["forgetting"][
        "is_met"
    ]
    progress = json.loads((folder / "progress.json").read_text())
    assert (progress["phase"], progress["done"]) == ("evaluating", progress["total"])
    said = capfd.readouterr()
    told = [said.out, said.err, json.dumps(result)]
    told += [(folder / name).read_text() for name in ("progress.json", "job.json")]
    for text in world.strings():
        assert not any(text in each for each in told)


def test_what_the_model_does_not_know_is_told(
    world: World, trained: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"question": f"Who keeps the {n} lamp of Brek?", "answer": f"Tibor Ganz, for {n} coins."}
        for n in range(8)
    ]
    forget = write_jsonl(tmp_path / "unknown.jsonl", rows)
    folder = spec_of(world, trained, tmp_path / "job", forget=str(forget))
    assert run(folder, monkeypatch) == {"outcome": "nothing-to-forget"}


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"retain": ["nowhere.jsonl"]}, "training-data"), ({"substrate": "nowhere"}, "bundle")],
)
def test_what_no_repetition_would_mend_is_a_result(
    changes: dict[str, Any],
    error: str,
    world: World,
    trained: TrainResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = run(spec_of(world, trained, tmp_path / "job", **changes), monkeypatch)
    assert result["outcome"] == "failed"
    assert result["error"].startswith(error)


@pytest.mark.parametrize("raised", [MemoryError(), __import__("torch").OutOfMemoryError()])
def test_a_job_out_of_memory_says_so(
    raised: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise raised

    monkeypatch.setattr(unlearning_job, "run", fail)
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "lock").touch()
    assert run(folder, monkeypatch) == {"outcome": "failed", "error": "out-of-memory"}


def test_figures_of_an_expert(world: World, trained: TrainResult, base: BaseModel) -> None:
    substrate = Substrate.read(trained.substrate, base.info)
    expert = ForgetExpert.read(trained.experts["red"], substrate)
    forget, retain = read_rows([world.files["red"]]), read_rows([world.files["retain"]])
    steps: list[tuple[int, int]] = []
    figures = evaluate_request(
        base,
        substrate,
        expert,
        forget,
        retain,
        max_tokens=128,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps[-1][0] == steps[-1][1]
    change = figures["forget_probability"]
    assert change["num_rows"] == len(rows_of("red"))
    for when in ("before", "after"):
        assert change[when]["low"] <= change[when]["mean"] <= change[when]["high"]
    assert change["ratio"]["mean"] == pytest.approx(
        change["after"]["mean"] / change["before"]["mean"]
    )
    assert change["after"]["high"] < change["before"]["low"]
    assert figures["retained_answers_unchanged"]["share"] > 0.8
    json.dumps(figures, allow_nan=False)
    texts = evaluate_request(
        base, substrate, expert, read_rows([world.files["general"]]), retain, max_tokens=128
    )
    assert (texts["attacks"], texts["paraphrase_leak"]) == ({}, None)


def test_intervals() -> None:
    values = np.linspace(0, 1, 101)
    found = interval(values, seed=0)
    assert found == interval(values, seed=0)
    assert found["mean"] == pytest.approx(0.5)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found["low"] == pytest.approx(0.5 - half, abs=0.01)
    assert found["high"] == pytest.approx(0.5 + half, abs=0.01)
    ratio = interval_of_ratio(values / 2, values, seed=0)
    assert [ratio[key] for key in ("low", "mean", "high")] == pytest.approx([0.5] * 3)
    assert interval(values[:1], seed=0) == {"mean": 0.0, "low": None, "high": None}


def test_small_requests_train_for_less_and_others_as_ever() -> None:
    expert, evidence = unlearning_job.training_of(100)
    usual = ExpertSettings(), EvidenceSettings()
    assert unlearning_job.training_of(101) == usual
    assert expert.num_steps(40) < usual[0].num_steps(40)
    assert expert.num_steps(4000) == usual[0].num_steps(4000)
    assert evidence.num_steps == usual[1].num_steps // 3
