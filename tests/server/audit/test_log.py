"""The audit log: what is found, what is refused, and what many writers make of it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import sqlite3
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from alter_core.errors import AuditError, AuditTamperedError, ConfigError
from server.audit import (
    AuditEntry,
    AuditLog,
    AuditRecord,
    Head,
    check_reason,
    read_export,
    verify_chain,
)

NUM_RECORDS = 7
COLUMNS = (
    "time", "actor", "request_id", "action", "domain", "epoch_before", "epoch_after", "digest", "reason",
    "outcome", "error", "previous_hash", "hash",
)  # fmt: skip


def entry(request_id: str = "r", **changed: object) -> AuditEntry:
    fields: dict[str, object] = {
        "actor": "alice",
        "request_id": request_id,
        "action": "activate",
        "domain": "authors",
        "epoch_before": 3,
        "epoch_after": 4,
        "digest": "sha256:9f",
        "reason": "Az. 3 O 12/26 – §17",
        "outcome": "created",
        "error": None,
    }
    return AuditEntry(**(fields | changed))  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "audit.sqlite"


@pytest.fixture
def log(path: Path) -> AuditLog:
    log = AuditLog.open(path)
    for index in range(NUM_RECORDS):
        log.append(entry(f"r{index}"))
    return log


def tamper(path: Path, *statements: str) -> None:
    """As somebody would who may write the file: without the triggers."""
    connection = sqlite3.connect(path)
    triggers = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'trigger'"
    ).fetchall()
    assert len(triggers) == 3
    for (name,) in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        assert connection.execute(statement).rowcount > 0, statement
    connection.commit()
    connection.close()


def insert_copy(sequence: int) -> str:
    """Of record 2."""
    columns = ", ".join(COLUMNS)
    return f"INSERT INTO audit_records SELECT {sequence}, {columns} FROM audit_records WHERE sequence = 2"


def test_a_record_is_hashed_over_all_its_other_fields(log: AuditLog) -> None:
    records = list(log.records())
    assert [record.sequence for record in records] == list(range(1, NUM_RECORDS + 1))
    previous = "sha256:" + 64 * "0"
    for record in records:
        fields = json.loads(record.json())
        claimed = fields.pop("hash")
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        assert claimed == "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        assert fields["previous_hash"] == previous
        assert fields["time"].endswith("+00:00")
        previous = claimed
    assert log.verify() == log.head() == Head(NUM_RECORDS, previous)


def test_the_log_is_its_owners_alone(path: Path, log: AuditLog) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_it_is_synced_and_goes_on_where_it_ended(path: Path, log: AuditLog) -> None:
    assert AuditLog.open(path).append(entry()).sequence == NUM_RECORDS + 1
    with log._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("value", ["'9'", "x'39ff'", "CAST(x'ff' AS TEXT)"])
def test_any_changed_field_is_found(path: Path, log: AuditLog, column: str, value: str) -> None:
    tamper(path, f"UPDATE audit_records SET {column} = {value} WHERE sequence = 4")
    with pytest.raises(AuditTamperedError, match="record 4 "):
        log.verify()


def test_a_record_with_its_hash_computed_anew_breaks_the_next(path: Path, log: AuditLog) -> None:
    forged = dataclasses.replace(list(log.records())[3], actor="bob")
    statement = f"UPDATE audit_records SET actor = 'bob', hash = '{forged.computed_hash()}'"
    tamper(path, statement + " WHERE sequence = 4")
    with pytest.raises(AuditTamperedError, match="record 5 does not follow"):
        log.verify()


def test_every_column_is_tried_above() -> None:
    assert set(COLUMNS) | {"sequence"} == set(AuditRecord.__dataclass_fields__)


@pytest.mark.parametrize(
    ("statements", "first_bad"),
    [
        (["DELETE FROM audit_records WHERE sequence = 4"], 4),
        (["DELETE FROM audit_records WHERE sequence = 1"], 1),
        (
            [  # removed, and the gap closed
                "DELETE FROM audit_records WHERE sequence = 4",
                "UPDATE audit_records SET sequence = -sequence WHERE sequence > 4",
                "UPDATE audit_records SET sequence = -sequence - 1 WHERE sequence < 0",
            ],
            4,
        ),
        (
            [  # two change places
                "UPDATE audit_records SET sequence = 100 WHERE sequence = 3",
                "UPDATE audit_records SET sequence = 3 WHERE sequence = 5",
                "UPDATE audit_records SET sequence = 5 WHERE sequence = 100",
            ],
            3,
        ),
        (
            [  # a copy is inserted
                "UPDATE audit_records SET sequence = -sequence WHERE sequence > 3",
                "UPDATE audit_records SET sequence = 1 - sequence WHERE sequence < 0",
                insert_copy(4),
            ],
            4,
        ),
        (
            [
                insert_copy(0),
            ],
            1,
        ),
    ],
    ids=["removed", "first-removed", "removed-and-closed", "reordered", "inserted", "put-before"],
)
def test_removed_moved_and_inserted_records_are_found(
    path: Path, log: AuditLog, statements: list[str], first_bad: int
) -> None:
    tamper(path, *statements)
    with pytest.raises(AuditTamperedError, match=f"record {first_bad} ") as caught:
        log.verify()
    assert caught.value.fix
    with pytest.raises(AuditTamperedError):
        AuditLog.open(path)


def test_a_truncated_tail_is_found_by_a_head_that_was_kept(path: Path, log: AuditLog) -> None:
    kept = Head.parse(f"{log.head()}\n")
    log.append(entry())
    assert log.verify(kept).sequence == NUM_RECORDS + 1
    tamper(path, "DELETE FROM audit_records WHERE sequence > 5")
    assert log.verify().sequence == 5
    with pytest.raises(AuditTamperedError, match="record 6 was cut off"):
        log.verify(kept)


def test_a_chain_that_was_written_anew_is_found_by_a_head_that_was_kept(
    log: AuditLog, tmp_path: Path
) -> None:
    kept = log.head()
    forged = AuditLog.open(tmp_path / "forged.sqlite")
    for record in log.records():
        changed = "bob" if record.sequence == 2 else record.actor
        forged.append(entry(record.request_id, actor=changed, time=record.time))
    forged.verify()
    with pytest.raises(AuditTamperedError, match=f"record {NUM_RECORDS} is another"):
        forged.verify(kept)


def test_an_empty_log_has_a_head_too(path: Path) -> None:
    log = AuditLog.open(path)
    empty = log.head()
    assert log.verify(Head.parse(str(empty))) == empty
    log.append(entry())
    log.verify(empty)
    with pytest.raises(AuditTamperedError, match="record 0 "):
        log.verify(Head(0, "sha256:other"))


@pytest.mark.parametrize("text", ["", "4", "sha256:ab", "four sha256:ab", "-1 sha256:ab", "4 ab"])
def test_what_is_no_head_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="head"):
        Head.parse(text)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_records SET actor = 'bob' WHERE sequence = 2",
        "DELETE FROM audit_records WHERE sequence = 2",
        "DELETE FROM audit_records",
        "INSERT INTO audit_records SELECT * FROM audit_records WHERE sequence = 2",
        "INSERT OR REPLACE INTO audit_records SELECT * FROM audit_records WHERE sequence = 2",
        "INSERT OR IGNORE INTO audit_records SELECT * FROM audit_records WHERE sequence = 2",
        "UPDATE OR REPLACE audit_records SET sequence = 3 WHERE sequence = 2",
    ],
)
def test_the_database_refuses_what_is_no_append(path: Path, log: AuditLog, statement: str) -> None:
    before = log.head()
    connection = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    connection.close()
    assert log.verify() == before


def test_threads_make_one_chain(path: Path) -> None:
    logs = [AuditLog.open(path) for _ in range(3)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: logs[i % 3].append(entry(f"r{i}")), range(60)))
    assert logs[0].verify().sequence == 60
    assert {r.request_id for r in logs[0].records()} == {f"r{i}" for i in range(60)}


def append_many(path: Path, name: str, number: int) -> None:
    log = AuditLog.open(path)
    for index in range(number):
        log.append(entry(f"{name}{index}"))


def test_processes_make_one_chain(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=append_many, args=(path, name, 20)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    log = AuditLog.open_to_read(path)
    assert log.verify().sequence == 60
    order = [r.request_id for r in log.records() if r.request_id.startswith("b")]
    assert order == [f"b{i}" for i in range(20)]


def append_and_tell(path: Path, told: Connection) -> None:
    log = AuditLog.open(path)
    while True:
        told.send(log.append(entry()).sequence)


def test_what_was_acknowledged_survives_a_killed_server(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=append_and_tell, args=(path, sender))
    process.start()
    acknowledged = [receiver.recv() for _ in range(20)][-1]
    process.kill()
    process.join(60)
    sender.close()
    with contextlib.suppress(EOFError):
        while True:
            acknowledged = receiver.recv()
    receiver.close()
    log = AuditLog.open(path)
    assert acknowledged <= log.head().sequence <= acknowledged + 1
    log.append(entry())
    log.verify()


def exported(log: AuditLog, path: Path, change: Callable[[list[str]], object]) -> Path:
    lines = [record.json() for record in log.records()]
    change(lines)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_an_export_verifies_without_the_database(log: AuditLog, tmp_path: Path) -> None:
    export = exported(log, tmp_path / "a.jsonl", lambda lines: None)
    assert verify_chain(read_export(export), log.head()) == log.head()
    assert list(read_export(export)) == list(log.records())


@pytest.mark.parametrize(
    ("change", "first_bad"),
    [
        (lambda lines: lines.pop(2), 3),
        (lambda lines: lines.insert(2, lines[2]), 4),
        (lambda lines: lines.insert(1, lines.pop(2)), 2),
        (lambda lines: lines.__setitem__(3, lines[3].replace("alice", "bob")), 4),
        (lambda lines: lines.__setitem__(3, lines[3].replace("{", '{"note":"x",')), 4),
        (lambda lines: lines.__setitem__(3, lines[3].replace(":4,", ':"4",')), 4),
        (lambda lines: lines.__setitem__(3, lines[3][:50]), 4),
        (lambda lines: lines.__setitem__(3, "[]"), 4),
        (lambda lines: lines.__setitem__(3, "7"), 4),
    ],
)
def test_a_changed_export_is_found(
    log: AuditLog, tmp_path: Path, change: Callable[[list[str]], object], first_bad: int
) -> None:
    export = exported(log, tmp_path / "a.jsonl", change)
    with pytest.raises(AuditTamperedError, match=f"record {first_bad} "):
        verify_chain(read_export(export))


def test_a_log_that_cannot_be_written_is_an_error(path: Path, log: AuditLog) -> None:
    path.rename(path.with_name("away"))
    with pytest.raises(AuditError, match="cannot be written") as caught:
        log.append(entry())
    assert "--alter-audit-log" in str(caught.value.fix)
    assert not path.exists()
    path.write_text("hello, this is not a database " * 100)
    with pytest.raises(AuditError, match="not a database"):
        log.append(entry())
    (path.parent / "file").write_text("")
    with pytest.raises(AuditError):
        AuditLog.open(path.parent / "file" / "audit.sqlite")
    with pytest.raises(AuditError, match="No such file"):
        AuditLog.open_to_read(path.parent / "nothing")


def test_what_is_owed_comes_before_the_next_record(path: Path, log: AuditLog) -> None:
    away = path.with_name("away")
    path.rename(away)
    for name, is_owed in (("a", True), ("b", False)):
        with pytest.raises(AuditError):
            log.append(entry(name), is_owed=is_owed)
    away.rename(path)
    log.append(entry("c"))
    assert [r.request_id for r in log.records()][NUM_RECORDS:] == ["a", "c"]
    log.verify()


def test_a_log_cut_back_under_a_running_server_gets_no_more_records(
    path: Path, log: AuditLog
) -> None:
    tamper(path, f"DELETE FROM audit_records WHERE sequence = {NUM_RECORDS}")
    with pytest.raises(AuditTamperedError, match="cut back"):
        log.append(entry())


def test_a_reader_changes_nothing(log: AuditLog, path: Path) -> None:
    reader = AuditLog.open_to_read(path)
    assert reader.verify() == log.head()
    with pytest.raises(AuditError, match="readonly"):
        reader.append(entry())


@pytest.mark.parametrize("reason", ["", "a\nb", "a\x00", "a\u202eb", "a\u2028b", "x" * 201, "\x7f"])
def test_a_reason_that_could_forge_a_line_is_refused(reason: str) -> None:
    with pytest.raises(ConfigError, match="reason"):
        check_reason(reason)


@pytest.mark.parametrize("reason", ["x" * 200, "Az. 3 O 12/26 – §17", "事件 12"])
def test_a_case_number_is_a_reason(reason: str) -> None:
    assert check_reason(reason) == reason
