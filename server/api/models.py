"""Bodies of `/admin`. What comes in is checked strictly; nothing that goes out is training text."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from alter_core.errors import ConfigError
from server.audit import MAX_REASON_LENGTH, check_reason
from server.domains import ActiveDomain, Outcome, ServiceStatus
from server.engine.base import InFlight, SwitchReport
from server.metrics import TokenCount

REASON = "x-alter-reason"
"""Header with the reason of a DELETE: percent-encoded UTF-8."""

_DIGEST = "sha256:9f2b4c1d7e8a3056b1c2d3e4f5061728394a5b6c7d8e9f00112233445566778a"
_DOMAIN_EXAMPLE: dict[str, Any] = {
    "name": "authors",
    "digest": _DIGEST,
    "slot": 0,
    "epoch": 4,
    "since": "2026-03-01T12:00:00Z",
    "bundle": "/bundles/authors",
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

    name: str = Field(description="1 to 63 of a-z, 0-9 and '-'.")
    bundle: str = Field(description="Absolute path on the server's machine, or a file:// URI.")
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
    kept_requests: int = Field(description="Running requests that no expert touches: they went on.")
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
    since: datetime
    bundle: str
    routed_tokens: RoutedTokenCount
    evaluation: dict[str, Any] | None = Field(description="Figures of the bundle; numbers only.")

    @classmethod
    def of(cls, domain: ActiveDomain, count: TokenCount) -> ForgetDomain:
        """From the registry."""
        return cls(**domain_fields(domain, count))


class Activated(ForgetDomain):
    """Answer to an activation."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [_DOMAIN_EXAMPLE | {"outcome": "created", "switch": _SWITCH_EXAMPLE}]
        }
    )

    outcome: Outcome
    switch: Switch | None = Field(description="null if the same bundle was active already.")


class Revoked(_Response):
    """Answer to a revocation."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"name": "authors", "digest": _DIGEST, "switch": _SWITCH_EXAMPLE}]
        }
    )

    name: str
    digest: str
    switch: Switch


class ForgetDomainList(_Response):
    """All active domains, by name."""

    epoch: int
    domains: list[ForgetDomain]


class Slots(_Response):
    """Room for experts."""

    total: int
    used: int


class Canary(_Response):
    """Proof at start-up that planted experts change the logits and leave no trace."""

    num_sites: int
    min_logit_change: float
    seconds: float


class Queue(_Response):
    """Changes of domains that run or wait."""

    pending: int


class Status(_Response):
    """The server as a whole."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "status": "serving",
                    "reason": None,
                    "epoch": 4,
                    "substrate": _DIGEST,
                    "slots": {"total": 64, "used": 1},
                    "canary": {"num_sites": 44, "min_logit_change": 2.1, "seconds": 1.4},
                    "queue": {"pending": 0},
                }
            ]
        }
    )

    status: Literal["starting", "serving", "untrusted"]
    reason: str | None = Field(description="Why generation is refused.")
    epoch: int
    substrate: str | None = Field(description="Digest of the substrate.")
    slots: Slots
    canary: Canary | None
    queue: Queue

    @classmethod
    def of(cls, status: ServiceStatus) -> Status:
        """From the service."""
        canary = status.canary
        word: Literal["starting", "serving", "untrusted"] = "untrusted"
        if status.is_trusted:
            word = "serving" if status.is_ready else "starting"
        return cls(
            status=word,
            reason=status.distrust,
            epoch=status.epoch,
            substrate=status.substrate_digest,
            slots=Slots(total=status.max_domains, used=status.num_active),
            canary=None
            if canary is None
            else Canary(
                num_sites=canary.num_sites,
                min_logit_change=canary.min_logit_change,
                seconds=canary.seconds,
            ),
            queue=Queue(pending=status.num_pending),
        )


class FieldError(_Response):
    """One field of a request that is not valid. Never repeats what was sent."""

    location: str
    message: str


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


def domain_fields(domain: ActiveDomain, count: TokenCount) -> dict[str, Any]:
    """Fields of `ForgetDomain`."""
    return {
        "name": domain.name,
        "digest": domain.digest,
        "slot": domain.slot,
        "epoch": domain.epoch,
        "since": domain.since,
        "bundle": str(domain.bundle),
        "routed_tokens": RoutedTokenCount(high=count.high, low=count.low),
        "evaluation": domain.evaluation,
    }
