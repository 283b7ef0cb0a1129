"""The types of problem documents: of the error tree, and of refusals that exist only in HTTP."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import server.api
from alter_core.errors import AlterError, problem_kind
from server.api.problems import TYPE_PREFIX, status_of

from .markup import code, table

_API = Path(server.api.__file__).parent


def error_types() -> str:
    """One row for each class of the error tree that may leave the server."""
    rows = [
        (code(TYPE_PREFIX + problem_kind(kind)), str(int(status_of(kind("")))), _first_line(kind))
        for kind in error_classes()
        if status_of(kind("")) != HTTPStatus.INTERNAL_SERVER_ERROR
    ]
    return table(("type", "status", "meaning"), rows)


def http_types() -> str:
    """One row for each refusal that only HTTP has."""
    rows = [
        (code(TYPE_PREFIX + kind), str(status), f"{title}.") for kind, status, title in refusals()
    ]
    return table(("type", "status", "meaning"), rows)


def client_errors() -> str:
    """One row for each class of the error tree, the tree's order."""
    rows = []
    for kind in error_classes():
        rows.append((code(kind.__name__), code(kind.__base__.__name__), _first_line(kind)))  # type: ignore[union-attr]
    return table(("class", "is a", "meaning"), rows)


def error_classes() -> Iterator[type[AlterError]]:
    """AlterError and everything below it, parents first."""
    waiting: list[type[AlterError]] = [AlterError]
    while waiting:
        found = waiting.pop(0)
        yield found
        waiting = found.__subclasses__() + waiting


def refusals() -> list[tuple[str, int, str]]:
    """Kind, status and title of every ProblemError that `server.api` raises, read from its source."""
    found = set()
    for path in sorted(_API.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and _name(node.func) == "ProblemError":
                status, kind, title = node.args[:3]
                assert isinstance(kind, ast.Constant), f"{path.name}: a kind that is not a literal"
                assert isinstance(title, ast.Constant)
                found.add((str(kind.value), int(HTTPStatus[_name(status)]), str(title.value)))
    return sorted({*found, *_OF_HANDLERS}, key=lambda each: (each[1], each[0]))


_OF_HANDLERS = {
    ("malformed-json", 400, "The body is not JSON"),
    ("invalid-request", 422, "The request is not valid"),
    ("internal", 500, "Internal error"),
    ("not-found", 404, "No such route under /admin"),
    ("method-not-allowed", 405, "The route does not take this method"),
}
"""Of `server.api.problems`' own handlers, which a test asks."""


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").splitlines()[0]
