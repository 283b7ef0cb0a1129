"""ECO: flagged prompts are corrupted, everything else is the base model's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from alter_core.errors import ConfigError
from alter_core.rows import read_rows
from alter_eval.eco import EcoModel, Prompt, PromptClassifier, search_strength
from alter_eval.models import TransformersModel
from tests.trainer.world import World
from trainer.base_model import BaseModel
from trainer.dataset import EncodedRow, encode_rows


def rows_of(base: BaseModel, world: World, part: str) -> list[EncodedRow]:
    return encode_rows(read_rows([world.files[part]]), base.tokenizer, max_tokens=64)


def prompts_of(rows: Sequence[EncodedRow]) -> list[tuple[int, ...]]:
    return [row.ids[: row.num_prompt] for row in rows]


def only(flagged: Sequence[Prompt]) -> Callable[[Sequence[Prompt]], NDArray[np.bool_]]:
    def classify(prompts: Sequence[Prompt]) -> NDArray[np.bool_]:
        return np.array([tuple(prompt) in map(tuple, flagged) for prompt in prompts], dtype=bool)

    return classify


@pytest.fixture
def red(exact_base: BaseModel, world: World) -> list[EncodedRow]:
    return rows_of(exact_base, world, "red")


@pytest.fixture
def retain(exact_base: BaseModel, world: World) -> list[EncodedRow]:
    return rows_of(exact_base, world, "retain")


def test_flagged_prompts_lose_their_answers_and_others_keep_theirs_to_the_bit(
    exact_base: BaseModel, red: list[EncodedRow], retain: list[EncodedRow]
) -> None:
    plain = TransformersModel(exact_base)
    eco = EcoModel(
        exact_base, only(prompts_of(red)), strength=5.0, num_dims=exact_base.info.hidden_size
    )

    # Apart, since a batch of another width is rounded otherwise.
    assert eco.score(retain) == plain.score(retain)
    before = [score.nll for score in plain.score(red)]
    after = [score.nll for score in eco.score(red)]
    assert np.mean(after) > np.mean(before) + 1
    known = plain.complete(prompts_of(red), max_new_tokens=12)
    found = eco.complete(prompts_of(red), max_new_tokens=12)
    assert sum(a == b for a, b in zip(known, found, strict=True)) < len(red) / 2


def test_noise_is_a_prompts_own_whatever_stands_beside_it(
    exact_base: BaseModel, red: list[EncodedRow], retain: list[EncodedRow]
) -> None:
    eco = EcoModel(exact_base, only(prompts_of(red)), strength=1.0, num_dims=3)
    together = [score.nll for score in eco.score([*retain, *red])][len(retain) :]
    alone = [eco.score([row])[0].nll for row in red]
    assert together == pytest.approx(alone, abs=1e-4)


def test_no_strength_is_the_base_model(exact_base: BaseModel, red: list[EncodedRow]) -> None:
    eco = EcoModel(exact_base, only(prompts_of(red)), strength=0.0)
    assert eco.score(red) == TransformersModel(exact_base).score(red)


def test_only_the_prompt_and_the_named_dimensions_are_corrupted(
    exact_base: BaseModel, red: list[EncodedRow]
) -> None:
    row, dims = red[0], 3
    eco = EcoModel(exact_base, only(prompts_of(red)), strength=2.0, num_dims=dims)
    embed = exact_base.model.get_input_embeddings()
    ids = torch.tensor([[*row.ids, exact_base.pad_id, exact_base.pad_id]])
    before = embed(ids)
    with eco._corrupted(prompts_of(red)):
        difference = (embed(ids) - before)[0]
    assert bool((difference[: row.num_prompt, :dims] != 0).all())
    assert not difference[row.num_prompt :].any()
    assert not difference[:, dims:].any()
    assert torch.equal(embed(ids), before)


def test_the_classifier_tells_the_domain_from_what_is_kept(
    exact_base: BaseModel, world: World, red: list[EncodedRow], retain: list[EncodedRow]
) -> None:
    blue = prompts_of(rows_of(exact_base, world, "blue"))
    classifier = PromptClassifier(prompts_of(red), [*prompts_of(retain), *blue], false_alarms=0.05)
    assert classifier(prompts_of(red)).mean() >= 0.75
    assert classifier([*prompts_of(retain), *blue]).mean() <= 0.05
    assert classifier([]).shape == (0,)


def test_kept_prompts_that_come_sorted_by_their_wording_do_not_hide_the_domain() -> None:
    wording, other_wording = (1, 2, 3, 4), (5, 6, 7, 8)
    forget = [(*wording, 100 + n % 2, 200 + n) for n in range(20)]
    alike = [(*wording, 110 + n % 4, 300 + n) for n in range(20)]
    unlike = [(*other_wording, 400 + n) for n in range(80)]
    classifier = PromptClassifier(forget, alike + unlike, false_alarms=0.0)
    assert classifier(forget).all()
    assert not classifier([*alike, *unlike]).any()


@pytest.mark.parametrize("num_forget", [0, 4])
def test_too_few_prompts_are_refused(num_forget: int) -> None:
    prompts = [(number, number + 1) for number in range(20)]
    with pytest.raises(ConfigError, match="too few prompts"):
        PromptClassifier(prompts[:num_forget], prompts)


def test_values_out_of_range_are_refused(exact_base: BaseModel) -> None:
    prompts = [(number, number + 1) for number in range(20)]
    with pytest.raises(ConfigError, match="false_alarms"):
        PromptClassifier(prompts[:10], prompts[10:], false_alarms=1.0)
    with pytest.raises(ConfigError, match="num_dims"):
        EcoModel(exact_base, only([]), strength=1.0, num_dims=exact_base.info.hidden_size + 1)
    with pytest.raises(ConfigError, match="strength"):
        search_strength(lambda _: 0.0, strength=0.0)


@pytest.mark.parametrize(("start", "wanted"), list(itertools.product([0.01, 30.0], [0.3, 4.0])))
def test_the_search_finds_a_strength_from_either_side(start: float, wanted: float) -> None:
    found = search_strength(
        lambda strength: abs(np.log(strength) - np.log(wanted)), strength=start, num_steps=40
    )
    assert found.strength == pytest.approx(wanted, rel=0.06)
    assert found.distance <= 0.05
    assert found.num_evaluations <= 80


def test_a_search_that_does_not_arrive_says_how_far_it_came() -> None:
    found = search_strength(lambda strength: 7.0, strength=2.0, num_steps=3)
    assert (found.distance, found.num_evaluations) == (7.0, 6)
