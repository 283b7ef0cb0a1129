"""What the gate does on a few rows: entropy and expert of every token, as numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from alter_core.attach import AttachedModel
from alter_core.entropy import tsallis_entropy
from trainer.dataset import EncodedRow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Per row, an array over its tokens (T,)."""

    threshold: float
    entropy: list[NDArray[np.float64]]
    """S_q of the base model at each token."""
    expert: list[NDArray[np.int64]]
    """0 where retain wins, else the number of the domain."""
    is_answer: list[NDArray[np.bool_]]


@torch.inference_mode()
def trace(attached: AttachedModel, rows: Sequence[EncodedRow]) -> Trace:
    """Runs rows through the gate, and through the base model for its exact entropy."""
    config = attached.substrate.config
    entropy, expert = [], []
    for row in rows:
        ids = torch.tensor([row.ids], device=attached.model.device)
        attached.model(input_ids=ids)
        assert attached.routing is not None
        expert.append(attached.routing.weights[0, :, 1:].max(dim=-1))
        with attached.disabled():
            logits = attached.model(input_ids=ids).logits[0]
        entropy.append(tsallis_entropy(logits, config.tsallis_q).cpu().numpy())
    return Trace(
        threshold=config.entropy_threshold,
        entropy=entropy,
        expert=[((best.indices + 1) * (best.values > 0)).cpu().numpy() for best in expert],
        is_answer=[np.array(row.is_answer) for row in rows],
    )
