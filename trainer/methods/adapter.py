"""LoRA adapters that any loss may train in place of the weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from .fields import check_positive, check_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraAdapter:
    """W + (lora_alpha / rank) B A in every linear of the decoder layers: A random at first, B zero.

    B learns at the method's `learning_rate`, A at `a_rate_ratio` times it. 1 is LoRA, Hu et al. 2022 (arXiv
    2106.09685). Below 1 it is AsymLoRA: 0 freezes A as it was drawn, Zhu et al. 2024 (arXiv 2402.16842);
    0.01 gives 1e-5 for A where B has 1e-3, ALTER's setting (arXiv 2603.01792).

    Raises: ConfigError where a field is out of range.
    """

    rank: int = 8
    """r, > 0."""
    lora_alpha: float = 16.0
    """> 0."""
    a_rate_ratio: float = 1.0
    """>= 0."""

    def __post_init__(self) -> None:
        check_positive(self, "rank", "lora_alpha")
        check_range(self, "a_rate_ratio", self.a_rate_ratio >= 0, ">= 0")

    def attach(self, model: PreTrainedModel) -> PeftModel:
        """Puts adapters into the model's linears; they alone take gradients. `merge_and_unload` ends it."""
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, config)
        if self.a_rate_ratio == 0:
            for parameter in _matrices(model, "lora_A"):
                parameter.requires_grad_(False)
        return adapted

    def groups(self, model: PreTrainedModel, rate: float) -> list[dict[str, Any]]:
        """AdamW's groups of an adapted model: B at `rate`, and A at its own if it learns."""
        groups = [{"params": _matrices(model, "lora_B"), "lr": rate}]
        if self.a_rate_ratio > 0:
            groups.append({"params": _matrices(model, "lora_A"), "lr": self.a_rate_ratio * rate})
        return groups


def _matrices(model: PreTrainedModel, kind: str) -> list[nn.Parameter]:
    return [value for name, value in model.named_parameters() if f".{kind}." in name]


ADAPTERS = {"lora": LoraAdapter(), "asymlora": LoraAdapter(a_rate_ratio=0.01)}
"""The two that tables compare: ALTER's rates for AsymLoRA, at `learning_rate` 1e-3."""
