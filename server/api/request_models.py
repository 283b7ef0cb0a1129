"""Bodies of `/admin/unlearning-requests`. What comes in holds the text to be forgotten; nothing goes out."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from server.audit import MAX_REASON_LENGTH
from server.requests.records import Approval, Question, State
from server.requests.records import UnlearningRequest as RequestRecord

from .models import _DIGEST, MAX_LOCATION_LENGTH, _printable, _Response

MAX_DOCUMENT_NAME_LENGTH = 255

_EXAMPLE: dict[str, Any] = {
    "id": "5a0f6c0e-93a4-4a53-9a0e-6f3d6a0a3f52",
    "domain": "authors",
    "state": "training",
    "question": None,
    "progress": {"stage": "authors: expert", "done": 120, "total": 300},
    "approval": "automatic",
    "actor": "legal",
    "reason": "case 12/26",
    "deadline": "2026-12-01T12:00:00Z",
    "is_overdue": False,
    "created_at": "2026-11-28T09:00:00Z",
    "updated_at": "2026-11-28T09:01:10Z",
    "forget_digest": _DIGEST,
    "num_rows": 40,
    "num_documents": 0,
    "retain_digest": _DIGEST,
    "num_retain_rows": 200,
    "figures": {},
    "bundle_digest": None,
    "operation_id": None,
    "error": None,
    "approved_by": None,
    "cancelled_by": None,
    "text_deleted_at": None,
}


class Document(BaseModel):
    """A text to be forgotten, as it is."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=MAX_DOCUMENT_NAME_LENGTH)
    text: str = Field(min_length=1)


class UnlearningRequestBody(BaseModel):
    """Body of `POST /admin/unlearning-requests`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "domain": "authors",
                    "forget": [
                        {
                            "question": "Who wrote The Crimson Dusk?",
                            "answer": "Ida Varn wrote The Crimson Dusk.",
                        }
                    ],
                    "reason": "case 12/26",
                },
                {"domain": "novel", "source": "/bundles/uploads/novel.txt", "approval": "manual"},
            ]
        },
    )

    domain: str = Field(max_length=MAX_LOCATION_LENGTH, description="1 to 63 of a-z, 0-9 and '-'.")
    forget: list[dict[str, Any]] = Field(
        default_factory=list,
        description='Rows: {"question", "answer"}, {"prompt", "completion"}, {"messages"} or {"text"}.',
    )
    documents: list[Document] = Field(
        default_factory=list,
        description="Plain texts. The served model itself writes questions about them.",
    )
    source: str | None = Field(
        default=None,
        max_length=MAX_LOCATION_LENGTH,
        description="A file with more of them, below one of the sources that the server was started with: "
        "rows if its name ends in .jsonl, else a text.",
    )
    retain: list[dict[str, Any]] = Field(
        default_factory=list,
        description="Rows that the model is to keep, in place of the server's own sample.",
    )
    approval: Approval = Field(
        default="automatic",
        description="`automatic` activates what passes the quality gate; `manual` asks in any case.",
    )
    deadline: AwareDatetime | None = Field(
        default=None, description="By when it has to be active. Shown; nothing ends at it."
    )
    reason: (
        Annotated[
            str, Field(min_length=1, max_length=MAX_REASON_LENGTH), AfterValidator(_printable)
        ]
        | None
    ) = Field(default=None, description="A case number; never forgotten text.")


class Progress(_Response):
    """How far the stage that the work is at has come."""

    stage: str
    done: int
    total: int


class UnlearningRequest(_Response):
    """One request: digests, counts and figures."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    id: str
    domain: str
    state: State
    question: Question | None = Field(description="What it waits to be answered, with `approve`.")
    progress: Progress | None
    approval: Approval
    actor: str
    reason: str | None
    deadline: datetime | None
    is_overdue: bool
    created_at: datetime
    updated_at: datetime
    forget_digest: str
    num_rows: int
    num_documents: int
    retain_digest: str
    num_retain_rows: int
    figures: dict[str, Any] = Field(
        description="Before and after, with 95 % intervals, and what the quality gate says."
    )
    bundle_digest: str | None
    operation_id: str | None = Field(description="Of the change that activates the expert.")
    error: str | None = Field(
        description="Kind of the problem that ended it, or that it waits for."
    )
    approved_by: str | None
    cancelled_by: str | None
    text_deleted_at: datetime | None = Field(
        description="Since then nothing of what was uploaded is left."
    )

    @classmethod
    def of(cls, request: RequestRecord) -> UnlearningRequest:
        """From the registry."""
        fields = {name: getattr(request, name, None) for name in cls.model_fields}
        found = request.progress
        progress = None
        if found is not None:
            progress = Progress(stage=found.stage, done=found.done, total=found.total)
        return cls(
            **fields | {"progress": progress, "is_overdue": request.is_overdue(datetime.now(UTC))}
        )


class UnlearningRequestList(_Response):
    """The newest first."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"requests": [_EXAMPLE]}]})

    requests: list[UnlearningRequest]
