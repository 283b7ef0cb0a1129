"""Gradient difference."""

from __future__ import annotations

import dataclasses

from .base import RetainNll
from .grad_ascent import GradAscent


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradDiff(RetainNll, GradAscent):
    """Gradient ascent on forgotten answers, descent on retained ones: -L(forget) + retain_weight L(retain).

    L is the mean negative log-likelihood of answer tokens. Source: Liu et al. 2022 (arXiv 2203.12817), as
    TOFU has it (arXiv 2401.06121, section 4).
    """
