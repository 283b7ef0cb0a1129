"""JSON Schema as tables: one section for each object."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from .markup import code, json_block, sentence, table

Schema = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchemaPage:
    """Where the objects of one schema are described."""

    prefix: str
    """Of their anchors: other pages may have objects of the same names."""
    notes: Mapping[tuple[str, str], str]
    """What a field means, by object and field, where the schema does not say it."""

    def section(self, name: str, schema: Schema, level: int = 3, example: Any = None) -> str:
        """Heading, description, fields, example."""
        required = schema.get("required", ())
        rows = [
            (
                code(field),
                self.type_of(part),
                _presence(part, is_required=field in required),
                sentence(part.get("description") or self.notes.get((name, field), "")),
            )
            for field, part in schema.get("properties", {}).items()
        ]
        text = f"\n{'#' * level} {name} {{#{self.anchor(name)}}}\n\n{_lines(schema)}\n"
        text += table(("field", "type", "", "meaning"), rows)
        return text if example is None else text + json_block(example)

    def anchor(self, name: str) -> str:
        """Of an object's section."""
        return f"{self.prefix}-{name.lower()}"

    def type_of(self, schema: Schema) -> str:
        """The type of a value, in Markdown; objects link to their sections."""
        if (reference := schema.get("$ref")) is not None:
            name = reference.rpartition("/")[2]
            return f"[{name}](#{self.anchor(name)})"
        if "anyOf" in schema:
            return " or ".join(self.type_of(part) for part in schema["anyOf"])
        if "const" in schema:
            return code(json.dumps(schema["const"]))
        if "enum" in schema:
            return " or ".join(code(json.dumps(value)) for value in schema["enum"])
        if schema.get("type") == "array":
            return f"list of {self.type_of(schema.get('items', {}))}"
        if schema.get("type") == "object":
            inner = schema.get("additionalProperties")
            return f"object of {self.type_of(inner)}" if isinstance(inner, Mapping) else "object"
        text = schema.get("type", "anything")
        if "format" in schema:
            text += f" ({schema['format']})"
        limits = [f"{word} {code(schema[key])}" for key, word in _LIMITS.items() if key in schema]
        return ", ".join([text, *limits])


_LIMITS = {
    "minLength": "length from",
    "maxLength": "length up to",
    "minimum": "from",
    "maximum": "up to",
    "pattern": "like",
}


def _presence(schema: Schema, *, is_required: bool) -> str:
    if is_required:
        return "always"
    if "default" not in schema:
        return ""
    return f"default {code(json.dumps(schema['default']))}"


def _lines(schema: Schema) -> str:
    return str(schema.get("description", "")).replace("<", "&lt;")
