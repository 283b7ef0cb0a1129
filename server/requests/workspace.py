"""Where the text of unlearning requests lies, on the machine of the server that took them.

    ROOT/id                 names the workspace in the registry
    ROOT/lock               held by the server that works on its requests
    ROOT/requests/ID/       one request; removed when it has ended
        forget.jsonl        rows to be forgotten, as uploaded
        documents.json      documents to be forgotten: [{"name", "text"}]
        retain.jsonl        rows to be kept, if any were uploaded
        prepared.jsonl      all rows that are trained: those above, and what was made of the documents
        job/                the job's: see `server.requests.jobs`

Readable by the server's user alone. Files are written whole and synced, the one that makes a request complete
last: a folder without `forget.jsonl` is of a request that was never acknowledged.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from alter_core.errors import ConfigError, RequestsClosedError

FORGET = "forget.jsonl"
DOCUMENTS = "documents.json"
RETAIN = "retain.jsonl"
PREPARED = "prepared.jsonl"
JOB = "job"
ORPHAN_S = 600.0
"""A request is recorded much sooner after its text was kept."""
_ID = "id"
_LOCK = "lock"
_REQUESTS = "requests"


class Workspace:
    """See the module. Methods raise RequestsClosedError if the disk fails."""

    def __init__(self, root: Path) -> None:
        """Begins the workspace if there is none. Raises: ConfigError."""
        self._root = root
        try:
            (root / _REQUESTS).mkdir(parents=True, exist_ok=True, mode=0o700)
            root.chmod(0o700)
            path = root / _ID
            if not path.exists():
                write_synced(path, str(uuid.uuid4()).encode())
            self.id = path.read_text("ascii").strip()
            self._lock = os.open(root / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"The folder {root} of unlearning requests cannot be used",
                expected="a folder on a local disk that this user may write",
                got=getattr(error, "strerror", None) or type(error).__name__,
                fix="Set --alter-workspace or ALTER_WORKSPACE.",
            ) from error

    def acquire(self) -> bool:
        """True if this process is the one that works on the requests from now on, until it ends."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Lets go of the lock."""
        os.close(self._lock)

    def folder(self, request_id: str) -> Path:
        """Of one request. `request_id`: as this server has made it."""
        return self._root / _REQUESTS / request_id

    def put(
        self,
        request_id: str,
        *,
        forget: Sequence[dict[str, Any]],
        documents: Sequence[dict[str, str]],
        retain: Sequence[dict[str, Any]],
    ) -> None:
        """Keeps what was uploaded."""
        folder = self.folder(request_id)
        try:
            folder.mkdir(mode=0o700)
            if retain:
                write_synced(folder / RETAIN, json_lines(retain))
            write_synced(folder / DOCUMENTS, json.dumps(list(documents)).encode())
            write_synced(folder / FORGET, json_lines(forget))
            sync_folder(folder.parent)
        except OSError as error:
            self.delete(request_id)
            raise RequestsClosedError(
                "The text of the request could not be kept",
                expected="room on the disk of --alter-workspace",
                got=error.strerror or type(error).__name__,
                fix="Make room, and send the request again.",
            ) from error

    def is_complete(self, request_id: str) -> bool:
        """False if its text is not, or no longer, there."""
        return (self.folder(request_id) / FORGET).exists()

    def delete(self, request_id: str) -> None:
        """Removes all that is left of a request. Repeating it is no error."""
        folder = self.folder(request_id)
        # The text first: what is interrupted must not leave a folder that looks complete.
        for name in (FORGET, DOCUMENTS, PREPARED, RETAIN):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(folder)  # and say why it does not go
        sync_folder(self._root / _REQUESTS)

    def delete_orphans(self, known: Collection[str]) -> None:
        """Removes folders of requests that were never recorded, and are not about to be."""
        for folder in (self._root / _REQUESTS).iterdir():
            with contextlib.suppress(FileNotFoundError):  # it is refused at this moment
                if folder.name not in known and time.time() - folder.stat().st_mtime > ORPHAN_S:
                    self.delete(folder.name)


def json_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    """One row a line."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_synced(path: Path, data: bytes) -> None:
    """Replaces a file; on return it is on the disk."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """What was created, renamed or removed in it is so after a power cut, too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
