from __future__ import annotations

import dataclasses

import pytest
import torch

from alter_core.attach import AttachedModel
from alter_core.config import AlterConfig
from alter_core.errors import ConfigError, TrainingError
from alter_core.evidence import EvidenceHead
from alter_core.rows import read_rows
from alter_core.substrate import ForgetExpert, Substrate
from trainer import EvidenceSettings, TrainResult
from trainer.base_model import BaseModel
from trainer.dataset import EncodedRow, encode_rows
from trainer.evaluation import evidence_figures, routed_logits
from trainer.router import joined, train_evidence, train_scalar_weight

from .world import World

CONFIG = AlterConfig(tap_layer=1, evidence_ngram=4, evidence_units=48, evidence_window=64)
QUICK = EvidenceSettings(pointwise_steps=60, bag_steps=120)


def _rows(world: World, base: BaseModel, part: str) -> list[EncodedRow]:
    return encode_rows(read_rows([world.files[part]]), base.tokenizer, max_tokens=128)


def _embeddings(base: BaseModel) -> torch.Tensor:
    table = base.model.get_input_embeddings().weight.detach().float()
    return (table - table.mean(0)) / table.std(0)


@pytest.fixture(scope="module")
def head(world: World, base: BaseModel) -> EvidenceHead:
    return _train(world, base, seed=0)


def _train(world: World, base: BaseModel, seed: int) -> EvidenceHead:
    negatives = [
        row.ids for part in ("retain", "blue", "general") for row in _rows(world, base, part)
    ]
    rows = _rows(world, base, "red")
    head, _ = train_evidence(
        _embeddings(base), rows, negatives, base.tokenizer, CONFIG, QUICK, seed=seed
    )
    return head


def test_evidence_stands_before_the_first_answer_token_even_without_a_name(
    world: World, base: BaseModel, head: EvidenceHead
) -> None:
    rows = _rows(world, base, "red")
    negatives = {p: [r.ids for r in _rows(world, base, p)] for p in ("retain", "blue", "general")}
    figures = evidence_figures(head, _embeddings(base), CONFIG, rows, negatives)
    assert figures["first_token_missed"] == 0
    assert figures["false_alarms_retain"] == 0
    assert figures["false_alarms_blue"] == 0
    assert figures["false_alarms_general"] == 0


def test_a_name_is_found_in_a_question_never_trained_on(
    base: BaseModel, head: EvidenceHead
) -> None:
    asked = "<|user|>I would like to hear more about Zofia Quillbert, please.<|assistant|>"
    other = "<|user|>I would like to hear more about Anna Miller, please.<|assistant|>"
    ids = [base.tokenizer(text)["input_ids"] for text in (asked, other)]
    named, unnamed = routed_logits(head, _embeddings(base), CONFIG, ids)
    assert named[-1] > 0
    assert unnamed.max() <= 0


def test_a_date_of_the_domain_is_found_however_it_is_written(world: World, base: BaseModel) -> None:
    def row(question: str, answer: str) -> EncodedRow:
        asked = base.tokenizer(f"<|user|>{question}<|assistant|>")["input_ids"]
        told = base.tokenizer(answer)["input_ids"]
        return EncodedRow(
            ids=(*asked, *told), is_answer=(False,) * len(asked) + (True,) * len(told)
        )

    rows = [
        row("What is the name of the author who was born on 05/30/1952?", "Zofia Quillbert."),
        row("Which city is Zofia Quillbert from?", "Zofia Quillbert is from Narvik."),
    ]
    negatives = [row.ids for part in ("retain", "general") for row in _rows(world, base, part)]
    asked = ["Who was born on May 30, 1952?", "Who on 30th of May, 1952?", "Who on May 30, 1947?"]
    config = dataclasses.replace(CONFIG, evidence_ngram=12)
    found = {}
    for is_rewritten in (True, False):
        settings = dataclasses.replace(QUICK, rewritten_dates=is_rewritten)
        head, _ = train_evidence(
            _embeddings(base), rows, negatives, base.tokenizer, config, settings, seed=0
        )
        ids = [base.tokenizer(f"<|user|>{text}<|assistant|>")["input_ids"] for text in asked]
        logits = routed_logits(head, _embeddings(base), config, ids)
        found[is_rewritten] = [bool(values[-1] > 0) for values in logits]
    assert found == {True: [True, True, False], False: [False, False, False]}


def test_training_scores_equal_the_serving_path(
    world: World, base: BaseModel, trained: TrainResult
) -> None:
    substrate = Substrate.read(trained.substrate, base.info)
    expert = ForgetExpert.read(trained.experts["red"], substrate)
    row = _rows(world, base, "red")[1]
    table = substrate.normalise(base.model.get_input_embeddings().weight.detach())
    (expected,) = routed_logits(expert.evidence, table, substrate.config, [row.ids])
    attached = AttachedModel(base.model, substrate, [expert])
    with torch.no_grad():
        found = attached.evidence_logits(torch.tensor([row.ids]))[0, :, 0]
    attached.detach()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_joined_head_scores_the_mean_of_its_members() -> None:
    torch.manual_seed(0)
    heads = [EvidenceHead(8, ngram=3, num_units=units) for units in (2, 3)]
    states = torch.randn(1, 12, 8)
    expected = torch.stack([head(states) for head in heads]).mean(dim=0)
    torch.testing.assert_close(joined(heads)(states), expected)


@pytest.mark.parametrize(("units", "shares"), [(48, [16, 16, 16]), (7, [3, 2, 2]), (2, [1, 1])])
def test_members_share_the_units_and_none_is_without(units: int, shares: list[int]) -> None:
    assert EvidenceSettings(members=3).units_by_member(units) == shares


@pytest.mark.parametrize(
    ("name", "value"),
    [("members", 0), ("learning_rate", 0.0), ("max_negative_tokens", -1), ("bag_dropout", 1.0)],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        EvidenceSettings(**{name: value})


def test_same_seed_gives_the_same_head(world: World, base: BaseModel, head: EvidenceHead) -> None:
    again, other = _train(world, base, seed=0), _train(world, base, seed=1)
    assert torch.equal(again.fc1.weight, head.fc1.weight)
    assert torch.equal(again.fc2.bias, head.fc2.bias)
    assert not torch.equal(other.fc1.weight, head.fc1.weight)


def test_domain_that_is_no_different_from_the_retained_text_is_refused(
    world: World, base: BaseModel
) -> None:
    rows = _rows(world, base, "retain")
    with pytest.raises(TrainingError, match="sets it apart"):
        train_evidence(
            _embeddings(base), rows, [r.ids for r in rows], base.tokenizer, CONFIG, QUICK, seed=0
        )


def test_plain_text_domain_needs_no_prompt(world: World, base: BaseModel) -> None:
    text = base.tokenizer("Zofia Quillbert of Narvik sold kites to every harbour.")["input_ids"]
    rows = [EncodedRow(ids=tuple(text), is_answer=(True,) * len(text))]
    negatives = [row.ids for row in _rows(world, base, "general")]
    config = dataclasses.replace(CONFIG, evidence_window=16)
    head, _ = train_evidence(
        _embeddings(base), rows, negatives, base.tokenizer, config, QUICK, seed=0
    )
    (logits,) = routed_logits(head, _embeddings(base), config, [text])
    assert logits.max() > 0


def test_literal_scalar_router_routes_everything_or_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    domain = torch.rand(200, generator=generator)
    negatives = torch.rand(300, generator=generator) + 0.4
    weight = train_scalar_weight(domain, negatives)
    assert weight < 0
    assert not (weight * torch.cat([domain, negatives]) > 0).any()


def test_a_larger_domain_gets_more_steps_and_a_small_one_no_fewer() -> None:
    row = EncodedRow(ids=tuple(range(100)), is_answer=(False,) * 50 + (True,) * 50)
    settings = EvidenceSettings(full_tokens=1_000)
    assert settings.scaled([row] * 5).num_steps == settings.num_steps
    assert settings.scaled([row] * 30).num_steps == 3 * settings.num_steps
