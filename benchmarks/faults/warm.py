"""Loads, once for all servers that are forked from here, what each would load when it starts."""

from __future__ import annotations

import gc
import importlib
import tempfile
from pathlib import Path

from fastapi import FastAPI

from server.api.app import attach
from server.audit import AuditLog
from server.registry import Deployment, Registry

from . import replica as replica  # what the forked processes run

for _name in (
    "psycopg",
    "sqlalchemy.dialects.postgresql.psycopg",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
):
    importlib.import_module(_name)

with tempfile.TemporaryDirectory() as _folder:
    Registry.open(
        f"sqlite:///{_folder}/registry.sqlite",
        Deployment(base_model_fingerprint="f" * 64, substrate_digest="sha256:" + "0" * 64),
        max_domains=1,
    ).close()
    AuditLog.open(Path(_folder) / "audit.sqlite")
attach(FastAPI())

# A collection in a forked process would touch, and so copy, every page of all this.
gc.collect()
gc.freeze()
