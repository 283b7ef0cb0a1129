"""A model that has unlearned: what making it took, and how to open it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from alter_eval.models import LanguageModel
from trainer.base_model import BaseModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """In memory, with whatever is attached."""

    base: BaseModel
    """The weights, which attacks may change in place."""
    model: LanguageModel
    """What answers, by those weights."""
    judge: LanguageModel
    """The base model, which rates how fluent answers are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unlearned:
    """On disk or in memory, closed."""

    train_s: float
    """Seconds, without any search for settings of the method."""
    num_parameters: int
    """How many were trained."""
    settings: dict[str, Any]
    """What was searched for."""
    open: Callable[[], contextlib.AbstractContextManager[Opened]]
    """A fresh copy each time."""
