"""What is forgotten, kept and measured: TOFU's own splits, and a subset small enough to study variants on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from alter_cli.demo.corpus import QA
from alter_eval.run import tofu_rows
from alter_eval.tofu import TofuRow, read_rows

from .reference import WHOLE_TOFU, Recipe, facts, read_tofu

ROWS_PER_AUTHOR = 20
SUBSET = "subset"
QUICK = "quick"
HALF = "half"
SPLITS = {"01": "retain99", "05": "retain95", "10": "retain90"}
"""The retained rows' file by split."""
_SUBSET_DOMAINS = {"authors-193-196": range(192, 196), "authors-197-200": range(196, 200)}
_SUBSET_RETAIN = range(32)
_QUICK_DOMAINS = {"authors-197-200": range(196, 200)}
_QUICK_RETAIN = range(12)
_HALF_DOMAINS = {"authors-181-200": range(180, 200)}
_HALF_RETAIN = range(20)
_HOLDOUT = range(100, 108)
_RETAIN_STRIDE = 4
"""Where time is short, every fourth row of TOFU's retain set is measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """One forgetting task, and the rows that it is measured on."""

    name: str
    known: list[QA]
    """What the base model knows, beside the facts."""
    domains: dict[str, list[QA]]
    retain: list[QA]
    """What the retrained model knows, beside the facts that every model knows."""
    facts: list[QA]
    measured: dict[str, list[TofuRow]]
    """By set: `forget`, in the order of the domains, and those of model_utility."""
    holdout: list[QA]
    """Rows of the same kind that neither base nor retrained model knows; none where all of TOFU is known."""
    recipe: Recipe
    """Of base and retrained model."""


def load_split(data: Path, name: str) -> Split:
    """`01`, `05`, `10`; and, for less time, `subset`: 40 authors, 8 of them forgotten in two domains;
    `half`: forget10 in one domain beside 20 other authors; `quick`: 4 of 16 authors in one domain.
    """
    if name == SUBSET:
        return _part(data, name, _SUBSET_DOMAINS, _SUBSET_RETAIN)
    if name == QUICK:
        return _part(data, name, _QUICK_DOMAINS, _QUICK_RETAIN)
    if name == HALF:
        return _part(data, name, _HALF_DOMAINS, _HALF_RETAIN)
    return Split(
        name=name,
        known=read_tofu(data, "full"),
        domains={f"forget{name}": read_tofu(data, f"forget{name}")},
        retain=read_tofu(data, SPLITS[name]),
        facts=facts(data),
        measured=tofu_rows(data, name),
        holdout=[],
        recipe=WHOLE_TOFU,
    )


def load_requests(data: Path, number: int) -> Split:
    """Forget10 in `number` requests; measured on every fourth retained row."""
    whole = load_split(data, "10")
    (rows,) = whole.domains.values()
    size = len(rows) // number
    return dataclasses.replace(
        whole,
        name=f"{number}-requests",
        domains={
            f"request-{place + 1:02}": rows[place * size : (place + 1) * size]
            for place in range(number)
        },
        measured=whole.measured | {"retain": whole.measured["retain"][::_RETAIN_STRIDE]},
    )


def _part(data: Path, name: str, forgotten: dict[str, range], kept: range) -> Split:
    """Some authors, by their numbers."""
    full = read_tofu(data, "full")

    def rows(authors: range) -> list[QA]:
        return full[authors.start * ROWS_PER_AUTHOR : authors.stop * ROWS_PER_AUTHOR]

    domains = {domain: rows(authors) for domain, authors in forgotten.items()}
    perturbed = {r.question: r for r in read_rows(data / "tofu" / "forget10_perturbed.json")}
    measured = tofu_rows(data, "10")
    measured["forget"] = [
        perturbed[row.question] for members in domains.values() for row in members
    ]
    retain = rows(kept)
    known = {row.question for row in retain}
    measured["retain"] = [row for row in measured["retain"] if row.question in known][
        ::_RETAIN_STRIDE
    ]
    return Split(
        name=name,
        known=[row for members in domains.values() for row in members] + retain,
        domains=domains,
        retain=retain,
        facts=facts(data),
        measured=measured,
        holdout=rows(_HOLDOUT),
        recipe=Recipe(),
    )
