"""Evidence as a page that needs nothing else: readable, printable, with its envelope inside.

The page is a function of the envelope alone, so `read_certificate` can tell whether what people read is what
was signed.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from alter_core.errors import EvidenceError

from .document import payload_of, read_envelope

_ENVELOPE = re.compile(
    r'<script type="application/json" id="envelope">(?P<json>.*?)</script>', re.DOTALL
)


def render_certificate(envelope: Mapping[str, Any]) -> str:
    """An HTML page, the same for the same envelope."""
    # `<` could end the element that holds it.
    text = json.dumps(envelope, sort_keys=True, separators=(",", ":")).replace("<", "\\u003c")
    return _template().render(
        evidence=payload_of(envelope),
        envelope=text,
        key_ids=[each["keyid"] for each in envelope["signatures"]],
    )


def read_certificate(page: str) -> dict[str, Any]:
    """The envelope inside a page. Raises: EvidenceError if the page shows something else than it holds."""
    found = _ENVELOPE.search(page)
    if found is None:
        raise EvidenceError(
            "This page is no certificate of ALTER",
            expected="an envelope inside",
            got="none",
            fix="Give the file that `alter evidence get` wrote.",
        )
    envelope = read_envelope(found["json"])
    if render_certificate(envelope) != page:
        raise EvidenceError(
            "This certificate shows something else than the evidence inside it",
            expected="the page that this version of ALTER makes of it",
            got="another page",
            fix="It was changed, or made by another version: rely on its envelope alone.",
        )
    return envelope


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("server.evidence", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["figure"] = figure
    return environment.get_template("certificate.html.jinja")


def figure(value: Mapping[str, float | None] | None) -> str:
    """A mean with the bounds of its interval, if there are any."""
    if value is None:
        return "not measured"
    text = f"{value['mean']:.3f}"
    if value.get("low") is not None:
        text += f" ({value['low']:.3f} to {value['high']:.3f})"
    return text
