"""The HTTP side as OpenAPI describes it, taken from the application that `alter serve` puts together."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from server.api import models, request_models
from server.api.app import ADMIN, attach
from server.api.auth import needed_role

from .attributes import attribute_docs
from .markup import code, fence, sentence, table
from .schema import SchemaPage

SERVER = "localhost:8000"
_PLACES = {"path": "in the path", "header": "header", "query": "in the query"}


@functools.cache
def _page() -> SchemaPage:
    notes = {
        (model.__name__, field): text
        for model in _models().values()
        for field, text in attribute_docs(model).items()
    }
    return SchemaPage(prefix="http", notes=notes)


@functools.cache
def openapi() -> dict[str, Any]:
    """What `/openapi.json` says of our routes; vLLM's own stand beside them on a running server."""
    app = FastAPI(title="ALTER Server")
    attach(app)
    return app.openapi()


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and description of every route."""
    for path, item in openapi()["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


def routes() -> str:
    """One section a route."""
    return "\n".join(_route(*each) for each in operations())


def bodies() -> str:
    """One section for each object that is sent or answered."""
    schemas = openapi()["components"]["schemas"]
    return "\n".join(
        _page().section(name, schema, example=example_of(name))
        for name, schema in sorted(schemas.items())
    )


def example_of(name: str) -> Any:
    """The model's own example; FastAPI leaves nulls out of those in `/openapi.json`."""
    extra: Any = _models()[name].model_config.get("json_schema_extra", {})
    return next(iter(extra.get("examples", ())), None)


def _models() -> dict[str, type[BaseModel]]:
    return {
        name: member
        for name, member in (vars(models) | vars(request_models)).items()
        if isinstance(member, type) and issubclass(member, BaseModel)
    }


def _route(method: str, path: str, operation: dict[str, Any]) -> str:
    text = f"\n### {method} {path} {{#{anchor(method, path)}}}\n\n{operation['summary']}."
    text += f" {operation.get('description', '')}\n\n"
    if path.startswith(ADMIN):
        text += f"Role: {needed_role(method)}, or a higher one.\n"
    else:
        text += "Open to everybody, without a token.\n"
    parameters = [
        (code(p["name"]), _PLACES[p["in"]], sentence(p.get("description", "")))
        for p in operation.get("parameters", ())
    ]
    text += table(("parameter", "where", "meaning"), parameters)
    body = _content(operation.get("requestBody", {}))
    if body:
        text += f"\nBody: {_page().type_of(body)}.\n"
    text += fence("console", _curl(method, path, _example(body)))
    answers = [
        (
            status,
            _when(status, answer),
            _page().type_of(schema) if (schema := _content(answer)) else "",
        )
        for status, answer in sorted(operation["responses"].items())
        if status != "default"
    ]
    return text + table(("status", "when", "body"), answers)


def _when(status: str, answer: dict[str, Any]) -> str:
    """What is said of an answer; FastAPI says the same of all that succeed."""
    said = answer["description"]
    return HTTPStatus(int(status)).phrase if said == "Successful Response" else said


def anchor(method: str, path: str) -> str:
    """Of a route's section."""
    steps = [step.strip("{}") for step in path.split("/") if step]
    return "-".join([method.lower(), *steps]).replace("_", "-")


def _curl(method: str, path: str, body: Any) -> str:
    for name, value in _EXAMPLES.items():
        path = path.replace(f"{{{name}}}", value)
    parts = ["$ curl -s"]
    if method != ("GET" if body is None else "POST"):
        parts[0] += f" -X {method}"
    parts[0] += f" {SERVER}{path}"
    if path.startswith(ADMIN):
        parts.append('-H "authorization: Bearer $ALTER_ADMIN_TOKEN"')
    if body is not None:
        parts += ["-H 'content-type: application/json'", f"-d '{json.dumps(body)}'"]
    return " \\\n    ".join(parts)


_EXAMPLES = {"name": "authors", "operation_id": "0d6f3e0e-7a2c-4b61-9d0f-6a1b8f5c2e11"}


def _content(part: dict[str, Any]) -> dict[str, Any]:
    """The schema of a body, in whichever media type; empty for an answer that has none."""
    for media_type in part.get("content", {}).values():
        schema: dict[str, Any] = media_type.get("schema", {})
        return schema
    return {}


def _example(schema: dict[str, Any]) -> Any:
    if "$ref" not in schema:
        return None
    return example_of(schema["$ref"].rpartition("/")[2])
