"""What others publish of the same methods on TOFU forget10 with Llama-3.2-1B, to stand beside ours.

`untuned`: open-unlearning at d3d7cf9, `docs/repro.md`. `tuned`: gnueaj/unlearning-depth-score at fc31639.
Absolute figures do not compare across models; orders do.
"""

from __future__ import annotations

MODEL = "Llama-3.2-1B, TOFU forget10"
UNTUNED = {
    "base": (1.66e-21, 0.60),
    "retrained": (1.0, 0.59),
    "grad_ascent": (1.06e-239, 0.0),
    "grad_diff": (1.06e-239, 0.49),
    "idk_dpo": (4.64e-12, 0.23),
    "npo": (0.02, 0.46),
    "simnpo": (2.47e-203, 0.54),
    "rmu": (3.15e-15, 0.59),
}
"""(forget_quality, model_utility)."""
TUNED = {
    "base": (0.601, 0.679),
    "retrained": (0.591, 0.059),
    "npo": (0.572, 0.062),
    "simnpo": (0.576, 0.072),
    "idk_dpo": (0.559, 0.074),
    "grad_diff": (0.594, 0.124),
    "rmu": (0.282, 0.040),
}
"""(model_utility, extraction_strength)."""


def table() -> str:
    """Markdown, a line a method."""
    lines = [
        f"| {MODEL} | forget_quality | utility ratio | tuned: utility ratio | extraction_strength |",
        "|---|---|---|---|---|",
    ]
    for name in UNTUNED:
        quality, utility = UNTUNED[name]
        cells = [f"{quality:.3g}", f"{utility / UNTUNED['base'][1]:.2f}"]
        if name in TUNED:
            kept, strength = TUNED[name]
            cells += [f"{kept / TUNED['base'][0]:.2f}", f"{strength:.3f}"]
        else:
            cells += ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
