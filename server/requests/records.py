"""What an unlearning request is, and how far it may have come.

    queued -> preparing -> training -> evaluating -> activating -> active
                 |            |            |
                 +------------+------------+--> awaiting-approval -> activating, or training once more
    all but activating and the ends --> cancelled, failed

Digests, counts and figures only: the text lies in the workspace, until the request has ended.
"""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import Any, Literal, get_args

State = Literal[
    "queued",
    "preparing",
    "training",
    "evaluating",
    "awaiting-approval",
    "activating",
    "active",
    "failed",
    "cancelled",
]
STATES: tuple[State, ...] = get_args(State)
ENDED: frozenset[State] = frozenset(("active", "failed", "cancelled"))
WITH_JOB: frozenset[State] = frozenset(("training", "evaluating"))

Approval = Literal["automatic", "manual"]
"""`automatic`: what passes the gate is activated; `manual`: a person is asked in any case."""

Question = Literal["nothing-to-forget", "gate-failed", "approval", "activation-refused"]
"""What a person is asked. `nothing-to-forget`: the model does not seem to know it; train all the same?
`gate-failed`: the expert misses a threshold; activate it all the same? `approval`: it passed; activate it?
`activation-refused`: it cannot be activated as things are, for instance since no slot is free; try again?"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Of the stage that a job is at."""

    stage: str
    done: int
    total: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskedFor:
    """What somebody asks for; it never changes."""

    id: str
    workspace: str
    """Whose folder holds its text: servers of other workspaces show it, and cannot work on it."""
    domain: str
    approval: Approval
    actor: str
    request_id: str | None
    reason: str | None
    """Case number."""
    deadline: datetime | None
    forget_digest: str
    """Over the digests of the rows and documents that are to be forgotten."""
    num_rows: int
    num_documents: int
    retain_digest: str
    num_retain_rows: int
    row_digests: tuple[str, ...]
    """The first digits of each row's and document's digest: what two requests have in common."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlearningRequest(AskedFor):
    """One request, as the registry's database holds it."""

    state: State
    question: Question | None
    """While it awaits approval."""
    approved_by: str | None
    cancelled_by: str | None
    """Who asked for its end; it has ended once `state` says so."""
    allow_unknown: bool
    """Train although the model does not seem to know it: somebody has said so."""
    created_at: datetime
    updated_at: datetime
    num_attempts: int
    """Jobs that were started for it."""
    progress: Progress | None
    figures: dict[str, Any]
    """What the job has measured, and what the gate says of it."""
    bundle_digest: str | None
    operation_id: str | None
    """Of the change that activates the expert."""
    error: str | None
    """Kind of the problem that ended it, or that keeps it from going on."""
    text_deleted_at: datetime | None

    @property
    def has_ended(self) -> bool:
        """True if nothing more becomes of it."""
        return self.state in ENDED

    def is_overdue(self, now: datetime) -> bool:
        """True once its deadline has passed without the domain being active."""
        if self.deadline is None or self.state in ("active", "cancelled"):
            return False
        return now > self.deadline
