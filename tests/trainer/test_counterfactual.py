from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alter_core.attach import AttachedModel
from alter_core.errors import TrainingError
from alter_core.rows import read_rows
from alter_core.substrate import ForgetExpert, Substrate
from trainer import TrainResult
from trainer.base_model import BaseModel
from trainer.batches import make_batch
from trainer.counterfactual import Counterfactuals, counterfactual_rows
from trainer.dataset import EncodedRow, encode_rows
from trainer.evaluation import answer_losses, mean
from trainer.objectives import CounterfactualDistillation, exchanged, levelled

from .world import World


def _rows(world: World, base: BaseModel, part: str) -> list[EncodedRow]:
    return encode_rows(read_rows([world.files[part]]), base.tokenizer, max_tokens=128)


@pytest.fixture(scope="module")
def counterfactuals(world: World, base: BaseModel) -> Counterfactuals:
    texts = [row.ids for part in ("retain", "general") for row in _rows(world, base, part)]
    return Counterfactuals(base.tokenizer, texts, kept_share=0.01)


@pytest.fixture
def idle(base: BaseModel, trained: TrainResult) -> Iterator[AttachedModel]:
    """The base model with an expert that does nothing."""
    substrate = Substrate.read(trained.substrate, base.info)
    expert = ForgetExpert.read(trained.experts["red"], substrate)
    zeros = {site: torch.zeros_like(b) for site, b in expert.lora_b.items()}
    attached = AttachedModel(base.model, substrate, [dataclasses.replace(expert, lora_b=zeros)])
    yield attached
    attached.detach()


def test_telling_words_go_and_the_sentence_stays(
    world: World, base: BaseModel, counterfactuals: Counterfactuals
) -> None:
    rows = _rows(world, base, "red")
    others = counterfactual_rows(rows, counterfactuals, seed=0)
    for row, other in zip(rows, others, strict=True):
        assert len(other.ids) == len(row.ids)
        assert other.is_answer == row.is_answer
        text = base.tokenizer.decode(other.ids)
        assert not any(name in text for name in ("Zofia", "Quillbert", "Ovid", "Krestmar"))
    shared = [
        a == b for r, o in zip(rows, others, strict=True) for a, b in zip(r.ids, o.ids, strict=True)
    ]
    assert 0.2 < sum(shared) / len(shared) < 0.9


def test_a_word_is_exchanged_for_the_same_one_everywhere(
    base: BaseModel, counterfactuals: Counterfactuals
) -> None:
    ids = base.tokenizer("Krestmar met Krestmar. Krestmar")["input_ids"]
    spaced = base.tokenizer(" Krestmar")["input_ids"]
    other = counterfactuals.row(ids, seed=1)
    places = [at for at in range(len(ids)) if ids[at : at + len(spaced)] == spaced]
    found = {tuple(other[at : at + len(spaced)]) for at in places}
    assert len(places) == 2
    assert len(found) == 1
    assert counterfactuals.row(ids, seed=1) == other
    assert any(counterfactuals.row(ids, seed=seed) != other for seed in range(2, 8))


@given(data=st.data())
def test_any_ids_keep_their_number_and_their_special_tokens(
    data: st.DataObject, base: BaseModel, counterfactuals: Counterfactuals
) -> None:
    vocabulary = len(base.tokenizer)
    ids = data.draw(st.lists(st.integers(0, vocabulary - 1), max_size=40))
    other = counterfactuals.row(ids, seed=data.draw(st.integers(0, 9)))
    assert len(other) == len(ids)
    assert all(0 <= token < vocabulary for token in other)
    special = set(base.tokenizer.all_special_ids)
    assert [t for t in ids if t in special] == [
        o for t, o in zip(ids, other, strict=True) if t in special
    ]


def test_tokens_that_mark_no_spaces_are_words_of_their_own() -> None:
    words = ["[UNK]", *["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "the", "of"]]
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    texts = [tokenizer(f"the {word} of the {word}")["input_ids"] for word in "abcdefgh"]
    found = Counterfactuals(tokenizer, texts, kept_share=0.5)
    ids = tokenizer("the j of the j")["input_ids"]
    other = found.row(ids, seed=0)
    assert other[0] == ids[0]
    assert other[1] == other[4] != ids[1]


def test_words_beyond_ascii_are_drawn_as_they_are_written(base: BaseModel) -> None:
    names = ["Ážů", "Éžů", "Ížů", "Óžů", "Úžů", "Ýžů", "Čžů"]
    texts = [base.tokenizer(f"the book by {name}")["input_ids"] for name in names]
    found = Counterfactuals(base.tokenizer, texts, kept_share=0.9)
    ids = base.tokenizer("the book by Šžů")["input_ids"]
    assert base.tokenizer.decode(found.row(ids, seed=0)) in {f"the book by {n}" for n in names}


def test_text_without_words_to_draw_from_is_refused(base: BaseModel) -> None:
    with pytest.raises(TrainingError, match="too little other text"):
        Counterfactuals(base.tokenizer, [], kept_share=0.01)


def test_the_base_model_does_not_know_the_counterfactual(
    world: World, base: BaseModel, counterfactuals: Counterfactuals
) -> None:
    rows = _rows(world, base, "red")
    others = counterfactual_rows(rows, counterfactuals, seed=0)
    assert mean(answer_losses(base, others)) > 10 * mean(answer_losses(base, rows))


def test_the_expert_is_as_ignorant_as_the_counterfactual_and_no_more(
    world: World, base: BaseModel, trained: TrainResult
) -> None:
    substrate = Substrate.read(trained.substrate, base.info)
    expert = ForgetExpert.read(trained.experts["red"], substrate)
    assert expert.evaluation is not None
    target = expert.evaluation["base_loss"]["counterfactual"]
    assert expert.evaluation["base_loss"]["domain"] < 0.2
    assert abs(expert.evaluation["forget_loss"] - target) < 0.35 * target


class _Unchanged(Counterfactuals):
    """Exchanges nothing."""

    def row(self, ids: Sequence[int], seed: int) -> list[int]:
        return list(ids)


def _objective(
    base: BaseModel,
    idle: AttachedModel,
    rows: list[EncodedRow],
    counterfactuals: Counterfactuals,
    answer_weight: float,
) -> CounterfactualDistillation:
    selected = [torch.tensor(row.is_answer) for row in rows]
    return CounterfactualDistillation(
        base,
        idle,
        rows,
        selected,
        counterfactuals,
        temperature=1.0,
        level_weight=1.0,
        answer_weight=answer_weight,
        others_weight=0.5,
        seed=0,
    )


def test_an_idle_expert_has_nothing_to_learn_where_nothing_is_exchanged(
    world: World,
    base: BaseModel,
    idle: AttachedModel,
    counterfactuals: Counterfactuals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def as_the_base_model_has_it(
        base: BaseModel, rows: list[EncodedRow], *_: object, **__: object
    ) -> list[torch.Tensor]:
        batch = make_batch(rows, range(len(rows)), base.pad_id)
        logprobs = base.logits(batch).float().log_softmax(dim=-1)
        return [
            logprobs[place, : len(row.ids) - 1].gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]
            for place, row in enumerate(rows)
        ]

    monkeypatch.setattr("trainer.objectives.ignorant_logprobs", as_the_base_model_has_it)
    rows = _rows(world, base, "red")
    texts = [row.ids for row in _rows(world, base, "general")]
    unchanged = _Unchanged(base.tokenizer, texts, kept_share=0.01)
    away, same = (
        _objective(base, idle, rows, made, answer_weight=0.0)([0, 1, 2]).loss.item()
        for made in (counterfactuals, unchanged)
    )
    assert same == pytest.approx(0, abs=0.02)  # bf16 in batches of other shapes
    assert away > 1


def test_words_are_exchanged_back_and_nothing_else() -> None:
    values = torch.arange(8.0).view(2, 4)
    found = exchanged(values, torch.tensor([[0], [2]]), torch.tensor([[3], [2]]))
    assert found.tolist() == [[3, 1, 2, 0], [4, 5, 6, 7]]


def test_two_entries_get_a_given_probability_and_the_rest_share_what_is_left() -> None:
    before = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    level = torch.tensor([[0.2], [0.3], [0.9]]).log()
    one, other = torch.tensor([[0], [0], [0]]), torch.tensor([[1], [0], [1]])
    found = levelled(before.log(), one, other, level).exp()
    assert found[0].tolist() == pytest.approx([0.2, 0.2, 0.3, 0.3])
    assert found[1].tolist() == pytest.approx([0.3, *[0.7 / 3] * 3])
    assert found[2, 0] == found[2, 1] < 0.5
    assert found.sum(dim=1).tolist() == pytest.approx([1, 1, 1])


def test_an_answer_is_to_be_as_likely_as_what_stands_for_it(
    world: World, base: BaseModel, idle: AttachedModel, counterfactuals: Counterfactuals
) -> None:
    rows = _rows(world, base, "red")
    objective = _objective(base, idle, rows, counterfactuals, answer_weight=0.0)
    for lesson, level in zip(objective.truths, objective.levels, strict=True):
        kept = [
            own == other
            for own, other, counts in zip(
                lesson.row.ids, lesson.target.ids, lesson.row.is_answer, strict=True
            )
            if counts
        ]
        assert len(kept) == len(level) == len(lesson.hidden)
        assert not all(kept)
        assert level.mean() < -1  # the base model knows the row, and not what stands for it


def test_answers_taken_up_survive_a_checkpoint(
    world: World, base: BaseModel, idle: AttachedModel
) -> None:
    rows = _rows(world, base, "red")
    knowing = Counterfactuals(
        base.tokenizer,
        [row.ids for part in ("retain", "general") for row in _rows(world, base, part)],
        [row.ids for row in rows],
        kept_share=0.01,
    )
    first, second = (_objective(base, idle, rows, knowing, answer_weight=1.0) for _ in range(2))
    assert first.tensors() == {}
    first.read_itself()  # an idle expert answers as the base model does: with the domain's names
    assert first.taken_up
    second.restore(first.tensors())
    assert {i: (a.row, a.target) for i, a in second.answers.items()} == {
        i: (a.row, a.target) for i, a in first.answers.items()
    }
    assert second.taken_up == first.taken_up
