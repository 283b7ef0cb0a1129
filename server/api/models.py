"""Bodies of `/admin`. What comes in is checked strictly; nothing that goes out is training text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from alter_core.errors import ConfigError
from server.audit import MAX_REASON_LENGTH, check_reason
from server.domains import ActiveDomain, DomainService, RoutedText
from server.engine.base import InFlight, Message, PromptToken, SwitchReport
from server.metrics import TokenCount
from server.operations import Operation as OperationRecord
from server.operations import OperationState, Outcome
from server.reconciler import Reconciler
from server.registry import Replica
from server.registry.records import Action, ReplicaState
from server.tokens import Role

REASON = "x-alter-reason"
"""Header with the reason of a DELETE: percent-encoded UTF-8."""

MAX_LOCATION_LENGTH = 4096

_DIGEST = "sha256:9f2b4c1d7e8a3056b1c2d3e4f5061728394a5b6c7d8e9f00112233445566778a"
_DOMAIN_EXAMPLE: dict[str, Any] = {
    "name": "authors",
    "digest": _DIGEST,
    "slot": 0,
    "epoch": 4,
    "since": "2026-03-01T12:00:00Z",
    "routed_tokens": {"high": 120, "low": 3310},
    "evaluation": {"forget_probability": 0.01},
}
_SWITCH_EXAMPLE: dict[str, Any] = {
    "epoch": 4,
    "stage_s": 0.21,
    "pause_s": 0.012,
    "kept_requests": 14,
    "recomputed_requests": 2,
    "recomputed_tokens": 310,
}
_OPERATION_EXAMPLE: dict[str, Any] = {
    "id": "0d6f3e0e-7a2c-4b61-9d0f-6a1b8f5c2e11",
    "action": "activate",
    "name": "authors",
    "digest": _DIGEST,
    "outcome": "created",
    "state": "active",
    "epoch": 4,
    "requested_at": "2026-03-01T12:00:00Z",
    "lagging": [],
    "error": None,
    "domain": _DOMAIN_EXAMPLE,
    "switch": _SWITCH_EXAMPLE,
}
_REPLICA_EXAMPLE: dict[str, Any] = {
    "replica_id": "node-3-5e0c2a34-9d5f-4c43-a5f6-0b7d6f1f2a90",
    "is_self": True,
    "state": "serving",
    "applied_epoch": 4,
    "lag": 0,
    "lease_left_s": 9.1,
    "silence_s": 2.9,
    "reason": None,
}


def _printable(text: str) -> str:
    try:
        return check_reason(text)
    except ConfigError as error:
        raise ValueError("must be printable characters") from error


class _Response(BaseModel):
    model_config = ConfigDict(frozen=True)


class ActivateRequest(BaseModel):
    """Body of `POST /admin/forget-domains`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "name": "authors",
                    "bundle": "/bundles/authors",
                    "in_flight": "recompute",
                    "reason": "case 12/26",
                }
            ]
        },
    )

    name: str = Field(max_length=MAX_LOCATION_LENGTH, description="1 to 63 of a-z, 0-9 and '-'.")
    bundle: str = Field(
        max_length=MAX_LOCATION_LENGTH,
        description="Absolute path on the server's machine, or a URL, below one of the sources that the "
        "server was started with.",
    )
    in_flight: InFlight = Field(
        default="recompute",
        description="Running requests are recomputed under the new experts, or aborted.",
    )
    reason: (
        Annotated[
            str, Field(min_length=1, max_length=MAX_REASON_LENGTH), AfterValidator(_printable)
        ]
        | None
    ) = Field(
        default=None,
        description="A case number for the audit log. Never text that is to be forgotten.",
    )


class RoutedTokenCount(_Response):
    """Tokens that the expert computed since the server started, by path of Eq. 9."""

    high: int
    low: int


class Switch(_Response):
    """One finished switch."""

    model_config = ConfigDict(json_schema_extra={"examples": [_SWITCH_EXAMPLE]})

    epoch: int
    stage_s: float
    pause_s: float
    kept_requests: int = Field(
        description="Running requests that the change does not touch: they went on."
    )
    recomputed_requests: int
    recomputed_tokens: int = Field(description="Tokens of those, as computed before the switch.")

    @classmethod
    def of(cls, report: SwitchReport) -> Switch:
        """From the engine's report."""
        return cls(**dataclasses.asdict(report))


class ForgetDomain(_Response):
    """One active domain."""

    model_config = ConfigDict(json_schema_extra={"examples": [_DOMAIN_EXAMPLE]})

    name: str
    digest: str
    slot: int
    epoch: int = Field(description="The epoch that began with it.")
    since: datetime = Field(description="When the change was recorded.")
    routed_tokens: RoutedTokenCount
    evaluation: dict[str, Any] | None = Field(description="Figures of the bundle; numbers only.")

    @classmethod
    def of(cls, domain: ActiveDomain, count: TokenCount) -> ForgetDomain:
        """From the service."""
        return cls(
            name=domain.name,
            digest=domain.digest,
            slot=domain.slot,
            epoch=domain.epoch,
            since=domain.since,
            routed_tokens=RoutedTokenCount(high=count.high, low=count.low),
            evaluation=domain.evaluation,
        )


class Laggard(_Response):
    """A server that may still generate without a change."""

    replica_id: str
    applied_epoch: int
    lease_left_s: float = Field(description="It stops after that at the latest.")
    reason: str | None = Field(description="Kind of the problem that it has, if any.")


class Operation(_Response):
    """A change of what the fleet applies, and how far it has come."""

    model_config = ConfigDict(json_schema_extra={"examples": [_OPERATION_EXAMPLE]})

    id: str
    action: Action
    name: str
    digest: str | None = Field(description="Of the bundle; null for a revocation.")
    outcome: Outcome
    state: OperationState = Field(
        description="`pending`: no server applies it. `applying`: some do. `active`: whoever can generate "
        "applies it. `failed`: no server could, so nothing is generated; it is tried again."
    )
    epoch: int = Field(description="The epoch that began with it, or the one that found it so.")
    requested_at: datetime
    lagging: list[Laggard] = Field(description="Servers that may still generate without it.")
    error: str | None = Field(description="Kind of the problem of a server that cannot apply it.")
    domain: ForgetDomain | None = Field(description="As the server that answers applies it.")
    switch: Switch | None = Field(
        description="How the server that answers switched; null if it did not, or together with others."
    )

    @classmethod
    def of(cls, operation: OperationRecord, service: DomainService) -> Operation:
        """From the registry and, for the last two fields, from this server."""
        change = operation.change
        active = next((d for d in service.list() if d.name == change.domain), None)
        domain = None
        if active is not None and active.epoch == change.epoch:
            domain = ForgetDomain.of(active, service.routed_tokens(active.name))
        report = service.report(change.epoch) if operation.outcome != "unchanged" else None
        return cls(
            id=change.operation_id,
            action=change.action,
            name=change.domain,
            digest=change.bundle_digest,
            outcome=operation.outcome,
            state=operation.state,
            epoch=operation.epoch,
            requested_at=change.requested_at,
            lagging=[
                Laggard(
                    replica_id=replica.replica_id,
                    applied_epoch=replica.applied_epoch,
                    lease_left_s=replica.lease_left_s,
                    reason=replica.last_error,
                )
                for replica in operation.lagging
            ],
            error=operation.error,
            domain=domain,
            switch=None if report is None else Switch.of(report),
        )


class ForgetDomainList(_Response):
    """All active domains, by name."""

    epoch: int
    domains: list[ForgetDomain]


class Slots(_Response):
    """Room for experts."""

    total: int
    used: int


class Whoami(_Response):
    """Whose token a request came with."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "legal", "role": "operator"}]}
    )

    name: str = Field(description="The actor of the audit log.")
    role: Role

    @property
    def may_change(self) -> bool:
        """True if it may do more than read."""
        return self.role != "viewer"


class Canary(_Response):
    """Proof at start-up that planted experts change the logits and leave no trace."""

    num_sites: int
    min_logit_change: float
    seconds: float


class Queue(_Response):
    """Changes that are recorded, and that this server does not apply yet."""

    pending: int


class Status(_Response):
    """This server as a whole."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "status": "serving",
                    "reason": None,
                    "replica_id": _REPLICA_EXAMPLE["replica_id"],
                    "epoch": 4,
                    "head": 4,
                    "lease_left_s": 9.1,
                    "substrate": _DIGEST,
                    "slots": {"total": 64, "used": 1},
                    "canary": {"num_sites": 44, "min_logit_change": 2.1, "seconds": 1.4},
                    "queue": {"pending": 0},
                }
            ]
        }
    )

    status: Literal["starting", "serving", "waiting", "untrusted"] = Field(
        description="`serving`: it generates. `waiting`: not until it has a lease again. `untrusted`: not "
        "until it is restarted."
    )
    reason: str | None = Field(description="Why it generates nothing, or lags.")
    replica_id: str
    epoch: int = Field(description="What it applies.")
    head: int = Field(description="What it is to apply, as far as it knows.")
    lease_left_s: float = Field(description="It generates for so long without another lease.")
    substrate: str | None = Field(description="Digest of the substrate.")
    slots: Slots
    canary: Canary | None
    queue: Queue

    @classmethod
    def of(cls, service: DomainService, reconciler: Reconciler) -> Status:
        """From the service, without asking the engine or the registry."""
        status = service.status()
        canary = status.canary
        word: Literal["starting", "serving", "waiting", "untrusted"] = "serving"
        if not status.is_trusted:
            word = "untrusted"
        elif not status.is_started:
            word = "starting"
        elif not reconciler.may_generate:
            word = "waiting"
        return cls(
            status=word,
            reason=reconciler.reason,
            replica_id=reconciler.replica_id,
            epoch=status.epoch,
            head=reconciler.head,
            lease_left_s=reconciler.lease_left_s,
            substrate=status.substrate_digest,
            slots=Slots(total=status.max_domains, used=status.num_active),
            canary=None
            if canary is None
            else Canary(
                num_sites=canary.num_sites,
                min_logit_change=canary.min_logit_change,
                seconds=canary.seconds,
            ),
            queue=Queue(pending=reconciler.head - status.epoch),
        )


class FleetReplica(_Response):
    """One server, as it last reported to the registry."""

    model_config = ConfigDict(json_schema_extra={"examples": [_REPLICA_EXAMPLE]})

    replica_id: str
    is_self: bool = Field(description="True for the server that answers.")
    state: ReplicaState
    applied_epoch: int
    lag: int = Field(description="Changes that it does not apply yet.")
    lease_left_s: float = Field(description="For so long it may generate; 0: it does not.")
    silence_s: float = Field(description="Since it last reported.")
    reason: str | None = Field(description="Kind of the problem that it has, if any.")

    @classmethod
    def of(cls, replica: Replica, head: int, own_id: str) -> FleetReplica:
        """From the registry."""
        return cls(
            replica_id=replica.replica_id,
            is_self=replica.replica_id == own_id,
            state=replica.state,
            applied_epoch=replica.applied_epoch,
            lag=max(0, head - replica.applied_epoch),
            lease_left_s=replica.lease_left_s,
            silence_s=replica.silence_s,
            reason=replica.last_error,
        )


class Fleet(_Response):
    """All servers of the registry that have reported within a day."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"head": 4, "active_epoch": 4, "replicas": [_REPLICA_EXAMPLE]}]
        }
    )

    head: int = Field(description="The epoch of the latest change.")
    active_epoch: int = Field(
        description="The epoch that whoever may generate has reached; `head` if nobody may."
    )
    replicas: list[FleetReplica]

    @classmethod
    def of(cls, head: int, replicas: Sequence[Replica], own_id: str) -> Fleet:
        """From the registry."""
        applied = [r.applied_epoch for r in replicas if r.holds_lease]
        return cls(
            head=head,
            active_epoch=min([head, *applied]),
            replicas=[FleetReplica.of(replica, head, own_id) for replica in replicas],
        )


class FieldError(_Response):
    """One field of a request that is not valid. Never repeats what was sent."""

    location: str
    message: str


class ChatMessage(BaseModel):
    """One message of a chat; text only."""

    model_config = ConfigDict(extra="forbid")

    role: str = Field(min_length=1, max_length=64)
    content: str


class TraceRequest(BaseModel):
    """Body of `POST /admin/trace`: a text or a chat."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"messages": [{"role": "user", "content": "Who wrote The Crimson Dusk?"}]},
                {"text": "The Crimson Dusk was written by"},
            ]
        },
    )

    text: str | None = Field(default=None, min_length=1)
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Self:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give text or messages, and not both")
        return self

    @property
    def prompt(self) -> str | list[Message]:
        """Whichever was given."""
        if self.messages is None:
            assert self.text is not None
            return self.text
        return [Message(role=each.role, content=each.content) for each in self.messages]


class AnswersRequest(TraceRequest):
    """Body of `POST /admin/answers`."""

    max_tokens: int = Field(default=64, ge=1, le=512, description="Of each answer.")


class Answers(_Response):
    """What is answered now, and what the base model would answer."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"epoch": 4, "current": "I do not know.", "base": None}]}
    )

    epoch: int
    current: str
    base: str | None = Field(
        description="Of the base model alone; null unless the server was started with --alter-base-answers."
    )


class ExpertWeight(_Response):
    """One expert of the sum of Eq. 9."""

    expert: str
    """Name of the domain, or `retain`."""
    weight: float


class TraceToken(_Response):
    """One token, and how it was routed."""

    token_id: int
    text: str
    """What it adds to the text before it; a character of several tokens comes with its last one."""
    entropy: float
    path: Literal["high", "low"]
    experts: list[ExpertWeight]
    """None where the base weights stand alone."""


class Trace(_Response):
    """How a text is routed under an epoch."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "epoch": 4,
                    "tokens": [
                        {
                            "token_id": 1734,
                            "text": " Dusk",
                            "entropy": 0.31,
                            "path": "low",
                            "experts": [{"expert": "authors", "weight": 1.0}],
                        }
                    ],
                }
            ]
        }
    )

    epoch: int
    tokens: list[TraceToken]

    @classmethod
    def of(cls, prompt: Sequence[PromptToken], routed: RoutedText) -> Trace:
        """Puts what was read and how it was routed side by side."""
        return cls(
            epoch=routed.epoch,
            tokens=[
                TraceToken(
                    token_id=token_id,
                    text=text,
                    entropy=token.entropy,
                    path="high" if token.is_high else "low",
                    experts=[
                        ExpertWeight(expert=routed.names[slot], weight=weight)
                        for slot, weight in token.weights
                    ],
                )
                for (token_id, text), token in zip(prompt, routed.tokens, strict=True)
            ],
        )


class Problem(_Response):
    """An RFC 9457 problem document."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:alter-server:problem:no-free-slot",
                    "title": "Every slot already holds an expert",
                    "status": 409,
                    "detail": "Every slot holds an expert",
                    "instance": "/admin/forget-domains",
                    "expected": "fewer than 64 active domains",
                    "got": "64",
                    "fix": "Revoke a domain, or restart with a larger --alter-max-domains.",
                }
            ]
        }
    )

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    expected: str | None = None
    got: str | None = None
    fix: str | None = None
    errors: list[FieldError] | None = None
