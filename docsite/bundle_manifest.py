"""`manifest.json` of a bundle, from the models that read it."""

from __future__ import annotations

from typing import Any

from alter_core import bundle, fingerprint
from alter_core.config import AlterConfig

from .attributes import attribute_docs
from .schema import SchemaPage

_OWNERS: tuple[type, ...] = (
    bundle.Manifest,
    AlterConfig,
    bundle.TensorInfo,
    bundle.SiteInfo,
    bundle.DataDigest,
    bundle.Provenance,
    fingerprint.BaseModelInfo,
)


def manifest() -> str:
    """One section for each object of the manifest, the manifest first."""
    schema: dict[str, Any] = bundle.Manifest.model_json_schema()
    notes = {
        (owner.__name__, field): text
        for owner in _OWNERS
        for field, text in attribute_docs(owner).items()
    }
    page = SchemaPage(prefix="manifest", notes=notes)
    objects = {"Manifest": schema, **schema["$defs"]}
    return "\n".join(page.section(name, part, level=2) for name, part in objects.items())
