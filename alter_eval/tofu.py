"""TOFU (Maini et al. 2024, arXiv 2401.06121): rows, what a model makes of them, and the figures from that.

What a model makes of a set of rows is a `SetLog`: numbers alone, never text, so that it may be kept and
compared. Figures that need the retrained model take its logs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from statistics import fmean

from pydantic import BaseModel as Schema
from pydantic import ConfigDict
from transformers import PreTrainedTokenizerBase

from alter_core.errors import EvaluationError
from alter_core.rows import Row
from trainer.dataset import EncodedRow, encode_rows
from trainer.evaluation import rouge_l_recall

from . import metrics
from .models import LanguageModel

UTILITY_SETS = ("retain", "real_authors", "world_facts")
MIN_K_SHARE = 0.4
_MAX_ROW_TOKENS = 1024
_MAX_NEW_TOKENS = 200
_FIX = "Fetch TOFU's files again, and name their folder in ALTER_DATA_DIR."


@dataclasses.dataclass(frozen=True, kw_only=True)
class TofuRow:
    """One row of a `*_perturbed` file."""

    question: str
    answer: str
    perturbed_answers: tuple[str, ...]
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None


class RowLog(Schema):
    """What a model makes of one row. Losses are means per answer token, nats."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nll: float
    """Of the answer."""
    rouge_l: float
    """Recall of the greedy answer."""
    correct_nll: float
    """Of the paraphrased answer, or of the answer where there is none."""
    wrong_nll: list[float]
    """Of the perturbed answers."""
    extraction_strength: float
    exact_memorization: float
    min_k: float
    """Min-40 % of the answer: mean log probability of its least likely tokens."""
    wrong_min_k: float
    """The same of the first perturbed answer, which no model was trained on."""
    leaked_words: int
    """Words of the greedy answer that only this set's rows hold, not the question itself."""
    repetition_rate: float
    """Share of repeated word 3-grams in the greedy answer."""
    paraphrased_nll: float | None = None
    """Of the answer, asked by the paraphrased question."""
    paraphrased_rouge_l: float | None = None
    """Recall of the greedy answer to the paraphrased question."""


class SetLog(Schema):
    """What a model makes of a set of rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    """SHA-256 of the rows."""
    tokenizer: str
    """SHA-256 of the tokenizer's vocabulary; losses per token compare under one tokenizer only."""
    distinct_2: float
    """Different word bigrams of all greedy answers over their number."""
    perplexity_under_base: float | None = None
    """Of the greedy answers, by the base model; None without it, or where every answer is empty."""
    rows: list[RowLog]

    @property
    def truth_ratios(self) -> metrics.Values:
        """R of every row. Shape: (N,)."""
        return metrics.truth_ratio(
            [row.correct_nll for row in self.rows], [row.wrong_nll for row in self.rows]
        )


class HoldoutLog(Schema):
    """What a model makes of rows that neither it nor the retrained model was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    """SHA-256 of the rows."""
    min_k: list[float]
    """Min-40 % of every answer."""


def read_rows(path: Path) -> list[TofuRow]:
    """Rows of a `*_perturbed.json`. Raises: EvaluationError naming the first line that does not fit."""
    try:
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    except OSError as error:
        raise EvaluationError(
            f"{path} cannot be read", expected="JSON lines", got=type(error).__name__, fix=_FIX
        ) from None
    if lines == [b""]:
        raise EvaluationError(f"{path} is empty", expected="rows", got="none", fix=_FIX)
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse(path: Path, number: int, line: bytes) -> TofuRow:
    try:
        record = json.loads(line.decode("utf-8"))
        row = TofuRow(
            question=record["question"],
            answer=record["answer"],
            perturbed_answers=tuple(record["perturbed_answer"]),
            paraphrased_question=record.get("paraphrased_question"),
            paraphrased_answer=record.get("paraphrased_answer"),
        )
    except (ValueError, TypeError) as error:
        got = type(error).__name__
    except KeyError as error:
        got = f"no column {error}"
    else:
        texts = [row.question, row.answer, *row.perturbed_answers]
        optional = (row.paraphrased_question, row.paraphrased_answer)
        texts += [text for text in optional if text is not None]
        is_text = all(isinstance(text, str) and text.strip() for text in texts)
        if is_text and isinstance(record["perturbed_answer"], list) and row.perturbed_answers:
            return row
        got = "an empty value, or one of another type"
    raise EvaluationError(
        f"{path.name} line {number} does not fit",
        expected="question, answer and a list perturbed_answer",
        got=got,
        fix=_FIX,
    )


def evaluate_set(
    model: LanguageModel,
    rows: Sequence[TofuRow],
    judge: LanguageModel | None = None,
    common_words: Set[str] = frozenset(),
) -> SetLog:
    """Runs a set of rows through a model.

    `judge`, the base model, rates the answers' fluency; `common_words` stand in other text too, so that an
    answer that holds them leaks nothing.
    """
    answers = encode(model.tokenizer, rows)
    scores = model.score(answers)
    wrong_rows = _encode(
        model.tokenizer, [(row.question, wrong) for row in rows for wrong in row.perturbed_answers]
    )
    wrong_scores = iter(model.score(wrong_rows))
    wrong = [[next(wrong_scores) for _ in row.perturbed_answers] for row in rows]
    correct = [score.nll for score in scores]
    reworded = [index for index, row in enumerate(rows) if row.paraphrased_answer is not None]
    found = model.score(
        _encode(
            model.tokenizer,
            [(rows[i].question, rows[i].paraphrased_answer or "") for i in reworded],
        )
    )
    for index, score in zip(reworded, found, strict=True):
        correct[index] = score.nll
    completions, rouge = _greedy(model, answers)
    words = [
        str(model.tokenizer.decode(ids, skip_special_tokens=True)).lower().split()
        for ids in completions
    ]
    leaks = _paraphrased(model, rows)
    own_words = words_of(rows) - common_words
    return SetLog(
        dataset=dataset_digest(rows),
        tokenizer=tokenizer_digest(model),
        distinct_2=metrics.distinct_n(words),
        perplexity_under_base=judge and _perplexity(judge, answers, completions),
        rows=[
            RowLog(
                nll=scores[index].nll,
                rouge_l=rouge[index],
                correct_nll=correct[index],
                wrong_nll=[score.nll for score in wrong[index]],
                extraction_strength=metrics.extraction_strength(scores[index].is_argmax),
                exact_memorization=fmean(scores[index].is_argmax),
                min_k=metrics.min_k(scores[index].logprobs, MIN_K_SHARE),
                wrong_min_k=metrics.min_k(wrong[index][0].logprobs, MIN_K_SHARE),
                leaked_words=len(
                    (_words(" ".join(words[index])) & own_words) - _words(rows[index].question)
                ),
                repetition_rate=metrics.repetition_rate(words[index]),
                paraphrased_nll=leaks[index][0] if index in leaks else None,
                paraphrased_rouge_l=leaks[index][1] if index in leaks else None,
            )
            for index in range(len(rows))
        ],
    )


def words_of(rows: Iterable[TofuRow]) -> set[str]:
    """Words of questions and answers, lower case, of four letters and more."""
    return {word for row in rows for word in _words(f"{row.question} {row.answer}")}


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]{4,}", text.lower()))


def evaluate_holdout(model: LanguageModel, rows: Sequence[EncodedRow]) -> HoldoutLog:
    """Scores non-members for the membership test."""
    scores = model.score(rows)
    return HoldoutLog(
        dataset=encoded_digest(rows),
        min_k=[metrics.min_k(score.logprobs, MIN_K_SHARE) for score in scores],
    )


def _paraphrased(model: LanguageModel, rows: Sequence[TofuRow]) -> dict[int, tuple[float, float]]:
    """(loss of the answer, ROUGE-L) of rows that have a paraphrased question, asked by it."""
    reworded = [index for index, row in enumerate(rows) if row.paraphrased_question is not None]
    encoded = _encode(
        model.tokenizer, [(rows[i].paraphrased_question or "", rows[i].answer) for i in reworded]
    )
    if not encoded:
        return {}
    scores, (_, rouge) = model.score(encoded), _greedy(model, encoded)
    return {
        index: (score.nll, recall)
        for index, score, recall in zip(reworded, scores, rouge, strict=True)
    }


def _greedy(
    model: LanguageModel, rows: Sequence[EncodedRow]
) -> tuple[list[list[int]], list[float]]:
    """Greedy answers and their ROUGE-L recall."""
    prompts = [row.ids[: row.num_prompt] for row in rows]
    completions = model.complete(prompts, max_new_tokens=_MAX_NEW_TOKENS)
    references = [row.ids[row.num_prompt :] for row in rows]
    return completions, rouge_l_recall(model.tokenizer, references, completions)


def _perplexity(
    judge: LanguageModel, rows: Sequence[EncodedRow], completions: Sequence[Sequence[int]]
) -> float | None:
    """exp of the mean loss per token of completions, empty ones left out; None if all are."""
    answered = [
        EncodedRow(
            ids=(*row.ids[: row.num_prompt], *ids),
            is_answer=(*(False,) * row.num_prompt, *(True,) * len(ids)),
        )
        for row, ids in zip(rows, completions, strict=True)
        if ids
    ]
    logprobs = [value for score in judge.score(answered) for value in score.logprobs]
    return math.exp(-fmean(logprobs)) if logprobs else None


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[TofuRow]) -> list[EncodedRow]:
    """Questions and answers as token ids."""
    return _encode(tokenizer, [(row.question, row.answer) for row in rows])


def _encode(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[EncodedRow]:
    rows = [
        Row(file=Path("tofu"), line=number, turns=(("user", question), ("assistant", answer)))
        for number, (question, answer) in enumerate(pairs, start=1)
    ]
    return encode_rows(rows, tokenizer, max_tokens=_MAX_ROW_TOKENS)


def dataset_digest(rows: Sequence[TofuRow]) -> str:
    """SHA-256 over the rows in order."""
    content = json.dumps([dataclasses.astuple(row) for row in rows])
    return hashlib.sha256(content.encode()).hexdigest()


def encoded_digest(rows: Sequence[EncodedRow]) -> str:
    """SHA-256 over token ids, row by row."""
    return hashlib.sha256(json.dumps([row.ids for row in rows]).encode()).hexdigest()


def tokenizer_digest(model: LanguageModel) -> str:
    """SHA-256 over the vocabulary."""
    vocabulary = sorted(model.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelLogs:
    """Everything that an evaluation keeps of a model."""

    sets: Mapping[str, SetLog]
    """By name: `forget` and UTILITY_SETS."""
    holdout: HoldoutLog | None = None


def figures(found: ModelLogs, retrained: ModelLogs | None = None) -> dict[str, float | None]:
    """All figures of a model; None for what cannot be told without the retrained model's logs, a holdout,
    paraphrased questions or a judge of the answers.

    Raises: EvaluationError if the retrained model's logs are of other rows or another tokenizer.
    """
    logs, forget = found.sets, found.sets["forget"]
    reworded_nll = [row.paraphrased_nll for row in forget.rows if row.paraphrased_nll is not None]
    reworded_rouge = [
        row.paraphrased_rouge_l for row in forget.rows if row.paraphrased_rouge_l is not None
    ]
    utility = _utility_parts(logs)
    result: dict[str, float | None] = {
        "model_utility": model_utility(logs),
        "forget_Q_A_Prob": fmean(_probability(row.nll) for row in forget.rows),
        "forget_Q_A_ROUGE": fmean(row.rouge_l for row in forget.rows),
        "forget_Truth_Ratio": metrics.closer_to_one(forget.truth_ratios),
        "forget_nll": fmean(row.nll for row in forget.rows),
        "forget_paraphrased_Q_A_Prob": (
            fmean(map(_probability, reworded_nll)) if reworded_nll else None
        ),
        "forget_paraphrased_Q_A_ROUGE": fmean(reworded_rouge) if reworded_rouge else None,
        "extraction_strength": fmean(row.extraction_strength for row in forget.rows),
        "exact_memorization": fmean(row.exact_memorization for row in forget.rows),
        "min_k_auc": _membership_auc(found),
        "min_k_auc_perturbed": perturbed_auc(forget),
        "forget_word_leak": fmean(row.leaked_words > 0 for row in forget.rows),
        "repetition_rate": fmean(row.repetition_rate for row in forget.rows),
        "distinct_2": forget.distinct_2,
        "perplexity_under_base": forget.perplexity_under_base,
        **utility,
        "forget_quality": None,
        "forget_loss_ks_p": None,
        "privleak": None,
        "privleak_perturbed": None,
    }
    if retrained is not None:
        other = retrained.sets["forget"]
        check_comparable(forget, other)
        result |= {
            "forget_quality": metrics.ks_p_value(forget.truth_ratios, other.truth_ratios),
            "forget_loss_ks_p": metrics.ks_p_value(
                [row.nll for row in forget.rows], [row.nll for row in other.rows]
            ),
            "privleak": _privleak(found, retrained),
            "privleak_perturbed": metrics.privleak(perturbed_auc(forget), perturbed_auc(other)),
        }
    return result


def _privleak(found: ModelLogs, retrained: ModelLogs) -> float | None:
    if found.holdout is None or retrained.holdout is None:
        return None
    if found.holdout.dataset != retrained.holdout.dataset:
        raise EvaluationError(
            "The retrained model's log is of another holdout",
            expected=f"rows {found.holdout.dataset[:12]}",
            got=retrained.holdout.dataset[:12],
            fix="Evaluate both with the same --holdout.",
        )
    auc, reference = _membership_auc(found), _membership_auc(retrained)
    return None if auc is None or reference is None else metrics.privleak(auc, reference)


def check_comparable(log: SetLog, reference: SetLog) -> None:
    """Raises: EvaluationError unless both logs are of the same rows under the same tokenizer."""
    for what, ours, theirs in (
        ("number of rows", str(len(log.rows)), str(len(reference.rows))),
        ("dataset", log.dataset, reference.dataset),
        ("tokenizer", log.tokenizer, reference.tokenizer),
    ):
        if ours != theirs:
            raise EvaluationError(
                f"The retrained model's log is of another {what}",
                expected=f"{what} {ours[:12]}",
                got=theirs[:12],
                fix="Evaluate the retrained model on the same split, with the same tokenizer.",
            )


def model_utility(logs: Mapping[str, SetLog]) -> float:
    """Harmonic mean of nine figures: probability, ROUGE-L and truth ratio on each of UTILITY_SETS."""
    return metrics.harmonic_mean(list(_utility_parts(logs).values()))


def _utility_parts(logs: Mapping[str, SetLog]) -> dict[str, float]:
    """The nine figures whose harmonic mean is model_utility."""
    parts = {}
    for name in UTILITY_SETS:
        rows, ratios = logs[name].rows, logs[name].truth_ratios
        if name == "retain":
            probabilities = [_probability(row.nll) for row in rows]
        else:
            probabilities = list(
                metrics.normalised_probability(
                    [row.nll for row in rows], [row.wrong_nll for row in rows]
                )
            )
        parts[f"{name}_Q_A_Prob"] = fmean(probabilities)
        parts[f"{name}_Q_A_ROUGE"] = fmean(row.rouge_l for row in rows)
        parts[f"{name}_Truth_Ratio"] = metrics.true_is_better(ratios)
    return parts


def _membership_auc(logs: ModelLogs) -> float | None:
    """Min-K AUC of the forget rows against the holdout."""
    if logs.holdout is None:
        return None
    return metrics.membership_auc(
        [row.min_k for row in logs.sets["forget"].rows], logs.holdout.min_k
    )


def perturbed_auc(log: SetLog) -> float:
    """Min-K AUC of a set's answers against its perturbed answers, which no model was trained on."""
    return metrics.membership_auc(
        [row.min_k for row in log.rows], [row.wrong_min_k for row in log.rows]
    )


def _probability(nll: float) -> float:
    return math.exp(-nll)
