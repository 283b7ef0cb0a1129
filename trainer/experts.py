"""Training of one forget expert, B_f^d, on a frozen substrate.

The model runs exactly as it will be served: the domain's own evidence head gates every token, so B learns on
the tokens that will reach it. The loss sees the low-entropy answer tokens; its gradient reaches B alone.

Legend: B batch, T tokens, R rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from alter_core.attach import AttachedModel
from alter_core.errors import TrainingError
from alter_core.evidence import EvidenceHead
from alter_core.substrate import ForgetExpert, Substrate

from .base_model import BaseModel
from .batches import IGNORED, Batch, at_step, make_batch
from .checkpoint import Checkpoints, optimizer_tensors, restore_optimizer
from .dataset import EncodedRow
from .evaluation import answer_probabilities, mean
from .losses import capped_loss, inverted_hinge
from .progress import Reporter
from .settings import ExpertSettings

_CHECKPOINT_EVERY = 10


class ExpertTraining:
    """One domain's B under training. `train()` it, then take `expert()`."""

    def __init__(
        self,
        base: BaseModel,
        substrate: Substrate,
        name: str,
        head: EvidenceHead,
        rows: Sequence[EncodedRow],
        entropies: Sequence[Tensor],
        settings: ExpertSettings,
        *,
        seed: int,
    ) -> None:
        """`entropies` are the base model's S_q of every token of every row.

        Raises: TrainingError if the entropy mask leaves no answer token to forget.
        """
        self.base, self.substrate, self.settings, self.seed = base, substrate, settings, seed
        self.rows = rows
        self.lora_b = {
            site: torch.zeros(
                info.out_features, substrate.config.rank, device=base.device
            ).requires_grad_()
            for site, info in substrate.sites.items()
        }
        self.name, self.head = name, head
        self.masks = self._masks(entropies)
        self.optimizer = torch.optim.Adam(self.lora_b.values(), lr=settings.learning_rate)
        self.next_step = 0

    def _masks(self, entropies: Sequence[Tensor]) -> list[Tensor]:
        """Which tokens of each row are to be forgotten. Shapes: per row (T,) bool."""
        answers = [torch.tensor(row.is_answer) for row in self.rows]
        settings = self.settings
        if settings.entropy_mask == "none":
            return answers
        threshold = self.substrate.config.entropy_threshold
        if settings.entropy_mask == "quantile":
            every = torch.cat([e[a] for e, a in zip(entropies, answers, strict=True)])
            threshold = float(every.quantile(settings.entropy_quantile))
        masks = [a & (e <= threshold) for e, a in zip(entropies, answers, strict=True)]
        if not any(mask.any() for mask in masks):
            raise TrainingError(
                f"No answer token of {self.name!r} is a low-entropy one, so there is nothing to forget",
                expected=f"tokens with S_q at most {threshold:.3f}",
                got="none",
                fix="Check that the base model knows these rows, or use --entropy-mask quantile.",
            )
        return masks

    def train(self, reporter: Reporter, checkpoints: Checkpoints | None = None) -> int:
        """Runs to the end, from a checkpoint if there is one; returns the number of steps taken.

        Raises: TrainingError if the loss is not finite; the last checkpoint stays.
        """
        checkpoint = f"expert-{self.name}"
        if checkpoints is not None and (saved := checkpoints.load(checkpoint)) is not None:
            self._restore(*saved)
        attached = AttachedModel(self.base.model, self.substrate, [self._under_training()])
        try:
            with reporter.bar(f"forget expert {self.name}", self.settings.max_steps) as bar:
                for _ in range(self.next_step):
                    bar.advance()
                while self.next_step < self.settings.max_steps:
                    loss = self.step(self.next_step)
                    self.next_step += 1
                    probability = self._probability_at_epoch_end()
                    bar.advance(loss=loss, forget_probability=probability)
                    if probability is not None and probability <= self.settings.target_probability:
                        break
                    if checkpoints is not None and self.next_step % _CHECKPOINT_EVERY == 0:
                        tensors = {k: v.detach() for k, v in self.lora_b.items()}
                        tensors |= optimizer_tensors(self.optimizer)
                        checkpoints.save(checkpoint, tensors, {"next_step": self.next_step})
        finally:
            attached.detach()
        return self.next_step

    def step(self, step: int) -> float:
        """One optimiser step; returns its loss. The model must be attached."""
        indices = at_step(len(self.rows), self.settings.batch_rows, step, self.seed)
        batch = make_batch(self.rows, indices, self.base.pad_id).to(self.base.device)
        loss = self.loss(batch)
        if loss is None:
            return 0.0
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"The loss of {self.name!r} is not finite",
                expected="a number",
                got=f"{loss.item()} at step {step}",
                fix="Lower --learning-rate and --resume from the last good checkpoint.",
            )
        parameters = [*self.lora_b.values()]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        return loss.item()

    def loss(self, batch: Batch) -> Tensor | None:
        """Mean forget loss over the batch's tokens to be forgotten; None if it has none."""
        is_chosen = (batch.labels != IGNORED) & batch.align(self.masks)
        if not is_chosen.any():
            return None
        with self.base.accelerator.autocast():
            output = self.base.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
        logits, targets = output.logits[is_chosen], batch.labels[is_chosen]
        if not logits.requires_grad:
            # No token of this batch reaches the expert: its evidence comes too late or never.
            return None
        if self.settings.forget_loss == "capped":
            return capped_loss(logits, targets, self.settings.loss_cap).mean()
        return inverted_hinge(logits, targets).mean()

    def _probability_at_epoch_end(self) -> float | None:
        steps_per_epoch = -(-len(self.rows) // min(self.settings.batch_rows, len(self.rows)))
        if self.next_step % steps_per_epoch:
            return None
        return mean(answer_probabilities(self.base, self.rows))

    def _under_training(self) -> ForgetExpert:
        return ForgetExpert(name=self.name, lora_b=dict(self.lora_b), evidence=self.head)

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, int]) -> None:
        with torch.no_grad():
            for site, parameter in self.lora_b.items():
                parameter.copy_(tensors[site])
        restore_optimizer(self.optimizer, tensors)
        self.next_step = state["next_step"]

    def expert(self) -> ForgetExpert:
        """The expert as it will be served: B in the base model's dtype."""
        rounded = {s: b.detach().to("cpu", self.base.dtype) for s, b in self.lora_b.items()}
        return dataclasses.replace(self._under_training(), lora_b=rounded)
