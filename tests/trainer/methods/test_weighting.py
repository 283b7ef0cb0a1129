"""Which tokens count: against plain Python, and what the weights do to a model."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch

from alter_core.errors import ConfigError, TrainingDataError
from alter_core.rows import read_rows
from tests.trainer.world import World, rows_of
from trainer.base_model import BaseModel, load_base_model
from trainer.batches import IGNORED, make_batch
from trainer.dataset import EncodedRow, encode_rows
from trainer.entropy_pass import run_entropy_pass
from trainer.losses import token_nll
from trainer.methods import (
    WEIGHTINGS,
    AtwuWeighting,
    EntropyWeighting,
    KnowledgeSpanWeighting,
    Task,
    UniformWeighting,
    make_method,
    unlearn,
)
from trainer.methods.spans import knowledge_tokens, knowledge_words
from trainer.methods.weighting import TokenWeights

from .conftest import settings_for
from .first_token import CHOSEN, FORGET, D, FirstTokenModel, answer_places, make_task, row

PERTURBED = tuple(
    (stranger["answer"], other["answer"])
    for stranger, other in zip(rows_of("blue"), rows_of("retain")[:8], strict=True)
)
"""For the red domain: the same questions about other people."""


def _red(world: World, base: BaseModel) -> list[EncodedRow]:
    return encode_rows(read_rows([world.files["red"]]), base.tokenizer, max_tokens=256)


def test_only_weighted_tokens_enter_the_mean() -> None:
    chosen = {FORGET[0].ids: [3, 4], FORGET[2].ids: [1], FORGET[3].ids: [1]}
    masks = [
        torch.tensor([place in chosen.get(row.ids, ()) for place in range(len(row.ids))])
        for row in FORGET
    ]

    class Given(UniformWeighting):
        def start(self, task: Task) -> TokenWeights:
            return lambda batch, hidden, losses: batch.align_labels([m.float() for m in masks])

    task = make_task(weighting=Given())
    model = task.model
    assert isinstance(model, FirstTokenModel)
    found = make_method("grad_ascent").forget_loss(task)(task.batch(FORGET, CHOSEN))
    expected = fmean(
        model.plain_log_probs(FORGET[index].ids, t - 1)[FORGET[index].ids[t]]
        for index in CHOSEN
        for t in chosen[FORGET[index].ids]
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_uniform_weights_are_1_at_answers_and_0_elsewhere() -> None:
    batch = make_batch(FORGET, CHOSEN, pad_id=0)
    weights = UniformWeighting().start(make_task())(batch, torch.zeros(0), torch.zeros(0))
    assert torch.equal(weights, (batch.labels != IGNORED).float())


def test_entropy_weights_select_tokens_by_their_own_entropy(world: World, base: BaseModel) -> None:
    rows = _red(world, base)
    entropy = run_entropy_pass(base, rows, tsallis_q=1.5, tap_layer=0).entropy
    answers = torch.cat([e[torch.tensor(r.is_answer)] for e, r in zip(entropy, rows, strict=True)])
    threshold = answers.median().item()
    task = make_task(model=base, forget=rows)
    weights = EntropyWeighting(threshold=threshold).start(task)
    indices = [5, 2, 7]
    batch = make_batch(rows, indices, base.pad_id)
    found = weights(batch, torch.zeros(0), torch.zeros(0))
    for place, index in enumerate(indices):
        for t in range(1, len(rows[index].ids)):
            is_low = rows[index].is_answer[t] and entropy[index][t].item() <= threshold
            assert found[place, t - 1].item() == float(is_low)
    assert 0 < found.sum() < (batch.labels != IGNORED).sum()


def test_knowledge_words_are_those_that_most_perturbed_answers_lack() -> None:
    words = knowledge_words(
        "The author's full name is Hsiao Yun-Hwa.",
        [
            "Chen Jing-Li is the complete name of the writer.",
            "Lin Hsiao is the complete name of the writer.",
            "Wang Xi-Wen is the complete name of the writer.",
        ],
        "Hsiao Yun-Hwa is the complete name of the writer.",
    )
    assert words == {"hsiao", "yun", "hwa"}


def test_without_a_paraphrase_the_answer_itself_is_compared() -> None:
    assert knowledge_words("In Paris.", ["In Rome.", "In Bonn."]) == {"paris"}


def test_knowledge_tokens_cover_words_in_pieces_and_nothing_else(base: BaseModel) -> None:
    tokenizer = base.tokenizer
    prompt = tokenizer("Where was he born? In Tromsø")["input_ids"]
    answer = tokenizer("The town of Tromsø, they say.")["input_ids"]
    made = EncodedRow(
        ids=(*prompt, *answer), is_answer=(False,) * len(prompt) + (True,) * len(answer)
    )
    found = knowledge_tokens(tokenizer, made, ["The town of Opole, they say."])
    picked = [token for token, is_knowledge in zip(made.ids, found, strict=True) if is_knowledge]
    assert tokenizer.decode(picked).strip() == "Tromsø"
    assert len(picked) > 2, "the tokenizer never saw the name, so it falls into pieces"
    assert not found[: len(prompt)].any()


def test_knowledge_spans_forget_the_facts_and_leave_the_form(world: World, tmp_path: Path) -> None:
    weighting = KnowledgeSpanWeighting(perturbed_answers=PERTURBED)
    hyper = {"epochs": 8}
    out = unlearn(
        settings_for(world, tmp_path / "out", "grad_diff", weighting=weighting, hyper=hyper)
    )
    whole = unlearn(settings_for(world, tmp_path / "whole", "grad_diff", hyper=hyper))

    def losses(folder: Path) -> tuple[float, float]:
        """Mean loss of tokens that are knowledge, and of the answers' others."""
        base = load_base_model(folder, device="cpu")
        rows = _red(world, base)
        batch = make_batch(rows, range(len(rows)), base.pad_id)
        with torch.no_grad():
            nll = token_nll(base.logits(batch), batch.labels)
        spans = [
            knowledge_tokens(base.tokenizer, made, perturbed)
            for made, perturbed in zip(rows, PERTURBED, strict=True)
        ]
        is_knowledge = batch.align_labels([span.float() for span in spans]) > 0
        is_form = (batch.labels != IGNORED) & ~is_knowledge
        return nll[is_knowledge].mean().item(), nll[is_form].mean().item()

    facts, form = losses(out)
    assert facts > 2
    assert facts > 2 * form
    assert form < losses(whole)[1]


def test_perturbed_answers_must_fit_the_rows(world: World, tmp_path: Path) -> None:
    for weighting in (
        KnowledgeSpanWeighting(perturbed_answers=PERTURBED[:-1]),
        KnowledgeSpanWeighting(perturbed_answers=PERTURBED, paraphrased_answers=["one"]),
    ):
        with pytest.raises(ConfigError, match="each of 8 rows"):
            unlearn(settings_for(world, tmp_path / "out", "grad_diff", weighting=weighting))


def test_perturbed_answers_that_show_nothing_are_refused(world: World, tmp_path: Path) -> None:
    same = [[row["answer"]] for row in rows_of("red")]
    weighting = KnowledgeSpanWeighting(perturbed_answers=same)
    with pytest.raises(TrainingDataError, match="no knowledge"):
        unlearn(settings_for(world, tmp_path / "out", "grad_diff", weighting=weighting))


def test_a_row_whose_perturbed_answers_show_nothing_is_forgotten_whole(base: BaseModel) -> None:
    rows = [row([10, 11, 12, 13], 2), row([20, 21, 22], 1)]
    answers = [base.tokenizer.decode([12, 13]), base.tokenizer.decode([21, 22])]
    task = make_task(model=base, forget=rows)
    weighting = KnowledgeSpanWeighting(perturbed_answers=[[answers[0]], ["other"]])
    weights = weighting.start(task)(make_batch(rows, [0], 0), torch.zeros(0), torch.zeros(0))
    assert weights[0].tolist() == [0, 1, 1, 0]


def test_atwu_starts_at_a_half_and_learns_what_can_be_forgotten() -> None:
    batch = make_batch(FORGET, CHOSEN, pad_id=0)
    is_answer = batch.labels != IGNORED
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(*batch.labels.shape, D, generator=generator)
    is_easy = (hidden[..., 0] > 0) & is_answer
    losses = torch.where(is_easy, -6.0, -1.0) * is_answer
    weights = AtwuWeighting(scorer_learning_rate=0.1).start(make_task())
    first = weights(batch, hidden, losses)
    assert torch.equal(first, 0.5 * is_answer)
    for _ in range(300):
        last = weights(batch, hidden, losses)
    assert not last.requires_grad
    assert last[is_answer & ~is_easy].max() < 0.1
    assert last[is_easy].mean() > 0.5
    assert last[is_answer].mean() < is_easy.sum() / is_answer.sum(), "the budget holds them down"
    assert not last[~is_answer].any()


def test_atwu_weights_change_what_is_forgotten(world: World, tmp_path: Path) -> None:
    weighting = AtwuWeighting(scorer_learning_rate=0.05)
    hyper = {"epochs": 6}
    weighted = unlearn(
        settings_for(world, tmp_path / "atwu", "grad_diff", weighting=weighting, hyper=hyper)
    )
    uniform = unlearn(settings_for(world, tmp_path / "uniform", "grad_diff", hyper=hyper))
    found = [(f / "model.safetensors").read_bytes() for f in (weighted, uniform)]
    assert found[0] != found[1]


def test_weights_out_of_range_are_refused() -> None:
    for setting in (
        {"budget": 1.0},
        {"budget_weight": 0.0},
        {"entropy_weight": -1.0},
        {"scorer_learning_rate": 0.0},
    ):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            AtwuWeighting(**setting)
    for setting in ({"threshold": -0.1}, {"tsallis_q": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            EntropyWeighting(**setting)


def test_every_weighting_is_listed() -> None:
    kinds = {UniformWeighting, EntropyWeighting, AtwuWeighting, KnowledgeSpanWeighting}
    assert set(WEIGHTINGS.values()) == kinds
    assert answer_places(FORGET[0]) == [2, 3, 4]
