"""What a fleet of servers is to apply, kept so that nothing acknowledged is lost.

registry    the log of changes, leases and the barrier
records     what goes into it and comes out
database    connections to SQLite or PostgreSQL
schema      their tables
queries     what is asked of them
migrations  how a database gets them
store       the bundles, by digest
"""

from .records import (
    Appended,
    Barrier,
    Change,
    ChangeRequest,
    Deployment,
    DesiredState,
    Heartbeat,
    IdempotencyKey,
    Lease,
    Replica,
)
from .registry import Registry
from .store import BundleStore, ImportPolicy

__all__ = [
    "Appended",
    "Barrier",
    "BundleStore",
    "Change",
    "ChangeRequest",
    "Deployment",
    "DesiredState",
    "Heartbeat",
    "IdempotencyKey",
    "ImportPolicy",
    "Lease",
    "Registry",
    "Replica",
]
