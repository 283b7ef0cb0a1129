"""The ALTER configuration: everything that a substrate fixes for the experts trained on it."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args, get_type_hints

from .entropy import max_tsallis_entropy
from .errors import ConfigError

SITE_KINDS = ("qkv", "o", "gate_up", "down")
"""The four adapted inputs of a decoder layer; projections that read one input share one A."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlterConfig:
    """Method settings, fixed by the substrate. Symbols are those of arXiv 2603.01792."""

    rank: int = 32
    """r, the inner dimension of every A and B. The paper's 8 is too little to say what to answer instead."""
    lora_alpha: float = 64.0
    """The delta is scaled by lora_alpha / rank."""
    tap_layer: int
    """First adapted decoder layer; the entropy estimator reads the residual stream at its input."""
    target_modules: tuple[str, ...] = SITE_KINDS
    """Which inputs of a layer carry experts, out of `SITE_KINDS`."""
    retain_expert: Literal["identity", "trained"] = "identity"
    """`identity`: B_r = 0, a retained token is computed by the base weights exactly."""

    tsallis_q: float = 1.5
    """q of Eq. 5, > 0."""
    entropy_threshold: float = 1.2
    """A token with S_q above it takes the high-entropy path of Eq. 9."""
    entropy_source: Literal["estimator", "two_pass"] = "estimator"
    """`two_pass` computes the base model's exact S_q first; reference path only."""

    router: Literal["evidence", "scalar"] = "evidence"
    """`evidence`: the latch over token features. `scalar`: Eq. 7 taken literally, for ablation."""
    temperature_high: float = 0.8
    """tau of Eq. 7 for high-entropy tokens. The paper's 0.01 for low-entropy ones has nothing to act on:
    Eq. 9 takes their best expert at weight 1, whatever tau is."""
    top_k: int = 3
    """Forget experts that a high-entropy token may combine."""
    evidence_window: int = 64
    """Tokens for which a piece of evidence keeps its domain routed."""
    evidence_ngram: int = 5
    """Consecutive token embeddings that one evidence score reads."""
    evidence_units: int = 64
    """Hidden units of an evidence head."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for field in (
            "rank",
            "lora_alpha",
            "tsallis_q",
            "temperature_high",
            "top_k",
            "evidence_window",
            "evidence_ngram",
            "evidence_units",
        ):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(
                    f"{field} is out of range", expected="> 0", got=f"{getattr(self, field)}"
                )
        for field in ("retain_expert", "entropy_source", "router"):
            if getattr(self, field) not in (choices := get_args(get_type_hints(type(self))[field])):
                raise ConfigError(
                    f"{field} is unknown",
                    expected=" or ".join(choices),
                    got=str(getattr(self, field)),
                )
        if self.tap_layer < 0:
            raise ConfigError("tap_layer is out of range", expected=">= 0", got=str(self.tap_layer))
        unknown = [m for m in self.target_modules if m not in SITE_KINDS]
        if unknown or not self.target_modules:
            raise ConfigError(
                "target_modules match nothing",
                expected=f"one or more of {', '.join(SITE_KINDS)}",
                got=", ".join(unknown) or "an empty list",
                fix="Name the inputs to adapt, e.g. --target-modules qkv,o.",
            )
        if len(set(self.target_modules)) < len(self.target_modules):
            raise ConfigError(
                "target_modules names an input twice",
                expected=f"each of {', '.join(SITE_KINDS)} at most once",
                got=", ".join(self.target_modules),
            )
        if not math.isfinite(self.entropy_threshold):
            raise ConfigError(
                "entropy_threshold is out of range",
                expected="a finite number",
                got=str(self.entropy_threshold),
            )
        if self.entropy_threshold >= (bound := max_tsallis_entropy(self.tsallis_q)):
            raise ConfigError(
                f"entropy_threshold {self.entropy_threshold} can never be exceeded "
                f"with tsallis_q {self.tsallis_q}",
                expected=f"a threshold below 1 / (q - 1) = {bound:.3f}",
                got=str(self.entropy_threshold),
                fix="Lower the threshold or q; with the paper's 1.2, q must stay below 1.833.",
            )

    @property
    def scaling(self) -> float:
        """lora_alpha / rank."""
        return self.lora_alpha / self.rank
