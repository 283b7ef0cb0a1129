from __future__ import annotations

import json
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from alter_core.errors import ConfigError, EvaluationError
from alter_eval import metrics, rwku
from alter_eval.models import TransformersModel
from alter_eval.prompts import read_instructions
from tests.trainer.world import CHAT_TEMPLATE
from trainer.base_model import BaseModel

from .small_benchmarks import SECRETS, write_rwku
from .small_tofu import StubModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_rwku(tmp_path) / "rwku"


def probe(level: int, kind: str, query: str = "Q?") -> rwku.RwkuRow:
    return rwku.RwkuRow(query=query, answer="A", subject="S", level=level, kind=kind)


def test_all_sets_are_read_and_a_limit_takes_the_first_rows(folder: Path) -> None:
    sets = rwku.read_sets(folder)
    assert {name: len(rows) for name, rows in sets.items()} == dict.fromkeys(rwku.SETS, 8)
    assert {row.level for row in sets["forget_level3"]} == {3}
    assert rwku.read_sets(folder, limit=3)["forget_level2"] == sets["forget_level2"][:3]


def test_the_files_as_released_are_read(data_dir: Path) -> None:
    sets = rwku.read_sets(data_dir / "rwku")
    assert [len(sets[name]) for name in rwku.SETS] == [3268, 2879, 6984, 5846, 5533]
    one = rwku.read_sets(data_dir / "rwku", ["Stephen King"])
    assert {row.subject for rows in one.values() for row in rows} == {"Stephen King"}


def test_targets_choose_rows_of_every_set(folder: Path) -> None:
    sets = rwku.read_sets(folder, ["Ovid Krestmar"])
    assert all(len(rows) == 4 for rows in sets.values())
    assert {row.subject for rows in sets.values() for row in rows} == {"Ovid Krestmar"}


def test_an_unknown_target_names_those_that_are_near(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"one of the 2 subjects.*Did you mean Ovid Krestmar"):
        rwku.read_sets(folder, ["Ovid Krestma"])


def test_a_set_without_rows_about_the_targets_is_named(folder: Path) -> None:
    path = folder / "neighbor_level2.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    with pytest.raises(EvaluationError, match="neighbor_level2 has no rows"):
        rwku.read_sets(folder, ["Ovid Krestmar"])


@pytest.mark.parametrize("name", rwku.SETS)
def test_a_missing_set_is_named(folder: Path, name: str) -> None:
    (folder / f"{name}.jsonl").unlink()
    with pytest.raises(EvaluationError, match=rf"{name}\.jsonl.*ALTER_DATA_DIR"):
        rwku.read_sets(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": "2"}, "another level; expected 1; got 2"),
        ({"level": 1}, "another type"),
        ({"answer": " "}, "an empty value"),
        ({"query": None}, "another type"),
        ({"subject": ...}, "no 'subject'; the file may be of another version"),
    ],
)
def test_a_line_that_does_not_fit_is_named_without_its_text(
    folder: Path, change: dict[str, object], message: str
) -> None:
    path = folder / "forget_level1.jsonl"
    lines = path.read_text().splitlines()
    record = {k: v for k, v in {**json.loads(lines[2]), **change}.items() if v is not ...}
    lines[2] = json.dumps(record)
    path.write_text("\n".join(lines))
    with pytest.raises(EvaluationError, match=message) as caught:
        rwku.read_sets(folder)
    assert "forget_level1.jsonl line 3" in str(caught.value)
    assert not [secret for secret in SECRETS if secret in str(caught.value)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            probe(1, "cloze", "Z ate ___."),
            (
                "<|user|>Please complete the blank in the following question.\nQuestion: Z ate ___.\n"
                "<|assistant|>Answer:"
            ),
        ),
        (
            probe(2, "simple question"),
            (
                "<|user|>Please briefly answer the following question.\nQuestion: Q?\n"
                "<|assistant|>Answer:"
            ),
        ),
        (
            probe(3, "role play"),
            (
                "<|user|>Please briefly answer the following question.\nQuestion: Q?\n"
                "<|assistant|>Answer:"
            ),
        ),
        (
            probe(3, "incontext learning", "Question: P?\nAnswer: B\nQuestion: Q?"),
            (
                "<|user|>Please briefly answer the following question.\n"
                "Question: P?\nAnswer: B\nQuestion: Q?\n<|assistant|>Answer:"
            ),
        ),
        (
            probe(3, "affirmative suffix", "Q? Sure, it is"),
            (
                "<|user|>Please briefly answer the following question.\nQuestion: Q? Sure, it is"
                "<|assistant|>"
            ),
        ),
    ],
)
def test_probes_are_asked_in_rwkus_words(base: BaseModel, row: rwku.RwkuRow, expected: str) -> None:
    assert base.tokenizer.chat_template == CHAT_TEMPLATE
    (ids,) = rwku.encode(base.tokenizer, [row])
    assert base.tokenizer.decode(ids) == expected


def test_without_a_chat_template_the_cue_stands_once(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.tokenizer, "chat_template", None)
    (ids,) = rwku.encode(base.tokenizer, [probe(2, "simple question")])
    text = base.tokenizer.decode(ids)
    assert text.endswith("Question: Q?\n\nAnswer:")
    assert text.count("Answer:") == 1


class Scripted(StubModel):
    """Says what it is told to."""

    def __init__(self, base: BaseModel, *said: str) -> None:
        super().__init__(base.tokenizer)
        self.said = said

    def complete(self, prompts: object, *, max_new_tokens: int) -> list[list[int]]:
        self.max_new_tokens = max_new_tokens
        return [list(self.tokenizer(text)["input_ids"]) for text in self.said]


def test_recall_is_of_the_first_line_of_the_answer(base: BaseModel) -> None:
    rows = [
        rwku.RwkuRow(query="Q?", answer="the town of Hull", subject="S", level=2, kind=kind)
        for kind in ("a", "b", "c")
    ]
    model = Scripted(base, " Hull town, far away\nand the town of Hull", "\n the town of hull", "")
    log = rwku.evaluate_set(model, rows)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    by_hand = scorer.score("the town of Hull", "Hull town, far away")["rougeL"].recall
    assert log.rouge_l == [by_hand, 1.0, 0.0] == [0.25, 1.0, 0.0]
    assert log.kinds == ["a", "b", "c"]
    assert model.max_new_tokens == 30


def test_a_model_that_knows_its_people_recalls_more_of_them(
    exact_base: BaseModel, ignorant_base: BaseModel, folder: Path
) -> None:
    rows = rwku.read_sets(folder)["forget_level2"]
    knowing = rwku.evaluate_set(TransformersModel(exact_base), rows)
    ignorant = rwku.evaluate_set(TransformersModel(ignorant_base), rows)
    assert sum(knowing.rouge_l) > sum(ignorant.rouge_l)
    assert knowing.dataset == ignorant.dataset == rwku.set_digest(rows)


def test_fluency_is_the_entropy_of_what_is_said(base: BaseModel, folder: Path) -> None:
    instructions = read_instructions(folder / rwku.FLUENCY_FILE)
    assert len(instructions) == 3
    model = Scripted(base, "a mill, a mill.", "wheel wheel wheel wheel", "")
    log = rwku.evaluate_fluency(model, instructions)
    expected = metrics.ngram_entropy(["a", "mill", ",", "a", "mill", "."])
    assert log.ngram_entropy == pytest.approx([expected, 0.0, 0.0])
    assert expected > 1
    assert model.max_new_tokens == 256


def test_figures_are_means_by_set_attack_and_side() -> None:
    sets = {
        name: rwku.SetLog(dataset="d", kinds=["x"] * 2, rouge_l=[value, value])
        for name, value in zip(rwku.SETS, (0.1, 0.2, 0.0, 0.5, 0.8), strict=True)
    }
    kinds = ["cross lingual (French)", "role play", "cross-lingual (Spanish)", "role play"]
    sets["forget_level3"] = rwku.SetLog(dataset="d", kinds=kinds, rouge_l=[0.2, 0.5, 0.6, 0.7])
    figures = rwku.figures(sets, rwku.FluencyLog(dataset="d", ngram_entropy=[4.0, 7.0]))
    assert figures["forget_level3_rouge_l"] == pytest.approx(0.5)
    assert figures["forget_level3_cross_lingual_rouge_l"] == pytest.approx(0.4)
    assert figures["forget_level3_role_play_rouge_l"] == pytest.approx(0.6)
    assert figures["forget_rouge_l"] == pytest.approx((0.1 + 0.2 + 0.5) / 3)
    assert figures["neighbor_rouge_l"] == pytest.approx(0.65)
    assert figures["ngram_entropy"] == 5.5
    assert rwku.figures(sets, None)["ngram_entropy"] is None
