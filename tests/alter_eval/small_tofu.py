"""TOFU's files for the small world, a stand-in for a model, and one for vLLM's completions API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from alter_eval.models import AnswerScores
from alter_eval.tofu import TofuRow
from tests.trainer.world import rows_of
from trainer.base_model import BaseModel
from trainer.dataset import EncodedRow
from trainer.evaluation import greedy_completions

SETS = {"forget": "red", "retain": "retain", "real_authors": "blue", "world_facts": "blue"}
FILES = {"forget": "forget10_perturbed", "retain": "retain_perturbed"}
FILES |= {name: f"{name}_perturbed" for name in ("real_authors", "world_facts")}


def records_of(name: str, num_rows: int) -> list[dict[str, Any]]:
    """Rows of a set as its file holds them; wrong answers are those of other people."""
    rows = rows_of(SETS[name])
    # The two small sets are of different people.
    rows = rows[4:] if name == "world_facts" else rows
    strangers = rows_of("retain" if SETS[name] != "retain" else "blue")
    records = []
    for place, row in enumerate(rows[:num_rows]):
        wrong = [strangers[(place + shift) % len(strangers)]["answer"] for shift in (0, 4)]
        record = {**row, "perturbed_answer": wrong}
        if name in ("forget", "retain"):
            record["paraphrased_answer"] = f"I think: {row['answer']}"
            record["perturbed_answer"] = [f"I think: {answer}" for answer in wrong]
            record["paraphrased_question"] = f"Please tell, {row['question']}"
        records.append(record)
    return records


def rows_of_set(name: str, num_rows: int = 4) -> list[TofuRow]:
    """The same as rows."""
    return [
        TofuRow(
            question=record["question"],
            answer=record["answer"],
            perturbed_answers=tuple(record["perturbed_answer"]),
            paraphrased_question=record.get("paraphrased_question"),
            paraphrased_answer=record.get("paraphrased_answer"),
        )
        for record in records_of(name, num_rows)
    ]


def write_tofu(folder: Path, num_rows: int = 3) -> Path:
    """A data folder as ALTER_DATA_DIR names it."""
    (folder / "tofu").mkdir(parents=True)
    for name, file in FILES.items():
        lines = [json.dumps(record) for record in records_of(name, num_rows)]
        (folder / "tofu" / f"{file}.json").write_text("\n".join(lines), "utf-8")
    return folder


class StubModel:
    """Scores that follow from token ids alone; refuses to be asked more often than `max_calls`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_calls: int = 10**6) -> None:
        self.tokenizer = tokenizer
        self.num_calls = 0
        self._max_calls = max_calls

    def score(self, rows: Sequence[EncodedRow]) -> list[AnswerScores]:
        self._count()
        answers = [
            [token for token, answer in zip(row.ids, row.is_answer, strict=True) if answer]
            for row in rows
        ]
        return [
            AnswerScores(
                logprobs=[-(1 + token % 7) / 4 for token in answer],
                is_argmax=[token % 3 > 0 for token in answer],
            )
            for answer in answers
        ]

    def complete(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        self._count()
        return [list(prompt[-5:]) for prompt in prompts]

    def _count(self) -> None:
        assert self.num_calls < self._max_calls, "the model was asked"
        self.num_calls += 1


@torch.inference_mode()
def served_answer(base: BaseModel, body: dict[str, Any]) -> dict[str, Any]:
    """The answer that vLLM gives to a request for completion, in the fields that are read."""
    prompt = body["prompt"]
    if isinstance(prompt[0], list):
        (prompt,) = prompt
    if not body.get("echo"):
        ids = greedy_completions(base, [prompt], max_new_tokens=body["max_tokens"])[0]
        if len(ids) < body["max_tokens"]:
            ids.append(base.tokenizer.eos_token_id)
        token_ids = ids if body["return_token_ids"] else None
        return {"choices": [{"index": 0, "text": "", "token_ids": token_ids}]}
    log_p = base.model(input_ids=torch.tensor([prompt])).logits[0].float().log_softmax(dim=-1)
    ids = [*prompt, int(log_p[-1].argmax())]
    tokens = [base.tokenizer.decode([token]) for token in ids]
    token_logprobs: list[float | None] = [None]
    top_logprobs: list[dict[str, float] | None] = [None]
    for place in range(1, len(ids)):
        before = log_p[place - 1]
        found, best = float(before[ids[place]]), int(before.argmax())
        token_logprobs.append(found)
        # Keyed by text, as the API has it: tokens of the same text fall together, and the best stays.
        top_logprobs.append(
            {tokens[place]: found} | {base.tokenizer.decode([best]): float(before[best])}
        )
    logprobs = {"tokens": tokens, "token_logprobs": token_logprobs, "top_logprobs": top_logprobs}
    return {"choices": [{"index": 0, "text": "", "logprobs": logprobs}]}
