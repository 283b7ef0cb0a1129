"""Every method by name. ALTER is not among them: `trainer.train` makes its experts."""

from __future__ import annotations

import dataclasses
from typing import Any

from alter_core.errors import ConfigError

from .base import Method
from .elm import Elm
from .grad_ascent import GradAscent
from .grad_diff import GradDiff
from .idk_dpo import IdkDpo
from .ihl import InvertedHinge
from .kl_min import KlMin
from .npo import Npo, NpoGd, NpoKl
from .random_label import RandomLabel
from .rmu import Rmu
from .simnpo import SimNpo
from .whp import Whp

METHODS: dict[str, type[Method]] = {
    "grad_ascent": GradAscent,
    "grad_diff": GradDiff,
    "kl_min": KlMin,
    "random_label": RandomLabel,
    "ihl": InvertedHinge,
    "npo": Npo,
    "npo_gd": NpoGd,
    "npo_kl": NpoKl,
    "simnpo": SimNpo,
    "idk_dpo": IdkDpo,
    "rmu": Rmu,
    "elm": Elm,
    "whp": Whp,
}


def make_method(name: str, **settings: Any) -> Method:
    """The method of that name with these hyper-parameters, all others at their defaults.

    Raises: ConfigError for a name or a hyper-parameter that does not exist, or a value out of range.
    """
    kind = METHODS.get(name)
    if kind is None:
        raise ConfigError(
            "The unlearning method is unknown", expected=" or ".join(sorted(METHODS)), got=name
        )
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(settings) - known):
        raise ConfigError(
            f"{name} has no such setting",
            expected=", ".join(sorted(known)),
            got=", ".join(unknown),
        )
    return kind(**settings)


def name_of(method: Method) -> str:
    """The name that a method is registered under, or that of its class."""
    names = {kind: name for name, kind in METHODS.items()}
    return names.get(type(method), type(method).__name__)
