"""Whether an expert is good enough to be activated without asking a person."""

from __future__ import annotations

import dataclasses
from typing import Any

from alter_core.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """Thresholds on what `alter_eval.request_evaluation` measures; each is on a mean."""

    max_forget_ratio: float = 0.3
    """Probability of forgotten answers with the expert, over that without."""
    min_utility_ratio: float = 0.97
    """The same of the retain sample."""
    max_paraphrase_leak: float = 0.05
    """Probability of forgotten answers to rephrased questions, less that to the questions themselves."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 1:
                raise ConfigError(
                    f"The threshold {name} of the quality gate is out of range",
                    expected="0 to 1",
                    got=str(value),
                    fix=f"Set --alter-gate-{name.replace('_', '-')}.",
                )

    def judge(self, figures: dict[str, Any]) -> dict[str, Any]:
        """`checks` by name, each with its value, threshold and whether it holds, and `is_passed`.

        What could not be measured, such as a leak without questions, is no check.
        """
        found = (
            ("forgetting", figures["forget_probability"]["ratio"], self.max_forget_ratio, True),
            ("utility", figures["utility"]["ratio"], self.min_utility_ratio, False),
            ("paraphrase_leak", figures["paraphrase_leak"], self.max_paraphrase_leak, True),
        )
        checks = {
            name: {
                "value": value["mean"],
                "threshold": threshold,
                "is_met": value["mean"] <= threshold if is_upper else value["mean"] >= threshold,
            }
            for name, value, threshold, is_upper in found
            if value is not None
        }
        return {"checks": checks, "is_passed": all(each["is_met"] for each in checks.values())}
