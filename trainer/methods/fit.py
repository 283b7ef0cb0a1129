"""The optimisation loop that all methods share: AdamW, linear rise and fall, clipped gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alter_core.errors import TrainingError
from trainer.progress import Stage

_MAX_GRADIENT_NORM = 1.0


def fit(
    groups: Sequence[dict[str, Any]],
    losses: Callable[[int], Mapping[str, Tensor]],
    *,
    num_steps: int,
    warmup_steps: int,
    weight_decay: float,
    stage: Stage | None = None,
) -> dict[str, float]:
    """Minimises the sum of a step's losses; returns those of the last step.

    `groups` are AdamW's, each with its peak `lr`. Raises: TrainingError where a loss or its gradient is not
    finite, before the step is taken.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup_steps) * (1 - step / num_steps)
    )
    parameters = [parameter for group in groups for parameter in group["params"]]
    figures: dict[str, float] = {}
    for step in range(num_steps):
        terms = losses(step)
        torch.stack(list(terms.values())).sum().backward()
        norm = nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
        figures = {name: value.item() for name, value in terms.items()}
        _check_finite(step, torch.stack([*(v.detach() for v in terms.values()), norm]), figures)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if stage is not None:
            stage.step(step + 1, **figures)
    return figures


def _check_finite(step: int, values: Tensor, figures: Mapping[str, float]) -> None:
    if not torch.isfinite(values).all():
        raise TrainingError(
            f"Unlearning broke down in step {step + 1}",
            expected="finite losses and gradients",
            got=", ".join(f"{name} {value}" for name, value in figures.items()),
            fix="Lower the learning rate. Nothing was written.",
        )
