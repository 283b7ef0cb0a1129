from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from alter_core import AlterConfig
from alter_core.attach import AttachedModel
from alter_core.errors import EngineError
from alter_core.rows import read_rows
from alter_eval import tofu
from alter_eval.models import ServedModel, TransformersModel, WithoutExperts
from tests.support.tiny import random_expert, random_substrate
from tests.trainer.world import World
from trainer.base_model import BaseModel
from trainer.dataset import EncodedRow, encode_rows

from .small_tofu import rows_of_set, served_answer

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(scope="module")
def rows(exact_base: BaseModel, world: World) -> list[EncodedRow]:
    """Questions that the model knows, one that it does not, and plain text."""
    asked = tofu.encode(exact_base.tokenizer, rows_of_set("forget", 5))
    unknown = tofu.TofuRow(question="Why?", answer="Wer weiß?", perturbed_answers=())
    general = encode_rows(read_rows([world.files["general"]]), exact_base.tokenizer, max_tokens=64)
    return [*asked, *tofu.encode(exact_base.tokenizer, [unknown]), *general[:2]]


def served(base: BaseModel, handler: Handler, **options: Any) -> ServedModel:
    return ServedModel(
        "http://alter.test/",
        "tiny",
        base.tokenizer,
        transport=httpx.MockTransport(handler),
        **options,
    )


@pytest.fixture
def asked() -> list[httpx.Request]:
    return []


@pytest.fixture
def server(exact_base: BaseModel, asked: list[httpx.Request]) -> Iterator[ServedModel]:
    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json=served_answer(exact_base, json.loads(request.content)))

    model = served(exact_base, handler, api_key="secret", concurrency=3)
    yield model
    model.close()


def test_a_server_gives_the_scores_of_its_model(
    server: ServedModel, exact_base: BaseModel, rows: list[EncodedRow]
) -> None:
    expected = TransformersModel(exact_base).score(rows)
    found = server.score(rows)
    for ours, theirs, row in zip(found, expected, rows, strict=True):
        assert len(ours.logprobs) == sum(row.is_answer[1:]), "nothing predicts the first token"
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert ours.is_argmax == theirs.is_argmax
        assert ours.nll == pytest.approx(-sum(ours.logprobs) / len(ours.logprobs))
    assert all(all(score.is_argmax) for score in found[:5])
    assert not all(found[5].is_argmax)


def test_a_server_gives_the_completions_of_its_model(
    server: ServedModel, exact_base: BaseModel, rows: list[EncodedRow]
) -> None:
    prompts = [row.ids[: row.num_prompt] for row in rows[:6]]
    expected = TransformersModel(exact_base).complete(prompts, max_new_tokens=12)
    assert server.complete(prompts, max_new_tokens=12) == expected
    assert exact_base.tokenizer.eos_token_id not in [token for ids in expected for token in ids]


def test_samples_are_drawn_from_the_whole_distribution(ignorant_base: BaseModel) -> None:
    prompt = ignorant_base.tokenizer("The mill")["input_ids"]
    drawn = TransformersModel(ignorant_base).sample([prompt] * 900, max_new_tokens=1, seed=1)
    logits = ignorant_base.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    p = logits.softmax(dim=-1)
    end = ignorant_base.tokenizer.eos_token_id
    counts = torch.bincount(torch.tensor([ids[0] if ids else end for ids in drawn]), minlength=420)
    ranked = p.argsort(descending=True)
    # Groups of ranks: the head alone would do under top-k or a low temperature.
    for group in (ranked[:50], ranked[50:200], ranked[200:]):
        share, expected = float(counts[group].sum()) / 900, float(p[group].sum())
        assert abs(share - expected) < 4 * (expected * (1 - expected) / 900) ** 0.5


def test_samples_follow_their_seed_alone(ignorant_base: BaseModel) -> None:
    model = TransformersModel(ignorant_base)
    prompts = [ignorant_base.tokenizer(text)["input_ids"] for text in ("The mill", "He")]
    state = torch.random.get_rng_state()
    first = model.sample(prompts * 2, max_new_tokens=6, seed=4)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert model.sample(prompts * 2, max_new_tokens=6, seed=4) == first
    assert model.sample(prompts * 2, max_new_tokens=6, seed=5) != first
    assert first[0] != first[2], "the same prompt is answered anew"


def test_a_server_samples_each_prompt_with_a_seed_of_its_own(
    server: ServedModel, asked: list[httpx.Request], rows: list[EncodedRow]
) -> None:
    server.sample([rows[0].ids[:5]] * 3, max_new_tokens=4, seed=10)
    bodies = sorted((json.loads(request.content) for request in asked), key=lambda b: b["seed"])
    assert [body["seed"] for body in bodies] == [10, 11, 12]
    for body in bodies:
        assert (body["temperature"], body["top_p"], body["top_k"]) == (1, 1, -1)
        assert body["max_tokens"] == 4


def test_a_server_that_wants_a_key_says_where_it_goes(
    exact_base: BaseModel, rows: list[EncodedRow]
) -> None:
    model = served(exact_base, lambda request: httpx.Response(401))
    with pytest.raises(EngineError, match="ALTER_API_KEY"):
        model.score(rows[:1])


def test_a_server_is_asked_by_token_ids_and_with_the_key(
    server: ServedModel, asked: list[httpx.Request], rows: list[EncodedRow]
) -> None:
    server.score(rows[:1])
    (request,) = asked
    assert str(request.url) == "http://alter.test/v1/completions"
    assert request.headers["authorization"] == "Bearer secret"
    body = json.loads(request.content)
    assert body["model"] == "tiny"
    assert body["prompt"] == list(rows[0].ids)
    assert body["temperature"] == 0


def test_nothing_is_asked_about_nothing(server: ServedModel, asked: list[httpx.Request]) -> None:
    assert server.score([]) == server.complete([], max_new_tokens=3) == []
    assert not asked


@pytest.mark.parametrize("status", [400, 401, 404, 500, 503])
def test_an_error_status_is_an_engine_error(
    exact_base: BaseModel, rows: list[EncodedRow], status: int
) -> None:
    model = served(exact_base, lambda request: httpx.Response(status, text="not today"))
    with pytest.raises(EngineError, match=f"{status} not today"):
        model.score(rows)
    with pytest.raises(EngineError, match=f"{status} not today"):
        model.complete([rows[0].ids], max_new_tokens=2)


def test_a_server_that_is_not_there_is_an_engine_error(
    exact_base: BaseModel, rows: list[EncodedRow]
) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(EngineError, match=r"alter\.test.*ConnectError"):
        served(exact_base, refuse).score(rows)


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        '{"choices": []}',
        '{"choices": [{"text": "", "logprobs": null}]}',
        '{"choices": [{"text": "", "logprobs": {"token_logprobs": [null], "top_logprobs": [null]}}]}',
    ],
)
def test_an_answer_of_another_api_is_an_engine_error(
    exact_base: BaseModel, rows: list[EncodedRow], content: str
) -> None:
    model = served(exact_base, lambda request: httpx.Response(200, text=content))
    with pytest.raises(EngineError, match="cannot be used"):
        model.score(rows)
    with pytest.raises(EngineError, match="cannot be used"):
        model.complete([rows[0].ids], max_new_tokens=2)


def test_scores_do_not_depend_on_the_batch(exact_base: BaseModel, rows: list[EncodedRow]) -> None:
    model = TransformersModel(exact_base)
    together = model.score(rows)
    for row, score in zip(rows, together, strict=True):
        (alone,) = model.score([row])
        assert alone.logprobs == pytest.approx(score.logprobs, abs=1e-4)
        assert alone.is_argmax == score.is_argmax
    assert model.score([]) == []


def test_a_judge_is_blind_to_experts(
    exact_base: BaseModel, world: World, rows: list[EncodedRow], tmp_path: Path
) -> None:
    plain = TransformersModel(exact_base).score(rows)
    substrate = random_substrate(world.model, AlterConfig(tap_layer=1, rank=8, evidence_window=16))
    expert = random_expert(substrate, "red", seed=3, trigger_rate=0.9)
    attached = AttachedModel(exact_base.model, substrate, [expert])
    try:
        assert WithoutExperts(exact_base, attached).score(rows) == plain
        assert TransformersModel(exact_base).score(rows) != plain
    finally:
        attached.detach()
    assert WithoutExperts(exact_base, None).score(rows) == plain
