"""Fluency by a judge: every prompt answered five times, every answer scored from 1 to 5.

The ALTER paper (arXiv 2603.01792) has GPT-4o score five responses and gives mean and variance; its prompt is
in an appendix that is not public, so ours stands in `judge.PROMPT` and on every page. Our reading: the five
responses are the evaluated model's, drawn at temperature 1, so that the variance is that of its answers and
not of the judge's mood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, pvariance

from pydantic import BaseModel as Schema
from pydantic import ConfigDict

from .judge import Judge
from .logs import digest
from .models import LanguageModel
from .prompts import chat_prompts, text_of

NUM_ANSWERS = 5
PART_PROMPTS = 16
"""So many prompts are answered, judged and written at a time."""
FIGURES = ("fluency_mean", "fluency_variance", "fluency_variance_within_prompts", "judged_share")
_MAX_NEW_TOKENS = 256


class ScoresLog(Schema):
    """What the judge makes of a model's answers to a few prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    """SHA-256 of the prompts."""
    scores: list[list[int | None]]
    """Of every prompt its five scores, None where the judge's reply held none."""


def evaluate_prompts(
    model: LanguageModel, judge: Judge, instructions: Sequence[str], *, seed: int
) -> ScoresLog:
    """Answers and scores. Raises: JudgeError, before anything is answered if the judge is down."""
    judge.check()
    prompts = chat_prompts(model.tokenizer, instructions)
    repeated = [prompt for prompt in prompts for _ in range(NUM_ANSWERS)]
    completions = model.sample(repeated, max_new_tokens=_MAX_NEW_TOKENS, seed=seed)
    answers = [text_of(model.tokenizer, ids) for ids in completions]
    asked = [text for text in instructions for _ in range(NUM_ANSWERS)]
    scores = judge.rate(list(zip(asked, answers, strict=True)))
    return ScoresLog(
        dataset=digest(list(instructions)),
        scores=[scores[at : at + NUM_ANSWERS] for at in range(0, len(scores), NUM_ANSWERS)],
    )


def figures(logs: Sequence[ScoresLog]) -> dict[str, float | None]:
    """FIGURES: mean and variance of all scores, mean variance of one prompt's, share of answers with a score.

    Variances are of the population, n in the denominator. None where no answer has a score.
    """
    prompts = [scores for log in logs for scores in log.scores]
    found = [[score for score in scores if score is not None] for scores in prompts]
    scores = [score for members in found for score in members]
    judged = len(scores) / sum(map(len, prompts))
    if not scores:
        return {**dict.fromkeys(FIGURES), "judged_share": judged}
    within = fmean(pvariance(members) for members in found if members)
    return dict(
        zip(FIGURES, (fmean(scores), float(pvariance(scores)), within, judged), strict=True)
    )


def parts_of(instructions: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Prompts by the name of the part that they belong to."""
    return {
        f"prompts-{start:04}": instructions[start : start + PART_PROMPTS]
        for start in range(0, len(instructions), PART_PROMPTS)
    }
