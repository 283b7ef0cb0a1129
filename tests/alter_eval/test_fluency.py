from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, cast

import pytest

from alter_core.errors import JudgeError
from alter_eval import fluency
from alter_eval.fluency import ScoresLog
from alter_eval.judge import Judge
from trainer.base_model import BaseModel

from .small_tofu import StubModel


class Talker(StubModel):
    """Says something else each time, the end of the prompt first."""

    def sample(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seed: int
    ) -> list[list[int]]:
        self.seed, self.max_new_tokens = seed, max_new_tokens
        return [
            [*prompt[-3:], *self.tokenizer(f" {place}")["input_ids"]]
            for place, prompt in enumerate(prompts)
        ]


class Counting:
    """Scores answers by the order in which they come."""

    def __init__(self, *, is_down: bool = False) -> None:
        self.pairs: list[tuple[str, str]] = []
        self.is_down = is_down

    def check(self) -> None:
        if self.is_down:
            raise JudgeError("down")

    def rate(self, pairs: Sequence[tuple[str, str]]) -> list[int | None]:
        self.pairs += pairs
        return [place % 5 + 1 if place != 7 else None for place in range(len(pairs))]


def test_every_prompt_is_answered_and_scored_five_times(base: BaseModel) -> None:
    model, judge = Talker(base.tokenizer), Counting()
    log = fluency.evaluate_prompts(model, cast("Judge", judge), ["Sing.", "Say why."], seed=3)
    assert log.scores == [[1, 2, 3, 4, 5], [1, 2, None, 4, 5]]
    assert [instruction for instruction, _ in judge.pairs] == ["Sing."] * 5 + ["Say why."] * 5
    assert len({answer for _, answer in judge.pairs}) == 10
    assert (model.seed, model.max_new_tokens) == (3, 256)


def test_nothing_is_answered_while_the_judge_is_down(base: BaseModel) -> None:
    model = Talker(base.tokenizer)
    with pytest.raises(JudgeError):
        fluency.evaluate_prompts(model, cast("Judge", Counting(is_down=True)), ["Sing."], seed=0)
    assert not hasattr(model, "seed")


def test_figures_are_of_all_scores_and_within_prompts() -> None:
    scores: list[list[int | None]] = [[1, 2, 2, 5, None], [4, 4, 4, 4, 5], [None] * 5]
    logs = [
        ScoresLog(dataset="a", scores=scores[:1]),
        ScoresLog(dataset="b", scores=scores[1:]),
    ]
    figures = fluency.figures(logs)
    known: Any = [score for row in scores for score in row if score is not None]
    mean = sum(known) / 9
    assert figures["fluency_mean"] == pytest.approx(mean)
    assert figures["fluency_variance"] == pytest.approx(sum((x - mean) ** 2 for x in known) / 9)
    within = [statistics.pvariance([1, 2, 2, 5]), statistics.pvariance([4, 4, 4, 4, 5])]
    assert figures["fluency_variance_within_prompts"] == pytest.approx(sum(within) / 2)
    assert figures["judged_share"] == pytest.approx(9 / 15)


def test_without_any_score_there_is_no_mean() -> None:
    figures = fluency.figures([ScoresLog(dataset="a", scores=[[None] * 5])])
    assert figures == {**dict.fromkeys(fluency.FIGURES), "judged_share": 0.0}


def test_prompts_fall_into_parts_in_order() -> None:
    instructions = [f"{number}" for number in range(37)]
    parts = fluency.parts_of(instructions)
    assert list(parts) == ["prompts-0000", "prompts-0016", "prompts-0032"]
    assert [text for part in parts.values() for text in part] == instructions
