"""What a request finds at its application."""

from __future__ import annotations

import asyncio
import socket

from starlette.types import ASGIApp

from server.admin_port import AdminPort, AdminServer
from server.audit import AuditLog
from server.base_answers import BaseAnswers
from server.engine.base import Prompts, Writer
from server.parts import Parts
from server.registry import ImportPolicy
from server.requests.service import RequestService
from server.requests.settings import DEFAULT_MAX_UPLOAD_MIB
from server.tokens import TokenStore


class Passage:
    """One request that may be generating. It can be ended from outside."""

    def __init__(self, task: asyncio.Task[object]) -> None:
        self._task = task
        self.is_cut = False
        """True once it was ended for want of trust or of a lease."""

    def cut(self) -> None:
        """Cancels the request, once."""
        if not self.is_cut:
            self.is_cut = True
            self._task.cancel()

    def absorb(self) -> bool:
        """After the application has ended: True if `cut` is the only reason to cancel the task.

        The task is then as if it had never been cancelled.
        """
        return self.is_cut and self._task.uncancel() == 0


class AlterRuntime:
    """Lives at `app.state.alter` from the moment the routes are attached; closed until `open`."""

    def __init__(self) -> None:
        self.parts: Parts | None = None
        self.prompts: Prompts | None = None
        self.writer: Writer | None = None
        self.base_answers: BaseAnswers | None = None
        self.requests: RequestService | None = None
        self.max_upload_bytes = DEFAULT_MAX_UPLOAD_MIB * 2**20
        self.admin_token_sha256: bytes | None = None
        self.tokens: TokenStore | None = None
        self.audit: AuditLog | None = None
        self.requires_if_match = False
        self.sources = ImportPolicy()
        self.own_port_app: ASGIApp | None = None
        """What would listen on a port of its own."""
        self.admin_server: AdminServer | None = None
        self._passages: set[Passage] = set()

    def open(
        self,
        parts: Parts,
        admin_token_sha256: bytes | None,
        *,
        tokens: TokenStore | None = None,
        audit: AuditLog | None = None,
        requires_if_match: bool = False,
        sources: ImportPolicy | None = None,
        prompts: Prompts | None = None,
        writer: Writer | None = None,
        base_answers: BaseAnswers | None = None,
        requests: RequestService | None = None,
        max_upload_bytes: int = DEFAULT_MAX_UPLOAD_MIB * 2**20,
    ) -> None:
        """Lets requests through, for as long as the server may generate.

        `audit` is the server's own log, for what is refused before it gets there. `requires_if_match`:
        no change without If-Match or If-None-Match. `sources` says where bundles that a request names may
        lie; None: nowhere. `prompts` makes the prompts of traces, `writer` and `base_answers` write
        answers. `requests` takes unlearning requests of at
        most `max_upload_bytes`.
        """
        self.parts = parts
        self.prompts = prompts
        self.writer = writer
        self.base_answers = base_answers
        self.requests = requests
        self.max_upload_bytes = max_upload_bytes
        self.admin_token_sha256 = admin_token_sha256
        self.tokens = tokens
        self.audit = audit
        self.requires_if_match = requires_if_match
        self.sources = sources or ImportPolicy()
        parts.reconciler.on_lapse.append(self.cut_all)

    async def close(self) -> None:
        """When the server stops."""
        if self.admin_server is not None:
            await self.admin_server.close()
        if self.requests is not None:
            await self.requests.stop()
        if self.parts is not None:
            await self.parts.stop()

    def listen_apart(self, where: AdminPort, listener: socket.socket) -> None:
        """Serves `/admin` on a port of its own from now on, and on the other one no longer."""
        assert self.own_port_app is not None
        self.admin_server = AdminServer(where, listener, self.own_port_app)

    @property
    def has_own_port(self) -> bool:
        """True if `/admin` is not to be reached on the port that serves."""
        return self.admin_server is not None

    @property
    def is_serving(self) -> bool:
        """True while generation is allowed."""
        return self.parts is not None and self.parts.reconciler.may_generate

    @property
    def is_sound(self) -> bool:
        """True while the engine is proven and trusted, lease or not."""
        return self.parts is not None and self.parts.service.is_sound

    @property
    def epoch(self) -> int | None:
        """None before there is a service."""
        return None if self.parts is None else self.parts.service.epoch

    def check_trust(self) -> None:
        """Cuts every request if the engine has lost its trust without telling."""
        if self.parts is not None:
            self.parts.service.check_trust()

    def enter(self) -> Passage:
        """Registers the current task as one that may generate. Pair with `leave`."""
        task = asyncio.current_task()
        assert task is not None
        passage = Passage(task)
        self._passages.add(passage)
        return passage

    def leave(self, passage: Passage) -> None:
        """See `enter`."""
        self._passages.discard(passage)

    def cut_all(self) -> None:
        """Ends every request that may be generating."""
        for passage in tuple(self._passages):
            passage.cut()
