"""Takes unlearning requests, and works on those of this server's workspace until they have ended.

What a request is at stands in the registry's database, its text in the workspace, its job is a process of its
own: each may be killed at any time, and the work goes on from what the others say. Every step can be
repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from alter_core.bundle import read_manifest
from alter_core.errors import (
    AlterError,
    AuditError,
    RegistryError,
    RegistryUnavailableError,
    RequestConflictError,
    RequestsClosedError,
)
from server.audit import Action, AuditEntry, AuditLog, Cause, Outcome
from server.domain_rules import check_domain_name, is_domain_name
from server.domains import error_kind
from server.engine.base import Writer
from server.operations import Operation, OperationService
from server.registry import IdempotencyKey
from server.signatures import sign_bundle

from .book import RequestBook
from .documents import rows_of
from .intake import Upload, check_upload, distinct_lines
from .jobs import OUT, RESULT, JobRunner, read_progress, read_result
from .records import WITH_JOB, AskedFor, Progress, State, UnlearningRequest
from .settings import RequestSettings
from .workspace import (
    DOCUMENTS,
    FORGET,
    JOB,
    PREPARED,
    RETAIN,
    Workspace,
    json_lines,
    write_synced,
)

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

POLL_S = 0.5
IDLE_POLL_S = 5.0
"""While nothing is under way: what another server of the machine has taken is looked for."""
WATCH_S = 0.5
MAX_ATTEMPTS = 3
"""Jobs that may be lost before a request has failed."""


class RequestService:
    """See the module. To be used on one event loop."""

    def __init__(
        self,
        book: RequestBook,
        workspace: Workspace,
        operations: OperationService,
        jobs: JobRunner,
        settings: RequestSettings,
        *,
        model: Path,
        substrate: Path,
        may_generate: Callable[[], bool],
        epoch: Callable[[], int],
        writer: Writer | None = None,
        audit_log: AuditLog | None = None,
    ) -> None:
        """`model`, `substrate`: folders that jobs read. `writer` None: documents are trained as they are.
        `audit_log` None records nothing: for tests."""
        self._book = book
        self._workspace = workspace
        self._operations = operations
        self._jobs = jobs
        self._settings = settings
        self._model = model
        self._substrate = substrate
        self._may_generate = may_generate
        self._epoch = epoch
        self._writer = writer
        self._audit_log = audit_log
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._told: dict[str, str] = {}
        self._preparing: dict[str, asyncio.Task[None]] = {}
        # Of its own: uploads must not wait for what blocks elsewhere.
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="alter-requests")

    def start(self) -> None:
        """Works on requests from now on, unless another server of this machine does."""
        self._task = asyncio.create_task(self._keep_working())

    async def stop(self) -> None:
        """Jobs run on; whoever starts next follows them."""
        if self._task is not None:
            tasks = [self._task, *self._preparing.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown)
        self._workspace.close()

    @property
    def signing_key(self) -> Path | None:
        """Private key of what this server vouches for."""
        return self._settings.signing_key

    # --- what operators ask for ---

    async def create(
        self, upload: Upload, *, idempotency: IdempotencyKey | None = None, cause: Cause
    ) -> tuple[UnlearningRequest, bool]:
        """Takes a request; its text is on the disk and it is recorded on return. True: the key came before.

        Raises: DomainNameError, TrainingDataError, RequestConflictError, IdempotencyConflictError,
        RequestsClosedError, and nothing is kept; AuditError; RegistryUnavailableError, and it may be taken:
        repeat it with its key.
        """
        try:
            check_domain_name(upload.domain)
            if idempotency is not None:
                earlier = await self._call(self._book.replayed, idempotency)
                if earlier is not None:
                    return earlier, True
            digests = await self._call(
                check_upload, upload, self._settings.retain, datetime.now(UTC)
            )
        except AlterError as error:
            await self._record("request", upload.domain, cause, "refused", error=error_kind(error))
            raise
        asked = AskedFor(
            id=str(uuid.uuid4()),
            workspace=self._workspace.id,
            domain=upload.domain,
            approval=upload.approval,
            actor=cause.actor,
            request_id=cause.request_id,
            reason=upload.reason,
            deadline=upload.deadline,
            num_rows=len(upload.forget),
            num_documents=len(upload.documents),
            **vars(digests),
        )
        await self._record("request", asked.domain, cause, "begun", digest=asked.forget_digest)
        try:
            await self._call(
                self._workspace.put,
                asked.id,
                forget=upload.forget,
                documents=upload.documents,
                retain=upload.retain,
            )
            created, is_replayed = await self._call(self._book.create, asked, idempotency)
        except RegistryUnavailableError:
            raise  # it may be recorded: the text stays until the registry says otherwise
        except AlterError as error:
            await self._call(self._workspace.delete, asked.id)
            await self._record("request", asked.domain, cause, "failed", error=error_kind(error))
            raise
        if is_replayed:
            await self._call(self._workspace.delete, asked.id)
            return created, True
        await self._record("request", asked.domain, cause, "created", digest=asked.forget_digest)
        self._wake.set()
        return created, False

    async def get(self, request_id: str) -> UnlearningRequest:
        """Raises: RequestNotFoundError, RegistryUnavailableError."""
        return await self._call(self._book.get, request_id)

    async def list(self) -> tuple[UnlearningRequest, ...]:
        """Of all servers of the registry, the newest first. Raises: RegistryUnavailableError."""
        return await self._call(self._book.list)

    async def approve(self, request_id: str, cause: Cause) -> UnlearningRequest:
        """Answers the question that a request waits with. Raises: RequestNotFoundError,
        RequestConflictError, AuditError, RegistryUnavailableError."""
        return await self._decide("approve", self._book.approve, request_id, cause)

    async def cancel(self, request_id: str, cause: Cause) -> UnlearningRequest:
        """Asks for the end of a request that is not yet being activated. Raises: as `approve`."""
        return await self._decide("cancel", self._book.cancel, request_id, cause)

    async def watch(self, request_id: str) -> AsyncIterator[UnlearningRequest]:
        """The request as it is, and again whenever it has changed, until it has ended.

        Raises: RequestNotFoundError, RegistryUnavailableError.
        """
        known: UnlearningRequest | None = None
        while True:
            found = await self.get(request_id)
            if found != known:
                known = found
                yield found
            if found.has_ended and found.text_deleted_at is not None:
                return
            await asyncio.sleep(WATCH_S)

    async def operation(self, request: UnlearningRequest) -> Operation | None:
        """The change that activates its expert. Raises: RegistryUnavailableError."""
        if request.operation_id is None:
            return None
        return await self._operations.get(request.operation_id)

    async def _decide(
        self,
        action: Action,
        decide: Callable[[str, str], UnlearningRequest],
        request_id: str,
        cause: Cause,
    ) -> UnlearningRequest:
        known = await self.get(request_id)
        await self._record(action, known.domain, cause, "begun", digest=known.forget_digest)
        try:
            decided = await self._call(decide, request_id, cause.actor)
        except AlterError as error:
            await self._record(action, known.domain, cause, "failed", error=error_kind(error))
            raise
        await self._record(action, known.domain, cause, "done", digest=known.forget_digest)
        self._wake.set()
        return decided

    # --- the work ---

    async def _keep_working(self) -> None:
        while not self._workspace.acquire():
            await asyncio.sleep(POLL_S)
        while True:
            requests: Sequence[UnlearningRequest] = ()
            try:
                requests = await self._call(self._book.under_way, self._workspace.id)
                await self._call(self._workspace.delete_orphans, {r.id for r in requests})
            except Exception as error:
                # The text of an error that is not ours may hold anything.
                words = error if isinstance(error, AlterError) else type(error).__name__
                logger.warning("Unlearning requests have to wait: %s", words)
            await self._work(requests)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S if requests else IDLE_POLL_S):
                    await self._wake.wait()
            self._wake.clear()

    async def _work(self, requests: Sequence[UnlearningRequest]) -> None:
        is_busy = any(r.state in WITH_JOB or r.state == "preparing" for r in requests)
        for request in requests:
            if request.state == "queued" and request.cancelled_by is None and is_busy:
                continue  # one job at a time
            is_busy = is_busy or request.state == "queued"
            try:
                await self._advance(request)
                self._told.pop(request.id, None)
            except RequestConflictError:
                pass  # somebody was faster: it is read again
            except Exception as error:
                await self._hindered(request, error_kind(error))

    async def _advance(self, request: UnlearningRequest) -> None:
        if request.has_ended:
            await self._delete_text(request)
        elif request.cancelled_by is not None and request.state != "activating":
            if (preparation := self._preparing.pop(request.id, None)) is not None:
                preparation.cancel()
                await asyncio.gather(preparation, return_exceptions=True)
            await self._jobs.cancel(self._job(request))
            await self._end(request, "cancelled", "cancelled")
        elif request.state != "activating" and not self._workspace.is_complete(request.id):
            await self._end(request, "failed", "text-lost")
        elif request.state == "queued":
            await self._note(request, "preparing")
        elif request.state == "preparing":
            await self._follow_preparation(request)
        elif request.state in WITH_JOB:
            await self._follow(request)
        elif request.state == "awaiting-approval":
            await self._approved(request)
        elif request.state == "activating":
            await self._activate(request)

    async def _follow_preparation(self, request: UnlearningRequest) -> None:
        """It may take minutes, and be cancelled meanwhile."""
        task = self._preparing.get(request.id)
        if task is None:
            task = asyncio.create_task(self._prepare(request))
            task.add_done_callback(lambda _: self._wake.set())
            self._preparing[request.id] = task
        elif task.done():
            del self._preparing[request.id]
            await task  # what has kept it from its end

    async def _prepare(self, request: UnlearningRequest) -> None:
        folder = self._workspace.folder(request.id)
        if not (folder / PREPARED).exists():
            uploaded, documents = await self._call(_read, folder)
            made: list[dict[str, Any]] = []
            if documents and self._writer is not None:
                if not self._may_generate():
                    return
                made = await rows_of(documents, self._writer, self._stage(request, "questions"))
            elif documents:
                made = [{"text": each["text"]} for each in documents]
            rows = await self._call(distinct_lines, [*uploaded, *made])
            await self._call(write_synced, folder / PREPARED, json_lines(rows))
        await self._note(await self._call(self._book.get, request.id), "training", progress=None)

    def _stage(self, request: UnlearningRequest, stage: str) -> Callable[[int, int], None]:
        loop = asyncio.get_running_loop()
        shown = -1.0

        def progress(done: int, total: int) -> None:
            nonlocal shown
            if loop.time() - shown >= POLL_S:
                shown = loop.time()
                note = Progress(stage=stage, done=done, total=total)
                self._threads.submit(self._book.advance, request, progress=note)

        return progress

    async def _follow(self, request: UnlearningRequest) -> None:
        folder = self._job(request)
        state = await self._jobs.state(folder)
        if state == "running":
            found = await asyncio.to_thread(read_progress, folder)
            if found is not None and found[1] != request.progress:
                phase: State = "evaluating" if found[0] == "evaluating" else "training"
                await self._note(request, phase, progress=found[1])
        elif state == "ended":
            await self._result(request, await asyncio.to_thread(read_result, folder))
        elif request.num_attempts >= MAX_ATTEMPTS:
            await self._end(request, "failed", "job-lost")
        else:
            await self._jobs.start(folder, self._spec(request))
            await self._note(
                request, "training", num_attempts=request.num_attempts + 1, progress=None
            )

    async def _result(self, request: UnlearningRequest, result: dict[str, Any]) -> None:
        if result["outcome"] == "nothing-to-forget":
            await self._note(
                request, "awaiting-approval", question="nothing-to-forget", progress=None
            )
        elif result["outcome"] != "trained":
            await self._end(request, "failed", str(result["error"]))
        else:
            bundle = self._job(request) / result["bundle"]
            if (key := self._settings.signing_key) is not None:
                await self._call(sign_bundle, bundle, key)
            verdict = self._settings.gate.judge(result["figures"])
            fields: dict[str, Any] = {
                "figures": result["figures"] | {"gate": verdict},
                "bundle_digest": (await self._call(read_manifest, bundle)).digest,
                "progress": None,
            }
            if verdict["is_passed"] and request.approval == "automatic":
                await self._note(request, "activating", **fields)
            else:
                question = "approval" if verdict["is_passed"] else "gate-failed"
                await self._note(request, "awaiting-approval", question=question, **fields)

    async def _approved(self, request: UnlearningRequest) -> None:
        if request.approved_by is None:
            return
        if request.question == "nothing-to-forget":
            await self._jobs.cancel(self._job(request))
            await self._call((self._job(request) / RESULT).unlink, missing_ok=True)
            await self._note(
                request, "training", question=None, approved_by=None, allow_unknown=True
            )
        else:
            await self._note(request, "activating", question=None)

    async def _activate(self, request: UnlearningRequest) -> None:
        """Until no server can generate without the expert. Repeated, the change is made once."""
        if request.operation_id is None:
            try:
                operation_id = await self._record_change(request)
            except (AuditError, RegistryError):
                raise  # it may be recorded; repeated with its key
            except AlterError as error:  # it is not, and would not be the next time
                await self._note(
                    request,
                    "awaiting-approval",
                    question="activation-refused",
                    approved_by=None,
                    error=error_kind(error),
                )
                return
            request = await self._note(request, "activating", operation_id=operation_id, error=None)
        assert request.operation_id is not None
        operation = await self._operations.get(request.operation_id)
        if operation.state == "active":
            await self._delete_text(await self._note(request, "active", error=None))
        elif operation.error != request.error:
            await self._note(request, "activating", error=operation.error)

    async def _record_change(self, request: UnlearningRequest) -> str:
        assert request.bundle_digest is not None
        operation = await self._operations.activate(
            request.domain,
            self._job(request) / OUT / request.domain,
            idempotency=IdempotencyKey(
                key=f"unlearning-request/{request.id}",
                request_digest=request.bundle_digest,
            ),
            cause=Cause(
                actor=request.approved_by or request.actor,
                request_id=request.request_id or request.id,
                reason=request.reason,
            ),
        )
        return operation.change.operation_id

    def _spec(self, request: UnlearningRequest) -> dict[str, Any]:
        folder = self._workspace.folder(request.id)
        own_retain = folder / RETAIN
        retain = [own_retain] if own_retain.exists() else list(self._settings.retain)
        return {
            "model": str(self._model),
            "substrate": str(self._substrate),
            "domain": request.domain,
            "forget": str(folder / PREPARED),
            "retain": [str(path) for path in retain],
            "general": [str(path) for path in self._settings.general],
            "allow_unknown": request.allow_unknown,
            "device": self._settings.device,
            "seed": 0,
        }

    def _job(self, request: UnlearningRequest) -> Path:
        return self._workspace.folder(request.id) / JOB

    async def _note(
        self, request: UnlearningRequest, state: State, **fields: Any
    ) -> UnlearningRequest:
        """Raises: RequestConflictError if it has moved on, or is to be cancelled."""
        return await self._call(self._book.advance, request, state, **{"error": None} | fields)

    async def _end(self, request: UnlearningRequest, state: State, outcome: str) -> None:
        error = None if outcome == "cancelled" else outcome
        ended = await self._note(request, state, error=error, question=None, progress=None)
        await self._delete_text(ended)

    async def _delete_text(self, request: UnlearningRequest) -> None:
        """Recorded once nothing is left; a crash in between repeats it."""
        await self._call(self._workspace.delete, request.id)
        cause = Cause(
            actor="server", request_id=request.request_id or request.id, reason=request.reason
        )
        await self._record("delete-text", request.domain, cause, "done", request.forget_digest)
        await self._call(self._book.text_deleted, request)

    async def _hindered(self, request: UnlearningRequest, kind: str) -> None:
        """What keeps it from going on is tried again; it is told once, and shown."""
        if self._told.get(request.id) != kind:
            self._told[request.id] = kind
            logger.warning("Unlearning request %s has to wait: %s", request.id, kind)
        if request.error != kind:
            with contextlib.suppress(AlterError):
                await self._call(self._book.advance, request, error=kind)

    async def _record(
        self,
        action: Action,
        domain: str,
        cause: Cause,
        outcome: Outcome,
        digest: str | None = None,
        error: str | None = None,
    ) -> None:
        """Raises: AuditError."""
        if self._audit_log is None:
            return
        entry = AuditEntry(
            actor=cause.actor,
            request_id=cause.request_id,
            action=action,
            # Anything may come as a name; only what can be one is recorded.
            domain=domain if is_domain_name(domain) else None,
            epoch_before=self._epoch(),
            epoch_after=self._epoch(),
            digest=digest,
            reason=cause.reason,
            outcome=outcome,
            error=error,
        )
        is_owed = outcome not in ("begun", "refused")
        await self._call(self._audit_log.append, entry, is_owed=is_owed)

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))


def _read(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Uploaded rows and documents. Raises: RequestsClosedError."""
    try:
        rows = [json.loads(line) for line in (folder / FORGET).read_bytes().splitlines()]
        return rows, json.loads((folder / DOCUMENTS).read_bytes())
    except (OSError, ValueError) as error:
        raise RequestsClosedError(
            "The text of an unlearning request cannot be read",
            expected="what was uploaded",
            got=type(error).__name__,
            fix="It is tried again.",
        ) from error
