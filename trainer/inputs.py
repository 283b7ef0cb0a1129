"""What a run is asked to make, and from which rows."""

from __future__ import annotations

import re

from alter_core.bundle import DOMAIN_NAME_PATTERN
from alter_core.errors import ConfigError, DomainNameError
from alter_core.rows import Row, check_disjoint, read_rows

from .settings import RefreshSettings, TrainSettings

SUBSTRATE_NAME = "substrate"
"""Folder of the substrate, and so no name for a domain."""


def part_of(name: str) -> str:
    """The data part that holds a named domain's rows."""
    return f"forget/{name}"


def read_parts(settings: TrainSettings | RefreshSettings) -> dict[str, list[Row]]:
    """Rows of every part: `forget/NAME`, `retain`, and `general` if there is any.

    Raises: TrainingDataError.
    """
    rows: dict[str, list[Row]] = {
        part_of(name): read_rows([path]) for name, path in settings.forget.items()
    }
    rows["retain"] = read_rows(settings.retain)
    if settings.general:
        rows["general"] = read_rows(settings.general)
    check_disjoint(rows)
    return rows


def domain_names(settings: TrainSettings) -> list[str]:
    """Names of the domains that a run makes.

    Raises: ConfigError, DomainNameError.
    """
    names = list(settings.forget)
    if settings.auto_domains:
        if len(names) != 1:
            raise ConfigError(
                "Clustering cuts one set of rows into domains",
                expected="one --forget NAME=FILE with --auto-domains",
                got=f"{len(names)}",
            )
        names = [f"{names[0]}-{number + 1}" for number in range(settings.auto_domains)]
    if not names:
        raise ConfigError(
            "There is nothing to forget", expected="at least one --forget NAME=FILE", got="none"
        )
    for name in names:
        if not re.fullmatch(DOMAIN_NAME_PATTERN, name) or name == SUBSTRATE_NAME:
            raise DomainNameError(
                "A domain cannot have that name",
                expected=f"{DOMAIN_NAME_PATTERN}, and not {SUBSTRATE_NAME!r}",
                got=repr(name),
            )
    return names
