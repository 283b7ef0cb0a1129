"""What one run of a method is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from alter_core.errors import ConfigError

from .adapter import LoraAdapter
from .base import Method, Retaining, TokenMethod
from .fields import check_range
from .registry import name_of
from .weighting import UniformWeighting, Weighting


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlearnSettings:
    """One run of a method.

    Raises: ConfigError where its parts do not fit together.
    """

    model: Path
    """Base model folder."""
    out: Path
    """Folder to make."""
    method: Method
    """See `make_method`."""
    forget: tuple[Path, ...]
    """Training files of what is to be forgotten."""
    retain: tuple[Path, ...] = ()
    """Files of what is to be kept; only for methods that read it."""
    adapter: LoraAdapter | None = None
    """Trains an adapter, merged in the end; None trains the weights."""
    weighting: Weighting = dataclasses.field(default_factory=UniformWeighting)
    """Which tokens count; only for methods with a loss of single tokens."""
    max_tokens: int = 2048
    """Longest row; the model's context length if that is shorter."""
    seed: int = 0
    """Of everything random."""
    device: str = "auto"
    """auto, cpu or cuda."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Weights are float32; `bf16` runs forward passes under autocast."""

    def __post_init__(self) -> None:
        check_range(self, "max_tokens", self.max_tokens > 1, "> 1")
        self._check_rows()
        self._check_adapter()
        self._check_weighting()

    def _check_rows(self) -> None:
        name, reads_retain = name_of(self.method), isinstance(self.method, Retaining)
        if not self.forget:
            raise ConfigError(
                "There is nothing to forget", expected="at least one training file", got="none"
            )
        if reads_retain != bool(self.retain):
            raise ConfigError(
                f"{name} {'has a' if reads_retain else 'has no'} loss on retained rows",
                expected="at least one file of them" if reads_retain else "no file of them",
                got=f"{len(self.retain)}",
            )

    def _check_adapter(self) -> None:
        use, name = self.method.adapter_use, name_of(self.method)
        if use == "required" and self.adapter is None:
            raise ConfigError(
                f"{name} is defined on a low-rank adapter", expected="an adapter", got="none"
            )
        if use == "refused" and self.adapter is not None:
            raise ConfigError(
                f"{name} says itself which weights it trains", expected="no adapter", got="one"
            )

    def _check_weighting(self) -> None:
        name = name_of(self.method)
        is_weighted = not isinstance(self.weighting, UniformWeighting)
        if is_weighted and not isinstance(self.method, TokenMethod):
            raise ConfigError(
                f"{name} has no loss of single tokens to weight",
                expected="uniform weighting",
                got=type(self.weighting).__name__,
                fix="Choose a method with one, such as grad_diff, or leave the weighting out.",
            )
        if self.weighting.needs_retain and not isinstance(self.method, Retaining):
            raise ConfigError(
                f"{type(self.weighting).__name__} learns from the conflict with retained rows",
                expected="a method with a loss on them, such as grad_diff",
                got=name,
            )
