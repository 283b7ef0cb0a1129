"""The audit log: who changed what, when and why, so that nobody can alter it unnoticed.

record   one record, and the chain of hashes through all of them
log      where they are kept
"""

from .log import AuditLog
from .record import (
    MAX_REASON_LENGTH,
    SERVER,
    Action,
    AuditEntry,
    AuditRecord,
    Cause,
    Head,
    Outcome,
    check_reason,
    read_export,
    verify_chain,
)

__all__ = [
    "MAX_REASON_LENGTH",
    "SERVER",
    "Action",
    "AuditEntry",
    "AuditLog",
    "AuditRecord",
    "Cause",
    "Head",
    "Outcome",
    "check_reason",
    "read_export",
    "verify_chain",
]
