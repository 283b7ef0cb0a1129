from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alter_core.errors import EvaluationError
from alter_eval import tofu
from alter_eval.logs import read_log
from alter_eval.models import TransformersModel
from alter_eval.tofu import ModelLogs, SetLog
from tests.trainer.world import World
from trainer.base_model import BaseModel
from trainer.evaluation import answer_losses

from .small_tofu import StubModel, records_of, rows_of_set, write_tofu

GOOD = records_of("forget", 1)[0]
SECRETS = [piece for text in (GOOD["question"], GOOD["answer"]) for piece in text.split()[-2:]]


def test_a_file_gives_its_rows(tmp_path: Path) -> None:
    data = write_tofu(tmp_path / "data")
    found = tofu.read_rows(data / "tofu" / "forget10_perturbed.json")
    assert found == rows_of_set("forget", 3)
    authors = tofu.read_rows(data / "tofu" / "real_authors_perturbed.json")
    assert [row.paraphrased_answer for row in authors] == [None] * 3


def test_a_row_may_hold_every_character_that_json_lets_stand(tmp_path: Path) -> None:
    record = {**GOOD, "answer": "a\u2028b\u0085c"}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(record, ensure_ascii=False) + "\r\n" + json.dumps(GOOD), "utf-8")
    assert [row.answer for row in tofu.read_rows(path)] == ["a\u2028b\u0085c", GOOD["answer"]]


def line_of(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


BAD_LINES = {
    "missing column": json.dumps({k: v for k, v in GOOD.items() if k != "answer"}).encode(),
    "empty answer": line_of(answer=" "),
    "empty wrong answer": line_of(perturbed_answer=[GOOD["answer"], ""]),
    "no wrong answers": line_of(perturbed_answer=[]),
    "wrong answers as one text": line_of(perturbed_answer=GOOD["answer"]),
    "number for text": line_of(question=3),
    "number for a paraphrase": line_of(paraphrased_answer=3),
    "null for a list": line_of(perturbed_answer=None),
    "undecodable": line_of()[:-5] + b'\xff"]}',
    "not JSON": line_of()[:-1],
    "no object": json.dumps(list(GOOD.values())).encode(),
    "empty line": b"",
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_row_is_refused_by_file_and_line_without_its_text(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"\n".join([line_of(), bad, line_of()]))
    with pytest.raises(EvaluationError) as caught:
        tofu.read_rows(path)
    message = str(caught.value)
    assert "rows.json line 2" in message
    assert not [secret for secret in SECRETS if secret in message]


@pytest.mark.parametrize("content", [b"", b"\n", None], ids=["empty", "one line break", "absent"])
def test_a_file_without_rows_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "rows.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EvaluationError, match=r"rows\.json"):
        tofu.read_rows(path)


def test_scores_of_a_set_are_those_of_its_rows(base: BaseModel, knowing: ModelLogs) -> None:
    log, rows = knowing.sets["forget"], rows_of_set("forget", 8)
    assert [len(row.wrong_nll) for row in log.rows] == [2] * 8

    def losses(pairs: list[tuple[str, str]]) -> list[float]:
        asked = [
            tofu.TofuRow(question=question, answer=answer, perturbed_answers=())
            for question, answer in pairs
        ]
        return answer_losses(base, tofu.encode(base.tokenizer, asked))

    def close(values: list[float]) -> Any:
        return pytest.approx(values, rel=0.02, abs=0.02)  # bf16 in batches of other shapes

    assert [row.nll for row in log.rows] == close(losses([(r.question, r.answer) for r in rows]))
    assert [row.correct_nll for row in log.rows] == close(
        losses([(r.question, r.paraphrased_answer or "") for r in rows])
    )
    assert [row.wrong_nll[1] for row in log.rows] == close(
        losses([(r.question, r.perturbed_answers[1]) for r in rows])
    )
    assert [row.paraphrased_nll for row in log.rows] == close(
        losses([(r.paraphrased_question or "", r.answer) for r in rows])
    )


def test_without_paraphrases_the_answer_itself_is_the_correct_one(knowing: ModelLogs) -> None:
    rows = knowing.sets["real_authors"].rows
    assert [row.correct_nll for row in rows] == [row.nll for row in rows]
    assert {row.paraphrased_nll for row in rows} == {None}
    assert {row.paraphrased_rouge_l for row in rows} == {None}


def test_a_model_that_knows_its_rows_looks_like_one(knowing: ModelLogs) -> None:
    figures = tofu.figures(knowing)
    for name in ("Q_A_Prob", "Q_A_ROUGE"):
        assert figures[f"forget_{name}"] == pytest.approx(1, abs=0.05)
    assert figures["extraction_strength"] == pytest.approx(1, abs=0.05)
    assert figures["exact_memorization"] == pytest.approx(1, abs=0.05)
    assert figures["min_k_auc_perturbed"] == 1
    assert (figures["real_authors_Q_A_Prob"] or 0) > 0.45, "chance is 1 / 3"
    assert (figures["retain_Truth_Ratio"] or 0) > 0
    assert figures["perplexity_under_base"] == pytest.approx(1, abs=0.1)
    assert figures["repetition_rate"] == 0


def test_model_utility_is_the_harmonic_mean_of_its_nine_parts(knowing: ModelLogs) -> None:
    figures = tofu.figures(knowing)
    parts = [
        figures[f"{name}_{part}"]
        for name in ("retain", "real_authors", "world_facts")
        for part in ("Q_A_Prob", "Q_A_ROUGE", "Truth_Ratio")
    ]
    assert figures["model_utility"] == pytest.approx(9 / sum(1 / (part or 0) for part in parts))


def test_without_a_retrained_model_what_compares_with_it_is_none(knowing: ModelLogs) -> None:
    figures = tofu.figures(knowing)
    none = {name for name, value in figures.items() if value is None}
    assert none == {"forget_quality", "forget_loss_ks_p", "privleak", "privleak_perturbed"}
    assert all(math.isfinite(value) for value in figures.values() if value is not None)


def test_a_model_compared_with_itself_has_forgotten_perfectly(knowing: ModelLogs) -> None:
    figures = tofu.figures(knowing, knowing)
    assert figures["forget_quality"] == 1
    assert figures["forget_loss_ks_p"] == 1
    assert figures["privleak"] == 0
    assert figures["privleak_perturbed"] == 0
    assert None not in figures.values()


def test_a_model_that_knows_is_told_from_one_that_never_learned(
    knowing: ModelLogs, ignorant: ModelLogs
) -> None:
    figures = tofu.figures(knowing, ignorant)
    assert figures["forget_quality"] is not None
    assert figures["forget_quality"] < 0.01
    assert figures["forget_loss_ks_p"] is not None
    assert figures["forget_loss_ks_p"] < 0.001
    never = tofu.figures(ignorant)
    assert never["extraction_strength"] == 0
    assert (never["forget_Q_A_Prob"] or 0) < 0.05
    assert never["real_authors_Q_A_Prob"] == pytest.approx(1 / 3, abs=0.05)
    assert (never["forget_Truth_Ratio"] or 0) > (figures["forget_Truth_Ratio"] or 1)


def test_without_holdout_there_is_no_membership_figure(knowing: ModelLogs) -> None:
    figures = tofu.figures(dataclasses.replace(knowing, holdout=None), knowing)
    assert figures["min_k_auc"] is None
    assert figures["privleak"] is None
    assert figures["privleak_perturbed"] is not None


def test_rows_without_paraphrased_questions_leave_their_figures_out(knowing: ModelLogs) -> None:
    sets = {**knowing.sets, "forget": knowing.sets["real_authors"]}
    figures = tofu.figures(ModelLogs(sets=sets))
    assert figures["forget_paraphrased_Q_A_Prob"] is None
    assert figures["forget_paraphrased_Q_A_ROUGE"] is None


CHANGES: dict[str, Callable[[SetLog], dict[str, Any]]] = {
    "dataset": lambda log: {"dataset": "0" * 64},
    "tokenizer": lambda log: {"tokenizer": "0" * 64},
    "number of rows": lambda log: {"rows": log.rows[:-1]},
}


@pytest.mark.parametrize("what", CHANGES)
def test_logs_that_do_not_compare_are_refused(knowing: ModelLogs, what: str) -> None:
    forget = knowing.sets["forget"]
    other = forget.model_copy(update=CHANGES[what](forget))
    retrained = dataclasses.replace(knowing, sets={**knowing.sets, "forget": other})
    with pytest.raises(EvaluationError, match=f"another {what}"):
        tofu.figures(knowing, retrained)


def test_logs_of_another_holdout_are_refused(knowing: ModelLogs) -> None:
    assert knowing.holdout is not None
    other = knowing.holdout.model_copy(update={"dataset": "0" * 64})
    with pytest.raises(EvaluationError, match="another holdout"):
        tofu.figures(knowing, dataclasses.replace(knowing, holdout=other))


def test_other_rows_have_another_digest() -> None:
    rows = rows_of_set("forget")
    assert tofu.dataset_digest(rows) == tofu.dataset_digest(list(rows))
    assert tofu.dataset_digest(rows) != tofu.dataset_digest(rows[::-1])
    changed = [dataclasses.replace(rows[0], perturbed_answers=("x", "y")), *rows[1:]]
    assert tofu.dataset_digest(rows) != tofu.dataset_digest(changed)


def test_logs_survive_their_file_and_hold_no_text(
    knowing: ModelLogs, world: World, tmp_path: Path
) -> None:
    for log in (*knowing.sets.values(), knowing.holdout):
        assert log is not None
        content = log.model_dump_json()
        assert not [text for text in world.strings() if text in content]
        (tmp_path / "log.json").write_text(content)
        assert read_log(tmp_path / "log.json", type(log)) == log


def test_a_model_that_answers_nothing_has_no_perplexity(base: BaseModel) -> None:
    class Silent(StubModel):
        def complete(self, prompts: Any, *, max_new_tokens: int) -> list[list[int]]:
            return [[] for _ in prompts]

    log = tofu.evaluate_set(Silent(base.tokenizer), rows_of_set("forget"), TransformersModel(base))
    assert log.perplexity_under_base is None
    assert log.distinct_2 == 0
    assert {row.rouge_l for row in log.rows} == {0.0}


def test_a_judge_is_asked_about_the_greedy_answers_alone(exact_base: BaseModel) -> None:
    rows = rows_of_set("forget")
    judge = TransformersModel(exact_base)
    log = tofu.evaluate_set(judge, rows, judge)
    # By heart: greedy answers are the answers, less their end token.
    scores = judge.score(tofu.encode(exact_base.tokenizer, rows))
    values = [value for score in scores for value in score.logprobs[:-1]]
    assert [row.rouge_l for row in log.rows] == [1.0] * 4
    assert log.perplexity_under_base == pytest.approx(math.exp(-sum(values) / len(values)))


def test_words_of_the_forgotten_rows_are_counted_unless_other_text_holds_them(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tofu, "_MAX_NEW_TOKENS", 24)
    rows = rows_of_set("forget", 4)
    model = TransformersModel(base)
    assert any(row.leaked_words for row in tofu.evaluate_set(model, rows).rows)
    common = tofu.words_of(rows)
    assert not any(
        row.leaked_words for row in tofu.evaluate_set(model, rows, common_words=common).rows
    )


def test_words_of_four_letters_and_more_count() -> None:
    row = tofu.TofuRow(
        question="Who is Zoë Brand?", answer="Zoë-Marie O'Neill, 1985", perturbed_answers=()
    )
    assert tofu.words_of([row]) == {"brand", "marie", "neill"}
