from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from alter_core import AlterConfig
from alter_core.attach import AttachedModel
from alter_core.errors import ConfigError, EngineError
from alter_eval import harness
from alter_eval.harness import SubjectLog, accuracy_figures, evaluate_subject, harness_model
from alter_eval.models import TransformersModel
from alter_eval.multiple_choice import Question, Subject
from alter_eval.source import Evaluated, Source
from tests.support.tiny import random_expert, random_substrate
from tests.trainer.world import World
from trainer.base_model import BaseModel
from trainer.dataset import EncodedRow

from .conftest import FakeServer
from .small_benchmarks import quiz

SUBJECT = Subject(
    test=[Question(**{**row, "choices": tuple(row["choices"])}) for row in quiz("red", 7)],
    dev=[Question(**{**row, "choices": tuple(row["choices"])}) for row in quiz("blue", 5)],
)


def evaluated(base: BaseModel, world: World, server: str | None = None) -> Evaluated:
    source = Source(model=world.model, device="cpu", server=server, served_model="tiny")
    return Evaluated(source=source, base=base, model=TransformersModel(base), what={})


def text_of(question: Question, *, is_solved: bool) -> str:
    letters = [f"{letter}. {text}" for letter, text in zip("ABCD", question.choices, strict=True)]
    answer = f" {'ABCD'[question.answer]}" if is_solved else ""
    return "\n".join([question.question, *letters, f"Answer:{answer}"])


@torch.inference_mode()
def expected_hits(base: BaseModel, subject: Subject, num_fewshot: int) -> list[bool]:
    """MMLU's rule, by hand: the likeliest letter after the solved examples and the question."""
    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    shown = "".join(text_of(q, is_solved=True) + "\n\n" for q in subject.dev[:num_fewshot])
    hits = []
    for question in subject.test:
        prompt = base.tokenizer(head + shown + text_of(question, is_solved=False))["input_ids"]
        log_p = []
        for letter in "ABCD":
            ids = base.tokenizer(f" {letter}")["input_ids"]
            logits = base.model(input_ids=torch.tensor([prompt + ids])).logits[0]
            every = logits.log_softmax(dim=-1)
            places = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
            log_p.append(sum(float(every[at, i]) for at, i in zip(places, ids, strict=True)))
        hits.append(int(np.argmax(log_p)) == question.answer)
    return hits


@pytest.fixture
def long_base(exact_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    """The same model, said to take prompts with examples."""
    monkeypatch.setattr(exact_base.model.config, "max_position_embeddings", 2048)
    return exact_base


@pytest.mark.parametrize("num_fewshot", [0, 3])
def test_accuracy_is_that_of_mmlus_own_rule(
    long_base: BaseModel, world: World, num_fewshot: int
) -> None:
    hits = expected_hits(long_base, SUBJECT, num_fewshot)
    lm = harness_model(evaluated(long_base, world))
    log = evaluate_subject(lm, "mmlu_anatomy", SUBJECT, num_fewshot=num_fewshot)
    assert log.num_rows == 7
    assert log.acc == pytest.approx(statistics.fmean(hits))
    assert log.acc_stderr == pytest.approx(statistics.stdev(hits) / math.sqrt(7))


def test_a_limit_takes_the_first_questions(long_base: BaseModel, world: World) -> None:
    lm = harness_model(evaluated(long_base, world))
    log = evaluate_subject(lm, "mmlu_anatomy", SUBJECT, limit=4)
    assert log.num_rows == 4
    assert log.acc == pytest.approx(statistics.fmean(expected_hits(long_base, SUBJECT, 0)[:4]))


def test_the_digest_is_of_questions_and_examples() -> None:
    shorter = dataclasses.replace(SUBJECT, dev=SUBJECT.dev[:4])
    assert harness.subject_digest(SUBJECT) != harness.subject_digest(shorter)
    assert harness.subject_digest(SUBJECT) == harness.subject_digest(dataclasses.replace(SUBJECT))


def requests_for(pairs: list[tuple[str, str]]) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


PAIRS = [(text_of(q, is_solved=False), " B") for q in SUBJECT.test] + [
    ("The mill", " turns the old wheel"),
    ("x" * 400, " C"),  # longer than the model's 256 tokens
]


def test_a_server_gives_the_numbers_of_its_model(
    exact_base: BaseModel, world: World, fake_server: FakeServer
) -> None:
    expected = harness_model(evaluated(exact_base, world)).loglikelihood(requests_for(PAIRS))
    served = harness_model(evaluated(exact_base, world, fake_server.url))
    found = served.loglikelihood(requests_for(PAIRS))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
        assert ours[1] == theirs[1]
    lengths = [len(body["prompt"][0]) for _, body, _ in fake_server.asked]
    assert max(lengths) == exact_base.max_tokens - 1, "one token is generated behind it"


def test_attached_experts_are_measured(exact_base: BaseModel, world: World) -> None:
    lm = harness_model(evaluated(exact_base, world))
    before = lm.loglikelihood(requests_for(PAIRS[:3]))
    substrate = random_substrate(world.model, AlterConfig(tap_layer=1, rank=8, evidence_window=16))
    expert = random_expert(substrate, "red", seed=3, trigger_rate=0.9)
    attached = AttachedModel(exact_base.model, substrate, [expert])
    try:
        found = lm.loglikelihood(requests_for(PAIRS[:3]))
        rows = []
        for prompt, choice in PAIRS[:3]:
            ids = exact_base.tokenizer(prompt)["input_ids"]
            new = exact_base.tokenizer(choice)["input_ids"]
            is_answer = (False,) * len(ids) + (True,) * len(new)
            rows.append(EncodedRow(ids=(*ids, *new), is_answer=is_answer))
        expected = TransformersModel(exact_base).score(rows)
    finally:
        attached.detach()
    assert [value for value, _ in found] == pytest.approx(
        [sum(score.logprobs) for score in expected], abs=1e-4
    )
    assert all(abs(a[0] - b[0]) > 0.01 for a, b in zip(found, before, strict=True))


def test_a_server_gets_its_own_key_and_no_other(
    exact_base: BaseModel,
    world: World,
    fake_server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of another party")
    monkeypatch.delenv("ALTER_API_KEY", raising=False)
    harness_model(evaluated(exact_base, world, fake_server.url)).loglikelihood(
        requests_for(PAIRS[:1])
    )
    monkeypatch.setenv("ALTER_API_KEY", "secret")
    harness_model(evaluated(exact_base, world, fake_server.url)).loglikelihood(
        requests_for(PAIRS[:1])
    )
    keys = [headers.get("authorization") for _, _, headers in fake_server.asked]
    assert keys == [None, "Bearer secret"]


def test_a_server_that_refuses_is_an_engine_error_without_the_prompt(
    exact_base: BaseModel,
    world: World,
    fake_server: FakeServer,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fake_server.status = 401
    lm = harness_model(evaluated(exact_base, world, fake_server.url))
    with pytest.raises(EngineError, match=r"status 401.*ALTER_API_KEY.*256 or more") as caught:
        lm.loglikelihood(requests_for(PAIRS[:2]))
    told = str(caught.value) + "".join(capfd.readouterr())
    assert "Zofia" not in told
    (_, body, _), *_ = fake_server.asked
    assert str(body["prompt"][0][:5])[1:-1] not in told


def test_a_server_that_is_not_there_is_an_engine_error(exact_base: BaseModel, world: World) -> None:
    lm = harness_model(evaluated(exact_base, world, "http://127.0.0.1:9"))
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9.*Check --server"):
        lm.loglikelihood(requests_for(PAIRS[:1]))


def test_figures_pool_subjects_by_their_size() -> None:
    hits = {"one": [1, 0, 1], "two": [0, 0, 1, 0, 1]}
    logs = {
        name: SubjectLog(
            dataset="d",
            num_rows=len(values),
            acc=statistics.fmean(values),
            acc_stderr=statistics.stdev(values) / math.sqrt(len(values)),
        )
        for name, values in hits.items()
    }
    figures = accuracy_figures("mmlu", logs)
    assert figures["mmlu_acc"] == pytest.approx(4 / 8)
    # Pooled variance: squares within the groups over the degrees of freedom.
    squares = sum(
        sum((x - statistics.fmean(values)) ** 2 for x in values) for values in hits.values()
    )
    assert figures["mmlu_acc_stderr"] == pytest.approx(math.sqrt(squares / (8 - 2) / 8))
    assert figures["mmlu_two_acc"] == pytest.approx(0.4)
    assert figures["mmlu_one_acc_stderr"] == logs["one"].acc_stderr


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "alter_eval.harness")
    with pytest.raises(ConfigError, match=r"lm-eval.*extra `eval`.*ALTER_EXTRAS=eval"):
        from alter_eval.harness import evaluate_subject as _  # noqa: F401


def test_outputs_and_inputs_of_a_task_are_nowhere_on_disk(
    long_base: BaseModel, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lm = harness_model(evaluated(long_base, world))
    log = evaluate_subject(lm, "wmdp_bio", dataclasses.replace(SUBJECT, dev=()), limit=3)
    assert log.num_rows == 3
    assert list(tmp_path.iterdir()) == []
