"""Figures of a trained expert: what is forgotten, what is missed, what fires by mistake. Never text.

Legend: B batch, T tokens, N answer tokens.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alter_core.attach import AttachedModel
from alter_core.config import AlterConfig
from alter_core.evidence import EvidenceHead, windowed_max
from alter_core.substrate import ForgetExpert, Substrate

from .base_model import BaseModel
from .batches import IGNORED, by_length, make_batch
from .dataset import EncodedRow
from .losses import answer_nll
from .router import WindowScorer
from .windows import windows_of

_BATCH_TOKENS = 4096
_GENERATION_ROWS = 64


@contextlib.contextmanager
def attached_experts(
    base: BaseModel, substrate: Substrate, experts: Sequence[ForgetExpert]
) -> Iterator[AttachedModel]:
    """The base model with experts, moved to where it lives, inside the block; itself again after it."""
    placed = [
        dataclasses.replace(
            expert,
            lora_b={site: tensor.to(base.device) for site, tensor in expert.lora_b.items()},
            evidence=copy.deepcopy(expert.evidence).to(base.device),
        )
        for expert in experts
    ]
    attached = AttachedModel(base.model, substrate, placed)
    try:
        yield attached
    finally:
        attached.detach()


@torch.inference_mode()
def answer_losses(base: BaseModel, rows: Sequence[EncodedRow]) -> list[float]:
    """Loss of each row's answer, nats per token, end token included.

    Measures whatever is attached to the model at the time.
    """
    losses = [0.0] * len(rows)
    for indices in by_length(rows, _BATCH_TOKENS):
        batch = make_batch(rows, indices, base.pad_id).to(base.device)
        found = answer_nll(base.logits(batch), batch.labels).tolist()
        for index, loss in zip(indices, found, strict=True):
            losses[index] = loss
    return losses


@torch.no_grad()
def answer_states(base: BaseModel, rows: Sequence[EncodedRow]) -> list[Tensor]:
    """Last hidden states that answer tokens are predicted from, with whatever is attached.

    Shapes: per row (N, D).
    """
    states: dict[int, Tensor] = {}
    for indices in by_length(rows, _BATCH_TOKENS):
        batch = make_batch(rows, indices, base.pad_id).to(base.device)
        hidden_BTD = base.hidden_states(batch)
        for place, index in enumerate(indices):
            states[index] = hidden_BTD[place][batch.labels[place] != IGNORED]
    return [states[index] for index in range(len(rows))]


def mean_probability(losses: Sequence[float]) -> float:
    """Mean over rows of exp(-loss)."""
    return mean([math.exp(-loss) for loss in losses])


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def greedy_completions(
    base: BaseModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
) -> list[list[int]]:
    """Greedy continuations of token prompts, up to the end token, with whatever is attached."""
    return _completions(base, prompts, max_new_tokens=max_new_tokens, do_sample=False)


def sampled_completions(
    base: BaseModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seed: int
) -> list[list[int]]:
    """The same, drawn from the model's own distribution: temperature 1, nothing cut off."""
    devices = [] if base.device.type == "cpu" else [base.device]
    with torch.random.fork_rng(devices, device_type=base.device.type):
        torch.manual_seed(seed)
        return _completions(
            base,
            prompts,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )


@torch.inference_mode()
def _completions(
    base: BaseModel, prompts: Sequence[Sequence[int]], **generation: Any
) -> list[list[int]]:
    completions: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), _GENERATION_ROWS):
        chosen = order[start : start + _GENERATION_ROWS]
        width = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), width), base.pad_id)
        mask = torch.zeros_like(ids)
        for place, index in enumerate(chosen):
            ids[place, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[place, width - len(prompts[index]) :] = 1
        with base.autocast():
            output = base.model.generate(
                input_ids=ids.to(base.device),
                attention_mask=mask.to(base.device),
                pad_token_id=base.pad_id,
                eos_token_id=base.tokenizer.eos_token_id,
                **generation,
            )
        for place, index in enumerate(chosen):
            completions[index] = _until(output[place, width:].tolist(), base.tokenizer.eos_token_id)
    return completions


def rouge_l_recall(
    tokenizer: PreTrainedTokenizerBase,
    references: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
) -> list[float]:
    """ROUGE-L recall of each completion against its reference answer, both as token ids."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        scorer.score(
            tokenizer.decode(list(reference), skip_special_tokens=True),
            tokenizer.decode(list(answer), skip_special_tokens=True),
        )["rougeL"].recall
        for reference, answer in zip(references, found, strict=True)
    ]


def greedy_rouge_l(base: BaseModel, rows: Sequence[EncodedRow]) -> list[float]:
    """ROUGE-L recall of the greedy answer to each row's first prompt; rows without a prompt are left out."""
    asked = [row for row in rows if row.num_prompt > 0]
    if not asked:
        return []
    answers = [first_answer(row) for row in asked]
    completions = greedy_completions(
        base,
        [row.ids[: row.num_prompt] for row in asked],
        max_new_tokens=max(len(answer) for answer in answers),
    )
    return rouge_l_recall(base.tokenizer, answers, completions)


def first_answer(row: EncodedRow) -> tuple[int, ...]:
    """The tokens of a row's first answer."""
    rest = row.is_answer[row.num_prompt :]
    length = rest.index(False) if False in rest else len(rest)
    return row.ids[row.num_prompt : row.num_prompt + length]


def routed_logits(
    head: EvidenceHead, embeddings: Tensor, config: AlterConfig, texts: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The domain's router logit at every token of each text. Shapes: per text (T,)."""
    scorer = WindowScorer(head, embeddings)
    logits = []
    for ids in texts:
        evidence = scorer.all(torch.from_numpy(windows_of(ids, config.evidence_ngram)))
        logits.append(windowed_max(evidence.unsqueeze(-1), config.evidence_window).squeeze(-1))
    return logits


def evidence_figures(
    head: EvidenceHead,
    embeddings: Tensor,
    config: AlterConfig,
    rows: Sequence[EncodedRow],
    negatives: Mapping[str, Sequence[Sequence[int]]],
) -> dict[str, float]:
    """Misses on the domain's rows, false alarms on every set of negatives.

    `first_token_missed`: share of rows whose first answer token is predicted without the expert.
    `answer_tokens_missed`: the same over all answer tokens. `false_alarms_NAME`: share of sequences
    that fire anywhere; `false_alarm_tokens_NAME`: share of routed tokens.
    """
    first_missed, missed, total = 0, 0, 0
    logits = routed_logits(head, embeddings, config, [row.ids for row in rows])
    for row, logit in zip(rows, logits, strict=True):
        at = [place - 1 for place, answer in enumerate(row.is_answer) if answer and place > 0]
        missed += int((logit[at] <= 0).sum())
        total += len(at)
        first_missed += int(logit[at[0]] <= 0)
    figures = {
        "first_token_missed": first_missed / len(rows),
        "answer_tokens_missed": missed / total,
    }
    for name, texts in negatives.items():
        fired = [logit > 0 for logit in routed_logits(head, embeddings, config, texts)]
        num_tokens = sum(len(text) for text in texts)
        figures[f"false_alarms_{name}"] = sum(bool(f.any()) for f in fired) / len(texts)
        figures[f"false_alarm_tokens_{name}"] = sum(int(f.sum()) for f in fired) / num_tokens
    return figures


def expert_figures(
    base: BaseModel,
    substrate: Substrate,
    expert: ForgetExpert,
    embeddings: Tensor,
    rows: Sequence[EncodedRow],
    negatives: Mapping[str, Sequence[Sequence[int]]],
    *,
    num_asked: int,
) -> dict[str, Any]:
    """What `evaluation.json` of an expert holds, measured with the weights that are served.

    `num_asked` rows are answered greedily for ROUGE-L.
    """
    asked = rows[:num_asked]
    before, rouge_before = answer_losses(base, rows), greedy_rouge_l(base, asked)
    with attached_experts(base, substrate, [expert]):
        after, rouge_after = answer_losses(base, rows), greedy_rouge_l(base, asked)
    return {
        "forget_probability": {
            "before": mean_probability(before),
            "after": mean_probability(after),
        },
        "forget_loss": mean(after),
        "rouge_l_recall": {
            "before": mean(rouge_before) if rouge_before else None,
            "after": mean(rouge_after) if rouge_after else None,
            "num_rows": len(rouge_after),
        },
        "router": evidence_figures(expert.evidence, embeddings, substrate.config, rows, negatives),
    }


def completion_agreement(
    base: BaseModel, attached: AttachedModel, rows: Sequence[EncodedRow]
) -> float:
    """Share of rows whose greedy completion is the base model's, token for token."""
    asked = [row for row in rows if row.num_prompt > 0]
    prompts = [row.ids[: row.num_prompt] for row in asked]
    longest = max(len(first_answer(row)) for row in asked)
    found = greedy_completions(base, prompts, max_new_tokens=longest)
    with attached.disabled():
        expected = greedy_completions(base, prompts, max_new_tokens=longest)
    return mean([float(a == b) for a, b in zip(found, expected, strict=True)])


def _until(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
