"""Multiple choice by EleutherAI's lm-eval: its task definitions and statistics, our rows and models.

Models run in lm-eval's own `hf` class, experts attached as they are, and servers in its `local-completions`.
Both get the same token ids: special tokens as the tokenizer adds them, and the beginning of a prompt cut off
where it is longer than the model's context. Needs the extra `eval`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel as Schema
from pydantic import ConfigDict

from alter_core.errors import EngineError

from .logs import digest
from .metrics import needs_extra
from .models import API_KEY_VARIABLE
from .multiple_choice import Question, Subject
from .source import Evaluated

try:
    import lm_eval
    from aiohttp import ClientError, ClientResponseError
    from datasets import Dataset
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    raise needs_extra("lm-eval") from error

VERSION = version("lm_eval")
_TASKS = Path(lm_eval.__file__).parent / "tasks"
_CONCURRENCY = 8

logging.getLogger("lm_eval").setLevel(logging.ERROR)
# Its last word on a failed request is the server's answer, prompts included; what failed is raised anyway.
logging.getLogger("lm_eval.models.api_models").setLevel(logging.CRITICAL)


class SubjectLog(Schema):
    """What a model makes of one subject."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    """SHA-256 of the questions, few-shot ones included."""
    num_rows: int
    """Questions asked."""
    acc: float
    """Share answered by the letter of the right choice, the likeliest of A to D."""
    acc_stderr: float
    """Standard error of `acc`: sample standard deviation over the root of `num_rows`."""


def harness_model(evaluated: Evaluated) -> LM:
    """What is evaluated, as lm-eval sees it."""
    source, base = evaluated.source, evaluated.base
    # One token is generated where a prompt is echoed, and must fit behind it.
    max_tokens = base.max_tokens - 1
    if source.server is None:
        # Rows alone: logits of a whole prompt over a large vocabulary take gigabytes as it is.
        return HFLM(
            base.model,
            tokenizer=base.tokenizer,
            backend="causal",
            batch_size=1,
            max_length=max_tokens - 1,  # of what is read; the last choice's token is only predicted
            softmax_dtype="float32",
        )
    headers = {"Content-Type": "application/json"}
    if source.api_key is not None:
        headers["Authorization"] = f"Bearer {source.api_key}"
    return _Served(
        base_url=f"{source.server.rstrip('/')}/v1/completions",
        model=source.served_model,
        tokenizer=str(source.model),
        tokenizer_backend="huggingface",
        add_bos_token=True,  # whatever special tokens the tokenizer adds, as the class above has it
        max_length=max_tokens + 1,
        num_concurrent=_CONCURRENCY,
        # Never none: lm-eval would send OPENAI_API_KEY, which is another party's.
        header=headers,
    )


class _Served(LocalCompletionsAPI):
    """`local-completions`, with errors that say what to do."""

    def loglikelihood(self, requests: Any, **options: Any) -> list[tuple[float, bool]]:
        try:
            return super().loglikelihood(requests, **options)
        except (ClientError, TimeoutError, LookupError, TypeError, ValueError) as error:
            got = type(error).__name__
            fix = "Check --server; it must be a vLLM server, which echoes prompts with log probabilities."
            if isinstance(error, ClientResponseError):
                got = f"status {error.status}"
                fix = (
                    f"Check --served-model, {API_KEY_VARIABLE} and the server's --max-model-len, which must "
                    f"be {self.max_length + 1} or more."
                )
            raise EngineError(
                "The server did not answer a question of the evaluation",
                expected=f"log probabilities from {self.base_url}",
                got=got,
                fix=f"{fix} A repeated command goes on where it stopped.",
            ) from None


def evaluate_subject(
    lm: LM,
    task: str,
    subject: Subject,
    *,
    num_fewshot: int = 0,
    limit: int | None = None,
) -> SubjectLog:
    """Runs one of lm-eval's tasks (`mmlu_anatomy`, `wmdp_bio`) on rows that are given.

    The first `num_fewshot` of `subject.dev` are shown before each of the first `limit` questions.
    """
    test = subject.test
    splits = {"test": _dataset(test), "dev": _dataset(subject.dev)}
    override = {"task": task, "custom_dataset": lambda **_: splits, "num_fewshot": num_fewshot}
    manager = TaskManager(
        include_path=[_TASKS / "mmlu" / "default", _TASKS / "wmdp"], include_defaults=False
    )
    # A task's own definition is looked up, and overridden, as the member of a group.
    tasks = manager.load({"group": f"only_{task}", "task": [override]})
    found = evaluate(lm, tasks, limit=limit, log_samples=False)["results"][task]
    return SubjectLog(
        dataset=subject_digest(subject),
        num_rows=min(len(test), limit or len(test)),
        acc=found["acc,none"],
        acc_stderr=found["acc_stderr,none"],
    )


def subject_digest(subject: Subject) -> str:
    """SHA-256 of a subject's questions, in order."""
    return digest(dataclasses.asdict(subject))


def accuracy_figures(benchmark: str, logs: Mapping[str, SubjectLog]) -> dict[str, float | None]:
    """Accuracies and standard errors: of all questions, pooled by lm-eval, and of every subject."""
    sizes = [log.num_rows for log in logs.values()]
    figures: dict[str, float | None] = {
        f"{benchmark}_acc": aggregate_subtask_metrics([log.acc for log in logs.values()], sizes),
        f"{benchmark}_acc_stderr": float(
            pooled_sample_stderr([log.acc_stderr for log in logs.values()], sizes)
        ),
    }
    for subject, log in logs.items():
        figures[f"{benchmark}_{subject}_acc"] = log.acc
        figures[f"{benchmark}_{subject}_acc_stderr"] = log.acc_stderr
    return figures


def _dataset(rows: Sequence[Question]) -> Dataset:
    return Dataset.from_list(
        [{"question": r.question, "choices": list(r.choices), "answer": r.answer} for r in rows]
    )
