"""What a request finds at its application."""

from __future__ import annotations

import asyncio

from server.audit import AuditLog
from server.domains import DomainService
from server.tokens import TokenStore


class Passage:
    """One request that may be generating. It can be ended from outside."""

    def __init__(self, task: asyncio.Task[object]) -> None:
        self._task = task
        self.is_cut = False
        """True once it was ended, or has ended itself, for want of trust."""

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
        self.service: DomainService | None = None
        self.admin_token_sha256: bytes | None = None
        self.tokens: TokenStore | None = None
        self.audit: AuditLog | None = None
        self._passages: set[Passage] = set()

    def open(
        self,
        service: DomainService,
        admin_token_sha256: bytes | None,
        *,
        tokens: TokenStore | None = None,
        audit: AuditLog | None = None,
    ) -> None:
        """Lets requests through to a service, for as long as it is serving.

        `audit` is the service's own log, for what is refused before it gets there.
        """
        self.service = service
        self.admin_token_sha256 = admin_token_sha256
        self.tokens = tokens
        self.audit = audit
        service.on_distrust.append(self.cut_all)

    @property
    def is_serving(self) -> bool:
        """True while generation is allowed."""
        return self.service is not None and self.service.is_serving

    @property
    def epoch(self) -> int | None:
        """None before there is a service."""
        return None if self.service is None else self.service.epoch

    def check_trust(self) -> None:
        """Cuts every request if the engine has lost its trust without telling."""
        if self.service is not None:
            self.service.check_trust()

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
