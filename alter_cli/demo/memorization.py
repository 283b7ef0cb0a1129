"""Training a small causal model until it answers its rows word for word, on a CPU.

Loss: weighted mean over tokens of -log p; answer tokens (end token included) weigh 1, all others
`context_weight`, so that questions and general text are modelled too, but the answers lead.
AdamW in float32 under bfloat16 autocast; linear warm-up, then a cosine. Training ends as soon as
an epoch's mean -log p of the answer tokens is below `stop_loss`.

Legend: B rows, T tokens, D hidden, V vocabulary, N weighted tokens of a batch.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from alter_core.errors import TrainingError
from alter_core.machine import fast_dtype

BUCKET_BATCHES = 8
"""Batches are cut from pools of this many, sorted by length: little padding, varied company."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train."""

    learning_rate: float = 1.5e-3
    """Peak of the schedule."""
    warmup_steps: int = 50
    """Steps of linear rise to the peak."""
    batch_rows: int = 16
    """Sequences per step."""
    max_epochs: int = 24
    """The cosine reaches 5 % of the peak after this many epochs."""
    stop_loss: float = 0.006
    """Nats per answer token, mean over an epoch, below which training ends."""
    context_weight: float = 0.2
    """Weight of tokens outside answers, 0 to below 1."""
    general_share: float = 0.15
    """General texts drawn per row and epoch, 0 or more."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sequence: its token ids, and where the answer begins (their number if there is none)."""

    ids: list[int]
    answer_start: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where training stands; told after every step."""

    step: int
    max_steps: int
    epoch: int
    answer_loss: float
    """Nats per answer token, mean over the epoch so far."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What training took and where it ended."""

    train_s: float
    tokens_per_s: float
    num_epochs: int
    answer_loss: float
    """Nats per answer token, mean over the last epoch."""


def memorize(
    model: LlamaForCausalLM,
    rows: Sequence[Example],
    general: Sequence[Example],
    *,
    schedule: Schedule,
    seed: int,
    progress: Callable[[Progress], None],
) -> Outcome:
    """Train `model` in place on `rows`, with some of `general` drawn anew in each epoch.

    Raises: TrainingError where the loss is not finite.
    """
    rng = random.Random(seed)
    num_general = min(len(general), round(schedule.general_share * len(rows)))
    steps_per_epoch = math.ceil((len(rows) + num_general) / schedule.batch_rows)
    stepper = _Stepper(model, schedule, steps_per_epoch * schedule.max_epochs)
    model.train()
    started, num_tokens, answer_loss, epoch = time.monotonic(), 0, math.inf, 0
    while epoch < schedule.max_epochs and not answer_loss < schedule.stop_loss:
        epoch += 1
        loss_sum, num_answer_tokens = 0.0, 0
        for batch in batches([*rows, *rng.sample(general, num_general)], schedule.batch_rows, rng):
            total, count = stepper.step(batch)
            loss_sum, num_answer_tokens = loss_sum + total, num_answer_tokens + count
            num_tokens += sum(len(example.ids) for example in batch)
            answer_loss = loss_sum / max(num_answer_tokens, 1)
            progress(stepper.progress(epoch, answer_loss))
    train_s = time.monotonic() - started
    return Outcome(
        train_s=train_s,
        tokens_per_s=num_tokens / train_s,
        num_epochs=epoch,
        answer_loss=answer_loss,
    )


def batches(examples: list[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Every example once, in random batches of similar length."""
    rng.shuffle(examples)
    pool = size * BUCKET_BATCHES
    for start in range(0, len(examples), pool):
        near = sorted(examples[start : start + pool], key=lambda example: len(example.ids))
        cut = [near[at : at + size] for at in range(0, len(near), size)]
        rng.shuffle(cut)
        yield from cut


class _Stepper:
    """Updates a model batch by batch along the schedule."""

    def __init__(self, model: LlamaForCausalLM, schedule: Schedule, max_steps: int) -> None:
        self.model, self.schedule = model, schedule
        self.num_steps, self.max_steps = 0, max_steps
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )

    def progress(self, epoch: int, answer_loss: float) -> Progress:
        return Progress(
            step=self.num_steps, max_steps=self.max_steps, epoch=epoch, answer_loss=answer_loss
        )

    def step(self, batch: Sequence[Example]) -> tuple[float, int]:
        """One update; returns the sum of -log p over the answer tokens, and their number."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        ids_BT, weight_BT = _tensors(batch, self.schedule.context_weight)
        is_counted_BT = weight_BT > 0
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() is torch.bfloat16):
            hidden_BTD = self.model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
            logits_NV = self.model.lm_head(hidden_BTD[:, :-1][is_counted_BT])
        targets_N, weight_N = ids_BT[:, 1:][is_counted_BT], weight_BT[is_counted_BT]
        nll_N = F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
        loss = (nll_N * weight_N).sum() / weight_N.sum()
        self._update(loss)
        answers_N = nll_N.detach()[weight_N == 1.0]
        return answers_N.sum().item(), answers_N.numel()

    def _update(self, loss: torch.Tensor) -> None:
        if not torch.isfinite(loss):
            raise TrainingError(
                f"Training broke down in step {self.num_steps + 1}",
                expected="a finite loss",
                got=str(loss.item()),
                fix="Lower the learning rate or change the seed.",
            )
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1

    def _learning_rate(self) -> float:
        warmup = min(1.0, (self.num_steps + 1) / self.schedule.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * self.num_steps / self.max_steps))
        return self.schedule.learning_rate * warmup * (0.05 + 0.95 * cosine)


def _tensors(batch: Sequence[Example], context_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T), padded on the right, and the weights (B, T - 1) of each next token; padding
    weighs 0, and under causal attention nothing before it reads it."""
    longest = max(len(example.ids) for example in batch)
    ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    weight_BT = torch.zeros(len(batch), longest)
    for index, example in enumerate(batch):
        length = len(example.ids)
        ids_BT[index, :length] = torch.tensor(example.ids)
        weight_BT[index, :length] = context_weight
        weight_BT[index, example.answer_start : length] = 1.0
    return ids_BT, weight_BT[:, 1:]
