"""Points of a change at which a process can be made to die or to fail, and how it is told to.

The parts are the server's own; the points stand in front of and behind their methods.
"""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from server.registry import (
    Appended,
    BundleStore,
    Change,
    DesiredState,
    Heartbeat,
    Lease,
    Registry,
)
from tests.support.engine_double import STEPS, Step

Action = Literal["kill", "fail"]

APPEND, APPENDED = "append", "appended"
"""Before a change is recorded, and after it is durable and before anybody was told."""
HEARTBEAT, REPORTED = "heartbeat", "reported"
READ, FETCH = "read", "fetch"
KILL_POINTS: tuple[str, ...] = (*STEPS, APPEND, APPENDED, HEARTBEAT, REPORTED, READ, FETCH)


class InjectedError(Exception):
    """What a step fails with."""


class Points:
    """What is armed in this process. An armed point fires once."""

    def __init__(self) -> None:
        self._armed: dict[str, Action] = {}
        self._lock = threading.Lock()

    def obey(self, orders: Connection) -> None:
        """Takes orders until the other side is gone. Answers each, once it is in force, whether the point
        was armed before."""

        def listen() -> None:
            while True:
                try:
                    point, action = orders.recv()
                except (EOFError, OSError):
                    return
                with self._lock:
                    was_armed = self._armed.pop(point, None) is not None
                    if action is not None:
                        self._armed[point] = action
                orders.send(was_armed)

        threading.Thread(target=listen, daemon=True).start()

    def passes(self, point: str) -> None:
        """Raises: InjectedError, or does not return, if the point is armed."""
        with self._lock:
            action = self._armed.pop(point, None)
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "fail":
            raise InjectedError(point)

    async def before_step(self, step: Step) -> None:
        """For `EngineDouble.before_step`."""
        self.passes(step)


class PointedRegistry(Registry):
    """A registry with points."""

    points: Points

    def append(self, *args: Any, **kwargs: Any) -> Appended:
        """See `Registry`."""
        self.points.passes(APPEND)
        appended = super().append(*args, **kwargs)
        self.points.passes(APPENDED)
        return appended

    def heartbeat(self, heartbeat: Heartbeat) -> Lease:
        """See `Registry`."""
        self.points.passes(HEARTBEAT)
        lease = super().heartbeat(heartbeat)
        self.points.passes(REPORTED)
        return lease

    def changes_since(self, epoch: int, *, limit: int | None = None) -> tuple[Change, ...]:
        """See `Registry`."""
        self.points.passes(READ)
        return super().changes_since(epoch, limit=limit)

    def desired_state(self, epoch: int | None = None) -> DesiredState:
        """See `Registry`."""
        self.points.passes(READ)
        return super().desired_state(epoch)


class PointedStore(BundleStore):
    """A store with a point."""

    points: Points

    def local(self, digest: str, cache: Path) -> Path:
        """See `BundleStore`."""
        self.points.passes(FETCH)
        return super().local(digest, cache)
