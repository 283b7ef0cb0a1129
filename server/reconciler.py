"""Keeps one server at what the registry says, and decides whether it may generate.

    with a lease     changes are applied one by one, in the order of the log, while generation goes on
    without a lease  nothing is generated; the engine is brought to the latest state as a whole, and only
                     then is a lease asked for

Generation is allowed while a lease is held, to the moment. When it runs out, running requests are cut; it
comes back by itself once the registry answers and the engine is at the head. A change that this server
cannot apply is tried again and again; its lease runs out meanwhile, and the fleet does not wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from prometheus_client import CollectorRegistry

from alter_core.errors import AlterError, EngineError, RegistryError, RegistryMismatchError
from server.domains import DomainService, error_kind
from server.lease import Clock, HeldLease, boot_clock
from server.metrics import AlterMetrics
from server.registry import BundleStore, Heartbeat, Registry
from server.registry.records import ReplicaState

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

RETRY_S = 0.25
"""First wait after something could not be done; it doubles."""
MAX_RETRY_S = 1.0
STOP_TIMEOUT_S = 5.0
"""How long a switch that runs at the end may take."""
_HOST_LENGTH = 27


class Reconciler:
    """See the module. To be used on one event loop."""

    def __init__(
        self,
        service: DomainService,
        registry: Registry,
        store: BundleStore,
        cache: Path,
        *,
        replica_id: str | None = None,
        metrics: AlterMetrics | None = None,
        clock: Clock = boot_clock,
    ) -> None:
        """`cache`: folder for bundles of a store that is not on this machine."""
        self._service = service
        self._registry = registry
        self._store = store
        self._cache = cache
        self.replica_id = replica_id or new_replica_id()
        self._metrics = metrics or AlterMetrics(CollectorRegistry())
        self._lease = HeldLease(clock)
        self._head = 0
        self._tried = 0
        self._error: str | None = None
        self._registry_error: str | None = None
        self._told: Heartbeat | None = None
        self._is_restoring = False
        self._is_stopped = False
        self._wake = asyncio.Event()
        self._lease_came = asyncio.Event()
        self._progress = asyncio.Event()
        self._reporting = asyncio.Lock()
        self._applying = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        # Of its own: blocked requests must not keep the lease from being renewed.
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="alter-reconciler")
        self.on_lapse: list[Callable[[], None]] = []
        """Called whenever generation is not allowed any more."""
        service.on_distrust.append(self._end_generation)

    @property
    def may_generate(self) -> bool:
        """True while the engine is sound and a lease is held."""
        return self._lease.is_held and self._service.is_sound

    @property
    def is_ready(self) -> bool:
        """True while it may generate, and applies all that it knows of the log."""
        return self.may_generate and self._service.proven_epoch >= self._head

    @property
    def head(self) -> int:
        """The epoch to apply, as far as this server knows."""
        return max(self._head, self._service.epoch)

    @property
    def applied(self) -> int:
        """The epoch that this server has proven to apply."""
        return self._service.proven_epoch

    @property
    def tried(self) -> int:
        """The epoch that it has applied or tried to: higher than `applied` if that failed."""
        return max(self._tried, self.applied)

    @property
    def lease_left_s(self) -> float:
        """How long generation is allowed without another word of the registry."""
        return self._lease.left_s

    @property
    def is_registry_up(self) -> bool:
        """True if the last report was answered."""
        return self._told is not None and self._registry_error is None

    @property
    def error(self) -> str | None:
        """The kind of the problem that keeps it from applying a change, or from the registry."""
        if not self._service.is_trusted:
            return "engine"
        return self._error or self._registry_error

    @property
    def reason(self) -> str | None:
        """Why it is not ready, in words; None if it is."""
        if self.is_ready:
            return None
        status = self._service.status()
        if status.distrust is not None:
            return status.distrust
        if not status.is_started:
            return "the engine is not proven yet"
        parts = [f"epoch {status.epoch} of {self.head} is applied"]
        if not self._lease.is_held:
            parts.append("no lease is held")
        if self.error is not None:
            parts.append(self.error)
        return ", ".join(parts)

    @property
    def progress(self) -> asyncio.Event:
        """Set as soon as this server has applied, reported, or failed; another one from then on."""
        return self._progress

    async def start(self) -> None:
        """Brings the engine, whose canary has passed, to the head; from then on keeps it there.

        What cannot be applied yet, or a registry that is gone, is tried again: nothing is generated until
        then, and the operator can mend it through the admin side.

        Raises: EngineError if the engine lost its trust on the way; the server must not start.
        """
        await self._catch_up()
        if not self._service.is_trusted:
            raise EngineError(
                "The domains of the registry could not be applied",
                expected="a trusted engine",
                got=self._service.status().distrust,
                fix="See the log for the switch that failed.",
            )
        keep = (
            self._keep_applying,
            self._keep_reporting,
            self._keep_listening,
            self._keep_watching,
        )
        self._tasks = [asyncio.create_task(task()) for task in keep]

    async def stop(self) -> None:
        """Stops generating, for good, and takes the server off the registry's list."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self._end_generation()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._applying.acquire()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A report that is still under way would put the server on the list again.
        await asyncio.to_thread(self._threads.shutdown)
        try:
            await asyncio.to_thread(self._registry.release, self.replica_id)
        except RegistryError as error:
            logger.warning("The registry lists this server until its lease ends: %s", error)

    def wake(self, head: int) -> None:
        """Makes it apply the log up to `head` at once; it need not wait to be told by the registry."""
        if head > self._head:
            self._head = head
            self._wake.set()

    async def _keep_applying(self) -> None:
        retry_s = RETRY_S
        while True:
            if self.is_ready:
                retry_s = RETRY_S
                await self._wake.wait()
            else:
                # Not `wait_for`: in Python 3.11 that may swallow a cancellation.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(retry_s):
                        await self._wake.wait()
                retry_s = min(2 * retry_s, MAX_RETRY_S)
            self._wake.clear()
            await self._catch_up()

    async def _keep_reporting(self) -> None:
        while True:
            await asyncio.sleep(self._registry.lease_s / 3)
            await self._report()

    async def _keep_listening(self) -> None:
        async for head in self._registry.listen(self.head):
            self.wake(head)

    async def _keep_watching(self) -> None:
        while True:
            self._lease_came.clear()
            while (left_s := self._lease.left_s) > 0:
                await asyncio.sleep(left_s)
            logger.warning(
                "Nothing is generated from now on: %s", self.reason, extra={"epoch": self.applied}
            )
            self._end_generation()
            await self._lease_came.wait()

    async def _catch_up(self) -> None:
        """Applies what is missing as far as it can, and reports."""
        async with self._applying:
            wanted = self.head
            try:
                if self._lease.is_held:
                    await self._follow()
                else:
                    await self._restore()
                self._error = None
            except Exception as error:
                if isinstance(error, RegistryError):
                    self._metrics.count_registry_error(error)
                kind = error_kind(error)
                if kind != self._error:  # it is tried again and again
                    # The text of an error that is not ours may hold anything.
                    words = error if isinstance(error, AlterError) else type(error).__name__
                    logger.error(
                        "Epoch %d could not be applied: %s",
                        self.head,
                        words,
                        extra={"epoch": self.applied},
                    )
                self._error = kind
        # Every server would report each change twice, one after the other over the log's lock.
        if not (self.is_ready and self._heartbeat() == self._told):
            await self._report()
        if self._error is not None:
            self._tried = max(self._tried, wanted)
        self._notify()

    async def _follow(self) -> None:
        """Raises: BundleError, SwitchError, EngineError, NoFreeSlotError, RegistryError."""
        for change in await self._call(self._registry.changes_since, self._service.epoch):
            if not self._lease.is_held or self._is_stopped:
                return
            digest = change.bundle_digest
            bundle = None if digest is None else await self._bundle(digest)
            await self._service.apply(change, bundle)
            await self._report()

    async def _restore(self) -> None:
        """Raises: as `_follow`."""
        self._is_restoring = True  # and no lease comes meanwhile
        try:
            known = self.head
            desired = await self._call(self._registry.desired_state)
            if desired.epoch < known:
                raise _lost_changes(known, desired.epoch)
            await self._service.restore(desired, self._bundle)
        finally:
            self._is_restoring = False

    async def _bundle(self, digest: str) -> Path:
        return await self._call(self._store.local, digest, self._cache)

    async def _report(self) -> None:
        """Tells the registry, and takes the lease that it grants."""
        async with self._reporting:
            asked_at, heartbeat, known = self._lease.now(), self._heartbeat(), self.head
            try:
                lease = await self._call(self._registry.heartbeat, heartbeat)
                if lease.head < known:
                    raise _lost_changes(known, lease.head)
            except RegistryError as error:
                self._metrics.count_registry_error(error)
                if self._registry_error is None:
                    logger.warning(
                        "The lease was not renewed: %s", error, extra={"epoch": self.applied}
                    )
                self._registry_error = error_kind(error)
            else:
                self._metrics.observe_heartbeat(self._lease.now() - asked_at)
                self._told = heartbeat
                if self._registry_error is not None:
                    self._registry_error = None
                    self._wake.set()  # what waits to be tried again need not wait any longer
                # A restoration may have begun since, and even have failed halfway.
                is_whole = self._service.is_whole and not self._is_restoring
                if heartbeat.state == "serving" and is_whole and not self._is_stopped:
                    self._lease.extend(asked_at, lease.duration_s)
                    if self._lease.is_held:
                        self._lease_came.set()
                self.wake(lease.head)
        self._notify()

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            replica_id=self.replica_id,
            applied_epoch=self._service.proven_epoch,
            state=self._state(),
            last_error="engine" if not self._service.is_trusted else self._error,
        )

    def _notify(self) -> None:
        done, self._progress = self._progress, asyncio.Event()
        done.set()

    def _state(self) -> ReplicaState:
        if not self._service.is_trusted:
            return "failed"
        if self._lease.is_held:
            return "serving"
        if self._error is not None:
            return "failed"
        is_whole = self._service.is_started and self._service.is_whole and not self._is_restoring
        return "serving" if is_whole and self._service.proven_epoch >= self._head else "starting"

    def _end_generation(self) -> None:
        self._lease.drop()
        for callback in self.on_lapse:
            callback()
        self._wake.set()

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))


def _lost_changes(known: int, head: int) -> RegistryMismatchError:
    return RegistryMismatchError(
        "The registry has lost changes that this server knows of",
        expected=f"epoch {known} or later",
        got=f"epoch {head}",
        fix="Restore the registry's database; to go on without those changes, restart every server.",
    )


def new_replica_id() -> str:
    """Tells an operator the machine, and is of this process alone."""
    host = "".join(c for c in socket.gethostname() if c.isprintable())[:_HOST_LENGTH]
    return f"{host}-{uuid.uuid4()}"
