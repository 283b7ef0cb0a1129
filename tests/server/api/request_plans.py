"""What the jobs of unlearning requests measure in tests: see `tests.support.scripted_job`."""

from __future__ import annotations

from typing import Any


def figures(*, forget: float = 0.1, utility: float = 1.0, leak: float = 0.0) -> dict[str, Any]:
    """As a job measures them."""
    return {
        "forget_probability": {"ratio": {"mean": forget, "low": forget, "high": forget}},
        "utility": {"ratio": {"mean": utility, "low": utility, "high": utility}},
        "paraphrase_leak": {"mean": leak, "low": leak, "high": leak},
    }
