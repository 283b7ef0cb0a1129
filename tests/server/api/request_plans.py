"""What the jobs of unlearning requests measure in tests: see `tests.support.scripted_job`."""

from __future__ import annotations

from typing import Any


def figures(*, forget: float = 0.1, utility: float = 1.0, leak: float = 0.0) -> dict[str, Any]:
    """As a job measures them: `forget` and `utility` are what is left, `leak` what rephrasing brings back."""

    def about(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}

    def change(before: float, after: float) -> dict[str, Any]:
        return {"before": about(before), "after": about(after), "num_rows": 40}

    return {
        "forget_probability": change(0.9, 0.9 * forget) | {"ratio": about(forget)},
        "utility": change(0.8, 0.8 * utility) | {"ratio": about(utility)},
        "retained_answers_unchanged": {"share": 1.0, "num_rows": 32},
        "attacks": {"rephrased": change(0.8, 0.8 * forget + leak)},
        "paraphrase_leak": about(leak),
        "confidence": 0.95,
        "router": None,
    }
