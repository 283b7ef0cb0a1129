"""Training one forget domain's B_f on a frozen substrate, under the gate that will be in force.

The substrate's A, B_r and estimator and the domain's evidence head are fixed before it begins; the forget
loss is the only term and B_f the only thing that learns, beside the scorer of tokens under `atwu`.

Legend: T tokens, R rank, O stacked output features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from alter_core.attach import AttachedModel
from alter_core.errors import TrainingError
from alter_core.evidence import EvidenceHead
from alter_core.substrate import ForgetExpert, Substrate

from .atwu import AtwuSettings, TokenScorer
from .base_model import BaseModel
from .batches import at_step
from .checkpoint import Checkpoint, adam_tensors, finite, restore, restore_adam
from .counterfactual import Counterfactuals
from .dataset import EncodedRow
from .losses import LossTerm, isolated_gradients, token_loss
from .objectives import CounterfactualDistillation, Objective, TokenPush
from .progress import Stage
from .settings import ExpertSettings
from .substrate import rounded

_WARMUP_STEPS = 10
_READINGS = (0.4, 0.6, 0.8)
"""When, as shares of all steps, the expert's own answers are looked through."""
_MAX_GRADIENT_NORM = 1.0
_TRIAL = 1.05
"""B_f is scaled by so much to see what that does, and by what follows within these bounds."""
_LEAST_SCALE, _MOST_SCALE = 0.9, 1.1


def select_answer_tokens(
    rows: Sequence[EncodedRow],
    entropy: Sequence[Tensor],
    threshold: float,
    settings: ExpertSettings,
) -> list[Tensor]:
    """Which tokens the forget loss reads. Shapes: per row (T,) bool.

    A token is selected by its own S_q, never by that of the token before it. `none` and `atwu` select all.
    Raises: TrainingError if no token of the domain is.
    """
    is_answer = [torch.tensor(row.is_answer) for row in rows]
    if settings.entropy_mask in ("none", "atwu"):
        return is_answer
    if settings.entropy_mask == "quantile":
        answers = torch.cat([values[mask] for values, mask in zip(entropy, is_answer, strict=True)])
        threshold = answers.quantile(settings.entropy_quantile).item()
    selected = [
        mask & (values <= threshold) for values, mask in zip(entropy, is_answer, strict=True)
    ]
    if not any(bool(mask.any()) for mask in selected):
        raise TrainingError(
            "No answer token of the domain has low entropy, so there is nothing to forget",
            expected=f"some token with S_q <= {threshold:.2f}",
            got="none",
            fix="The base model may not know these answers; else use --entropy-mask quantile, none or atwu.",
        )
    return selected


class ExpertTraining:
    """The state of one domain's training. Holds the base model's hooks until `close()`."""

    def __init__(
        self,
        base: BaseModel,
        substrate: Substrate,
        name: str,
        head: EvidenceHead,
        rows: Sequence[EncodedRow],
        selected: Sequence[Tensor],
        counterfactuals: Counterfactuals,
        settings: ExpertSettings,
        *,
        seed: int,
    ) -> None:
        self.base, self.rows, self.settings, self.seed = base, rows, settings, seed
        self.name = name
        self.lora_b = {
            site: torch.zeros(
                size.out_features, substrate.config.rank, device=base.device
            ).requires_grad_(True)
            for site, size in substrate.sites.items()
        }
        self.expert = ForgetExpert(name=name, lora_b=self.lora_b, evidence=head.to(base.device))
        self.num_steps = settings.num_steps(len(rows))
        self.readings = {round(share * self.num_steps) for share in _READINGS}
        self.optimizer = torch.optim.Adam(self.lora_b.values())
        self.row_probability = torch.ones(len(rows))
        self.attached = AttachedModel(base.model, substrate, [self.expert])
        self.objective = self._objective(selected, counterfactuals)

    def _objective(self, selected: Sequence[Tensor], counterfactuals: Counterfactuals) -> Objective:
        settings, base = self.settings, self.base
        scorer = None
        if settings.entropy_mask == "atwu":
            scorer = TokenScorer(AtwuSettings(), base.info.hidden_size, base.device)
        if settings.forget_loss != "counterfactual":
            loss = token_loss(settings.forget_loss, settings.forget_cap)
            return TokenPush(base, self.rows, selected, loss, scorer)
        return CounterfactualDistillation(
            base,
            self.attached,
            self.rows,
            selected,
            counterfactuals,
            temperature=settings.temperature,
            level_weight=settings.level_weight,
            answer_weight=settings.answer_weight,
            others_weight=settings.scaled_others_weight(len(self.rows)),
            seed=self.seed,
            scorer=scorer,
        )

    def close(self) -> None:
        """Removes the hooks; the base model is itself again."""
        self.attached.detach()

    def is_done(self, step: int) -> bool:
        """Whether `step` steps are enough."""
        if step >= self.num_steps:
            return True
        if self.settings.forget_loss == "counterfactual" or step < self._steps_per_epoch:
            return False
        return self.row_probability.mean().item() <= self.settings.target_probability

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self.rows) // min(self.settings.batch_rows, len(self.rows)))

    def checkpoint(self, step: int) -> Checkpoint:
        """The state after `step` steps."""
        tensors = {
            **self.lora_b,
            **self.objective.tensors(),
            "row_probability": self.row_probability,
        }
        return Checkpoint(step=step, tensors=tensors | adam_tensors(self.optimizer, self.lora_b))

    def restore(self, checkpoint: Checkpoint | None) -> int:
        """Goes back to a checkpoint; returns the step to go on with."""
        if checkpoint is None:
            return 0
        restore(self.lora_b, checkpoint.tensors)
        restore_adam(self.optimizer, self.lora_b, checkpoint.tensors)
        self.row_probability = checkpoint.tensors["row_probability"]
        self.objective.restore(checkpoint.tensors)
        return checkpoint.step

    def term(self, step: int) -> LossTerm:
        """The forget term at a step: selected answer tokens of a batch, learned by B_f alone."""
        if step in self.readings:
            self.objective.read_itself()
        indices = at_step(self.rows, self.settings.batch_rows, step, self.seed)
        outcome = self.objective(indices)
        self.row_probability[indices] = outcome.probability.cpu()
        return LossTerm(name="forget", value=outcome.loss, parameters=tuple(self.lora_b.values()))

    def step(self, step: int) -> float:
        """One optimiser step; returns the loss.

        Raises: TrainingError if the loss or a weight is not finite.
        """
        term = self.term(step)
        gradients = isolated_gradients([term])
        if not finite([term.value, *gradients.values()]):
            raise TrainingError(
                f"The forget loss of domain {self.name!r} is not finite at step {step}",
                expected="a number",
                got=f"{term.value.item()}",
                fix="Lower --learning-rate; the last good checkpoint is kept for --resume.",
            )
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(self.lora_b.values(), _MAX_GRADIENT_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * _schedule(step, self.num_steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return term.value.item()

    @torch.no_grad()
    def settle(self) -> None:
        """Scales B_f so that tokens are as likely on average as they were to be.

        Steps end a few per cent short of that, always on the base model's side, and loss is all but linear
        in the scale there.
        """
        before = self.objective.excess()
        if before == 0:
            return
        self._scale(_TRIAL)
        slope = (before - self.objective.excess()) / (_TRIAL - 1)
        scale = 1 + before / slope if slope > 0 else 1.0
        self._scale(min(max(scale, _LEAST_SCALE), _MOST_SCALE) / _TRIAL)

    def _scale(self, factor: float) -> None:
        for lora_b in self.lora_b.values():
            lora_b.mul_(factor)


def _schedule(step: int, num_steps: int) -> float:
    """Share of the peak learning rate: a short rise, then a straight line down to a tenth."""
    return min(1.0, (step + 1) / _WARMUP_STEPS) * (1 - 0.9 * step / num_steps)


def train_expert(
    base: BaseModel,
    substrate: Substrate,
    name: str,
    head: EvidenceHead,
    rows: Sequence[EncodedRow],
    entropy: Sequence[Tensor],
    counterfactuals: Counterfactuals,
    settings: ExpertSettings,
    *,
    seed: int,
    checkpoint: Path,
    run: str,
    stage: Stage,
) -> tuple[ForgetExpert, int]:
    """Trains B_f; returns the expert in the dtype it is served in, and the number of steps taken.

    Raises: TrainingError if the gate never lets the expert act, or on values that are not finite.
    """
    selected = select_answer_tokens(rows, entropy, substrate.config.entropy_threshold, settings)
    training = ExpertTraining(
        base, substrate, name, head, rows, selected, counterfactuals, settings, seed=seed
    )
    try:
        step = training.restore(Checkpoint.read(checkpoint, run))
        while not training.is_done(step):
            loss = training.step(step)
            step += 1
            probability = training.row_probability.mean().item()
            stage.step(step, loss=loss, probability=probability)
            if step % settings.checkpoint_every == 0:
                training.checkpoint(step).write(checkpoint, run)
        training.settle()
    finally:
        training.close()
    if not any(bool(tensor.any()) for tensor in training.lora_b.values()):
        raise TrainingError(
            f"The expert of domain {name!r} was never routed to, so it learned nothing",
            expected="a router that fires on the domain's rows",
            got="no routed answer token",
            fix="Check the evidence figures; the domain may not differ from the retained text.",
        )
    lora_b = rounded(training.lora_b, base.dtype)
    return dataclasses.replace(training.expert, lora_b=lora_b, evidence=head.cpu()), step
