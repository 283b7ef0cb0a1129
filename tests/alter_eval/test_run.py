from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from alter_core.errors import EvaluationError
from alter_core.rows import read_rows
from alter_eval import tofu
from alter_eval.run import evaluate, read_logs, tofu_rows
from tests.trainer.world import World
from trainer.base_model import BaseModel
from trainer.dataset import EncodedRow, encode_rows
from trainer.progress import SilentReporter

from .small_tofu import SETS, StubModel, rows_of_set, write_tofu

FILES = {"run.json", "holdout.json", *(f"{name}.json" for name in SETS)}
WHAT = {"model": "a" * 8, "split": "10", "experts": {}}


@pytest.fixture(scope="module")
def holdout(base: BaseModel, world: World) -> list[EncodedRow]:
    return encode_rows(read_rows([world.files["general"]]), base.tokenizer, max_tokens=64)


def run(
    model: StubModel, out: Path, holdout: list[EncodedRow], what: dict[str, Any] = WHAT
) -> tofu.ModelLogs:
    return evaluate(
        model,
        {name: rows_of_set(name) for name in SETS},
        out,
        what=what,
        holdout=holdout,
        judge=model,
        reporter=SilentReporter(),
    )


@pytest.fixture(scope="module")
def finished(
    base: BaseModel, holdout: list[EncodedRow], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    run(StubModel(base.tokenizer), out, holdout)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A finished evaluation to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_an_evaluation_writes_its_logs_and_what_they_are_of(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == FILES
    key = json.loads((finished / "run.json").read_text())
    assert key["model"] == WHAT["model"]
    assert key["sets"]["forget"] == tofu.dataset_digest(rows_of_set("forget"))
    logs = read_logs(finished)
    assert logs.holdout is not None
    assert key["holdout"] == logs.holdout.dataset


def test_only_the_forgotten_answers_are_judged(finished: Path) -> None:
    logs = read_logs(finished).sets
    judged = {name for name, log in logs.items() if log.perplexity_under_base is not None}
    assert judged == {"forget"}


def test_a_finished_evaluation_asks_nothing(
    base: BaseModel, holdout: list[EncodedRow], out: Path
) -> None:
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    logs = run(StubModel(base.tokenizer, max_calls=0), out, holdout)
    assert logs == read_logs(out)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_stopped_evaluation_goes_on_to_the_same_logs(
    base: BaseModel, holdout: list[EncodedRow], finished: Path, tmp_path: Path
) -> None:
    whole = StubModel(base.tokenizer)
    run(whole, tmp_path / "whole", holdout)
    stopped = StubModel(base.tokenizer, max_calls=whole.num_calls - 3)
    with pytest.raises(AssertionError, match="the model was asked"):
        run(stopped, tmp_path / "out", holdout)
    assert not (tmp_path / "out" / "holdout.json").exists()
    rest = StubModel(base.tokenizer)
    assert run(rest, tmp_path / "out", holdout) == read_logs(finished)
    assert 0 < rest.num_calls < whole.num_calls


@pytest.mark.parametrize("changed", ["model", "experts", "rows", "holdout"])
def test_a_folder_of_another_evaluation_is_refused(
    base: BaseModel, holdout: list[EncodedRow], out: Path, changed: str
) -> None:
    model = StubModel(base.tokenizer, max_calls=0)
    what: dict[str, Any] = dict(WHAT)
    sets = {name: rows_of_set(name) for name in SETS}
    if changed == "rows":
        sets["retain"] = sets["retain"][1:]
    elif changed == "holdout":
        holdout = holdout[1:]
    else:
        what[changed] = "another"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(EvaluationError, match="holds another evaluation"):
        evaluate(
            model,
            sets,
            out,
            what=what,
            holdout=holdout,
            judge=None,
            reporter=SilentReporter(),
        )
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("name", ["forget.json", "world_facts.json", "holdout.json"])
def test_a_torn_log_is_named(
    base: BaseModel, holdout: list[EncodedRow], out: Path, name: str
) -> None:
    content = (out / name).read_bytes()
    (out / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(EvaluationError, match=name):
        run(StubModel(base.tokenizer, max_calls=0), out, holdout)


def test_an_unfinished_evaluation_is_no_reference(out: Path) -> None:
    (out / "retain.json").unlink()
    with pytest.raises(EvaluationError, match=r"retain\.json"):
        read_logs(out)


def test_an_evaluation_needs_no_holdout(base: BaseModel, tmp_path: Path) -> None:
    logs = run(StubModel(base.tokenizer), tmp_path / "out", [])
    assert logs.holdout is None
    assert not (tmp_path / "out" / "holdout.json").exists()


def test_a_split_names_its_files_and_asks_forgotten_rows_alone_in_other_words(
    tmp_path: Path,
) -> None:
    data = write_tofu(tmp_path / "data")
    found = tofu_rows(data, "10")
    assert found["forget"] == rows_of_set("forget", 3)
    assert found == {
        name: [
            dataclasses.replace(row, paraphrased_question=None) if name != "forget" else row
            for row in rows_of_set(name, 3)
        ]
        for name in SETS
    }
    with pytest.raises(EvaluationError, match="forget05_perturbed"):
        tofu_rows(data, "05")
