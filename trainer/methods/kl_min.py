"""KL minimisation."""

from __future__ import annotations

import dataclasses

from .base import RetainKl
from .grad_ascent import GradAscent


@dataclasses.dataclass(frozen=True, kw_only=True)
class KlMin(RetainKl, GradAscent):
    """Gradient ascent on forgotten answers, while retained rows keep the base model's distribution.

    -L(forget) + retain_weight mean_t KL(p_base(. | s_<t) || p(. | s_<t)), over every token of retained
    rows. Source: TOFU (arXiv 2401.06121, section 4), after Nguyen et al. 2020 (arXiv 2010.12883).
    """
