"""Unlearning requests: asking for one, following it, deciding about it, and its evidence."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Literal, cast, get_args

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import HTMLResponse, Response

from alter_core.errors import AlterError, ConfigError
from server.evidence import render_certificate
from server.evidence.document import payload_of
from server.requests.intake import parse_files, parse_retain
from server.requests.records import ENDED, Approval

from .fields import choice_of, deadline_of
from .pages import Page, Visit, problem_status

Decision = Literal["approve", "cancel"]

_PASTED = "pasted.txt"
_CERTIFICATE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


async def show_requests(visit: Visit) -> Response:
    """Of all servers, the newest first."""
    answer = await visit.ask(visit.client.list_requests)
    return visit.show("requests.html.jinja", requests=answer.requests)


async def new_request(visit: Visit) -> Response:
    """The form."""
    return visit.show("new_request.html.jinja", problem=None, given={}, key=str(uuid.uuid4()))


async def create_request(visit: Visit) -> Response:
    """Takes the form; if something is wrong with it, shows it again with what is no text to be forgotten."""
    form = await _multipart(visit)
    try:
        return await _create(visit, form)
    finally:
        await form.close()


async def _create(visit: Visit, form: FormData) -> Response:
    given = {
        name: value.strip()
        for name, value in form.items()
        if isinstance(value, str) and name != "text"
    }
    try:
        rows, documents = parse_files(await _contents(form.getlist("files")))
        if text := str(form.get("text") or "").strip():
            documents.append({"name": _PASTED, "text": text})
        retain = parse_retain(await _contents(form.getlist("retain")))
        request = await visit.ask(
            visit.client.create_request,
            given.get("domain", ""),
            forget=rows,
            documents=documents,
            source=given.get("source") or None,
            retain=retain,
            approval=cast(Approval, choice_of(given, "approval", get_args(Approval))),
            deadline=deadline_of(given),
            reason=given.get("reason") or None,
            idempotency_key=given.get("key") or None,
        )
    except AlterError as error:
        status = visit.transport.status
        if status == HTTPStatus.UNAUTHORIZED:
            raise
        return visit.show(
            "new_request.html.jinja",
            problem=error,
            given=given,
            # The request may have been recorded all the same. If not, the key is as good as new.
            key=given.get("key") or str(uuid.uuid4()),
            status_code=problem_status(status),
        )
    return visit.go(f"/requests/{request.id}")


async def show_request(visit: Visit) -> Response:
    """State, progress and figures."""
    request = await visit.ask(visit.client.show_request, visit.request.path_params["id"])
    ends = request.state in ENDED and request.text_deleted_at is not None
    return visit.show("request.html.jinja", request=request, ends=ends)


def ask_to(decision: Decision) -> Page:
    """What the decision would mean."""

    async def ask(visit: Visit) -> Response:
        request = await visit.ask(visit.client.show_request, visit.request.path_params["id"])
        return visit.show("confirm_decision.html.jinja", request=request, decision=decision)

    return ask


def decide_to(decision: Decision) -> Page:
    """Approves or cancels."""

    async def decide(visit: Visit) -> Response:
        form, request_id = await visit.request.form(), visit.request.path_params["id"]
        client = visit.client
        method = client.approve_request if decision == "approve" else client.cancel_request
        await visit.ask(method, request_id, reason=str(form.get("reason") or "").strip() or None)
        return visit.go(f"/requests/{request_id}")

    return decide


async def show_certificate(visit: Visit) -> Response:
    """The evidence as it is now, as a page of its own."""
    envelope = await visit.ask(visit.client.evidence, visit.request.path_params["id"])
    headers = {"Content-Security-Policy": _CERTIFICATE_POLICY} | _saved(envelope, "html", visit)
    return HTMLResponse(render_certificate(envelope), headers=headers)


async def download_evidence(visit: Visit) -> Response:
    """The envelope alone."""
    envelope = await visit.ask(visit.client.evidence, visit.request.path_params["id"])
    return Response(
        json.dumps(envelope), media_type="application/json", headers=_saved(envelope, "json", visit)
    )


def _saved(envelope: dict[str, Any], suffix: str, visit: Visit) -> dict[str, str]:
    name = f"evidence-{payload_of(envelope)['request']['domain']}.{suffix}"
    kind = "attachment" if suffix == "json" or "save" in visit.request.query_params else "inline"
    return {"Content-Disposition": f'{kind}; filename="{name}"'}


class _InMemory(MultiPartParser):
    """Writes nothing of an upload to the disk. The body is bounded before it gets here."""

    spool_max_size = sys.maxsize


async def _multipart(visit: Visit) -> FormData:
    """Raises: ConfigError."""
    request = visit.request
    try:
        parser = _InMemory(
            request.headers, request.stream(), max_part_size=visit.runtime.max_upload_bytes
        )
        return await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise ConfigError(
            "This form cannot be read",
            expected="multipart/form-data",
            got=request.headers.get("content-type", "no content type")[:80],
            fix="Send the form of /requests/new.",
        ) from error


async def _contents(files: Sequence[UploadFile | str]) -> list[tuple[str, bytes]]:
    """Browsers send a nameless, empty file where none was chosen."""
    return [
        (file.filename, await file.read())
        for file in files
        if isinstance(file, UploadFile) and file.filename
    ]
