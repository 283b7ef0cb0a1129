"""What a change of forget domains must keep to, in memory and in the registry: names, slots, bundles."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

from alter_core.bundle import DOMAIN_NAME_PATTERN
from alter_core.errors import DomainConflictError, DomainNameError, NoFreeSlotError
from server.metrics import RETAIN

Precondition = Callable[[int, bool], None]
"""Called with the epoch of the log and whether the name is active, right before a change is recorded.
Raises to refuse; the error's `kind`, if it has one, goes into the audit log."""


def is_domain_name(name: str) -> bool:
    """True for what can name a forget domain."""
    return re.fullmatch(DOMAIN_NAME_PATTERN, name) is not None and name != RETAIN


def check_other_names(digest: str, names: Mapping[str, str]) -> None:
    """Raises: DomainConflictError if `names`, the active domains' by bundle digest, hold this bundle."""
    if (holder := names.get(digest)) is not None:
        raise DomainConflictError(
            f"This bundle is already active under the name {holder!r}",
            expected="a bundle that is not active under another name",
            got=digest,
            fix=f"Revoke {holder!r} first, or keep using that name.",
        )


def free_slot(taken: Collection[int], max_domains: int) -> int:
    """The first slot that is not taken. Raises: NoFreeSlotError."""
    for slot in range(max_domains):
        if slot not in taken:
            return slot
    raise NoFreeSlotError(
        "Every slot holds an expert",
        expected=f"fewer than {max_domains} active domains",
        got=str(len(taken)),
        fix="Revoke a domain, or restart with a larger --alter-max-domains.",
    )


def check_domain_name(name: str) -> None:
    """Raises: DomainNameError."""
    if not is_domain_name(name):
        raise DomainNameError(
            f"{name!r} cannot name a forget domain",
            expected=f"1 to 63 of a-z, 0-9 and '-', other than {RETAIN!r}",
            got=repr(name),
            fix="Choose another name, e.g. 'authors-2'.",
        )
