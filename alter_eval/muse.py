"""MUSE (Shi et al. 2024, arXiv 2407.06460): verbatim and knowledge memorisation, privacy leakage, and ASG.

Files are those that the benchmark's own repository works with, `muse/CORPUS/` for `news` and `books`:

    verbmem/forget.json                        [{"prompt", "gt"}]
    knowmem/{forget,retain}_qa{,_icl}.json     [{"question", "answer"}]
    privleak/{forget,holdout}.json             ["text", ...], optional

Prompts, lengths and ROUGE-L F1 without stems are MUSE's. One thing is ALTER's (arXiv 2603.01792): a text,
`prompt` and `gt` in one, is cut after a fixed number of tokens, 200 by default, whatever `prompt` holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from pydantic import BaseModel as Schema
from pydantic import ConfigDict
from transformers import PreTrainedTokenizerBase

from alter_core.errors import EvaluationError
from trainer.dataset import EncodedRow

from . import metrics
from .data import checked, read_json_list
from .logs import digest, read_log
from .models import LanguageModel
from .prompts import text_of
from .tofu import MIN_K_SHARE, check_comparable, tokenizer_digest

SIDES = ("forget", "retain")
PREFIX_TOKENS = 200
_VERBATIM_TOKENS = 128
_ANSWER_TOKENS = 32
_MAX_TEXT_TOKENS = 2048
_AFTER_ANSWER = ("\n\n", "\nQuestion", "Question:")
_FIX = (
    "Fetch MUSE's files as its repository has them into muse/news or muse/books of ALTER_DATA_DIR."
)

Pairs = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuseData:
    """A corpus."""

    verbatim: Sequence[str]
    """Forgotten texts."""
    knowledge: Mapping[str, Pairs]
    """Questions and answers: `forget` and `retain`."""
    examples: Mapping[str, Pairs]
    """To be shown before them."""
    membership: Mapping[str, Sequence[str]]
    """`forget`, seen in training, and `holdout`, never seen; empty where the folder has none."""

    @property
    def digest(self) -> str:
        """SHA-256 of all rows."""
        return digest(dataclasses.asdict(self))


class RowsLog(Schema):
    """What a model makes of a set of rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    """SHA-256 of the rows and of how they were asked."""
    tokenizer: str
    """SHA-256 of the tokenizer's vocabulary."""
    rows: list[dict[str, float]]
    """Of every row `rouge_l`, of verbatim ones `bleu` too; of a membership text `min_k`, nats."""

    def column(self, name: str) -> list[float]:
        """One figure of every row."""
        return [row[name] for row in self.rows]


def read_corpus(folder: Path, limit: int | None = None) -> MuseData:
    """The first `limit` rows of each file. Raises: EvaluationError if a file does not fit."""

    def pairs(path: Path, first: str, second: str) -> list[tuple[str, str]]:
        rows = enumerate(read_json_list(path, fix=_FIX), start=1)
        found = [checked(row, (first, second), f"{path.name} row {n}", fix=_FIX) for n, row in rows]
        return [(row[first], row[second]) for row in found]

    questions = {
        name: pairs(folder / "knowmem" / f"{name}.json", "question", "answer")
        for side in SIDES
        for name in (f"{side}_qa", f"{side}_qa_icl")
    }
    verbatim = pairs(folder / "verbmem" / "forget.json", "prompt", "gt")
    texts = {}
    if (folder / "privleak").is_dir():
        for name in ("forget", "holdout"):
            texts[name] = _texts(folder / "privleak" / f"{name}.json")[:limit]
    return MuseData(
        verbatim=[prompt + rest for prompt, rest in verbatim][:limit],
        knowledge={side: questions[f"{side}_qa"][:limit] for side in SIDES},
        examples={side: questions[f"{side}_qa_icl"] for side in SIDES},
        membership=texts,
    )


def _texts(path: Path) -> list[str]:
    texts = read_json_list(path, fix=_FIX)
    for number, text in enumerate(texts, start=1):
        checked({"text": text}, ("text",), f"{path.name} row {number}", fix=_FIX)
    return texts


def parts_of(
    model: LanguageModel, data: MuseData, *, prefix_tokens: int, max_tokens: int
) -> dict[str, Callable[[], Schema]]:
    """What is to be worked out, by the name of its log. Raises: ConfigError without the extra `eval`."""
    metrics.bleu((), ())  # Not only once the completions are there.
    parts: dict[str, Callable[[], Schema]] = {
        "verbmem": partial(evaluate_verbatim, model, data.verbatim, prefix_tokens=prefix_tokens)
    }
    for side, questions in data.knowledge.items():
        parts[f"knowmem_{side}"] = partial(
            evaluate_knowledge, model, questions, data.examples[side]
        )
    for name, texts in data.membership.items():
        parts[f"privleak_{name}"] = partial(
            evaluate_membership, model, texts, max_tokens=max_tokens
        )
    return parts


def read_logs(folder: Path) -> dict[str, RowsLog]:
    """The logs of a complete evaluation. Raises: EvaluationError."""
    names = ["verbmem", *(f"knowmem_{side}" for side in SIDES)]
    if (folder / "privleak_forget.json").exists():
        names += ["privleak_forget", "privleak_holdout"]
    return {name: read_log(folder / f"{name}.json", RowsLog) for name in names}


def evaluate_verbatim(
    model: LanguageModel, texts: Sequence[str], *, prefix_tokens: int = PREFIX_TOKENS
) -> RowsLog:
    """VerbMem: ROUGE-L F1 and BLEU between what follows x[:l] in the text and what the model lets follow.

    128 tokens of either. Raises: EvaluationError if a text has no more than `prefix_tokens` tokens.
    """
    encoded = [list(model.tokenizer(text)["input_ids"]) for text in texts]
    if short := [
        number for number, ids in enumerate(encoded, start=1) if len(ids) <= prefix_tokens
    ]:
        raise EvaluationError(
            f"Row {short[0]} of verbmem/forget.json is too short",
            expected=f"more than {prefix_tokens} tokens",
            got=f"{len(encoded[short[0] - 1])}, and {len(short)} such rows",
            fix="Choose fewer --prefix-tokens.",
        )
    prefixes = [ids[:prefix_tokens] for ids in encoded]
    completions = model.complete(prefixes, max_new_tokens=_VERBATIM_TOKENS)
    references = [
        text_of(model.tokenizer, ids[prefix_tokens:][:_VERBATIM_TOKENS]) for ids in encoded
    ]
    found = [text_of(model.tokenizer, ids) for ids in completions]
    rouge = metrics.rouge_l(references, found, use_stemmer=False)
    return RowsLog(
        dataset=digest([list(texts), prefix_tokens]),
        tokenizer=tokenizer_digest(model),
        rows=[
            {"rouge_l": score.f1, "bleu": bleu}
            for score, bleu in zip(rouge, metrics.bleu(references, found), strict=True)
        ],
    )


def evaluate_knowledge(model: LanguageModel, questions: Pairs, examples: Pairs) -> RowsLog:
    """KnowMem: ROUGE-L F1 of greedy answers to questions, asked after examples."""
    shown = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in examples)
    prompts = [f"{shown}Question: {question}\nAnswer: " for question, _ in questions]
    completions = model.complete(
        [list(model.tokenizer(prompt)["input_ids"]) for prompt in prompts],
        max_new_tokens=_ANSWER_TOKENS,
    )
    found = [_answer(model.tokenizer, ids) for ids in completions]
    scores = metrics.rouge_l([answer for _, answer in questions], found, use_stemmer=False)
    return RowsLog(
        dataset=digest([list(questions), list(examples)]),
        tokenizer=tokenizer_digest(model),
        rows=[{"rouge_l": score.f1} for score in scores],
    )


def _answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    for end in _AFTER_ANSWER:
        text = text.split(end)[0]
    return text


def evaluate_membership(
    model: LanguageModel, texts: Sequence[str], *, max_tokens: int = _MAX_TEXT_TOKENS
) -> RowsLog:
    """Min-40 % of texts, of each its first 2,048 tokens or the `max_tokens` that the model takes."""
    longest = min(max_tokens, _MAX_TEXT_TOKENS)
    encoded = [tuple(model.tokenizer(text)["input_ids"][:longest]) for text in texts]
    scores = model.score([EncodedRow(ids=ids, is_answer=(True,) * len(ids)) for ids in encoded])
    return RowsLog(
        dataset=digest([list(texts), longest]),
        tokenizer=tokenizer_digest(model),
        rows=[{"min_k": metrics.min_k(score.logprobs, MIN_K_SHARE)} for score in scores],
    )


def figures(
    logs: Mapping[str, RowsLog], retrained: Mapping[str, RowsLog] | None = None
) -> dict[str, float | None]:
    """All figures; None for PrivLeak without texts for it, and for what needs the retrained model's logs.

    Raises: EvaluationError if those are of other rows.
    """
    auc = _membership_auc(logs)
    result: dict[str, float | None] = {
        "verbmem_rouge_l": fmean(logs["verbmem"].column("rouge_l")),
        "verbmem_bleu": fmean(logs["verbmem"].column("bleu")),
        "knowmem_forget_rouge_l": fmean(logs["knowmem_forget"].column("rouge_l")),
        "knowmem_retain_rouge_l": fmean(logs["knowmem_retain"].column("rouge_l")),
        "min_k_auc": auc,
        "asg": None,
        "privleak": None,
    }
    if retrained is not None:
        for name in logs.keys() & retrained.keys():
            check_comparable(logs[name], retrained[name])
        similarities = ("bleu", "rouge_l")
        result["asg"] = metrics.average_similarity_gap(
            [logs["verbmem"].column(name) for name in similarities],
            [retrained["verbmem"].column(name) for name in similarities],
        )
        reference = _membership_auc(retrained)
        if auc is not None and reference is not None:
            result["privleak"] = metrics.privleak(auc, reference)
    return result


def not_measured(has_retrained: bool) -> dict[str, str]:
    """Why a figure may be None."""
    no_texts = "not told: privleak/ is not in the data folder"
    return {
        "min_k_auc": no_texts,
        "asg": "not told: needs --retrained",
        "privleak": no_texts if has_retrained else "not told: needs --retrained and privleak/",
    }


def _membership_auc(logs: Mapping[str, RowsLog]) -> float | None:
    """Min-K AUC of forgotten texts against the holdout's."""
    if "privleak_forget" not in logs:
        return None
    return metrics.membership_auc(
        logs["privleak_forget"].column("min_k"), logs["privleak_holdout"].column("min_k")
    )
