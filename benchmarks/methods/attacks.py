"""What brings a method's forgotten rows back: fine-tuning on retained rows, and 4-bit weights."""

from __future__ import annotations

from statistics import fmean

from alter_eval import tofu
from benchmarks.tofu.attacks import quantize, relearn
from benchmarks.tofu.experiment import Figures, encoded_files
from trainer.evaluation import rouge_l_recall

from .tasks import Task
from .unlearned import Opened, Unlearned

_BITS = 4
_RELEARNING_STEPS = 50
_MAX_NEW_TOKENS = 100


def recovery(unlearned: Unlearned, task: Task, seed: int) -> Figures:
    """Points of ROUGE-L recall of greedy answers to forgotten rows, over what is recalled without attack.

    Weights take part in both attacks, and whatever is attached stays attached: a thief of the weights
    alone needs no attack on ALTER or ECO, whose base model forgets nothing.
    """
    figures: Figures = {}
    with unlearned.open() as opened:
        before = _recall(opened, task)
        quantize(opened.base, _BITS)
        figures["int4_recovery_points"] = _recall(opened, task) - before
    with unlearned.open() as opened:
        rows = encoded_files(opened.base, task.retain)
        relearn(opened.base, rows, seed, num_steps=_RELEARNING_STEPS)
        figures["relearning_recovery_points"] = _recall(opened, task) - before
    return figures


def _recall(opened: Opened, task: Task) -> float:
    rows = tofu.encode(opened.base.tokenizer, task.asked())
    found = opened.model.complete(
        [row.ids[: row.num_prompt] for row in rows], max_new_tokens=_MAX_NEW_TOKENS
    )
    answers = [row.ids[row.num_prompt :] for row in rows]
    return 100 * fmean(rouge_l_recall(opened.base.tokenizer, answers, found))
