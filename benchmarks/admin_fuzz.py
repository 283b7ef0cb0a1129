"""Requests made up by schemathesis from the OpenAPI description of `/admin`, valid ones and broken ones.

None may be answered by a 5xx; none may get in, or change anything, without a token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import unittest
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.schemas import APIOperation

TIMEOUT_S = 30.0
REFUSALS = (401, 403)


@dataclasses.dataclass(kw_only=True)
class FuzzReport:
    """What was sent, and what went wrong."""

    requests: int = 0
    operations: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    """Method, path and what was not as it should be; nothing of what was sent."""


def fuzz_admin(url: str, token: str, *, random_seed: int, max_examples: int) -> FuzzReport:
    """Sends `max_examples` valid and as many broken requests to each operation, with and without the token.

    `url`: of a server that may be changed at will. The same seed makes up the same requests.
    """
    report = FuzzReport()
    description = httpx.get(f"{url}/openapi.json", timeout=TIMEOUT_S).raise_for_status().json()
    schema = schemathesis.openapi.from_dict(description).include(path_regex="^/admin/")
    for found in schema.get_all_operations():
        report.operations += 1
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            _fuzz_operation(found.ok(), mode, url, token, random_seed, max_examples, report)
    return report


def _fuzz_operation(
    operation: APIOperation[Any, Any, Any],
    mode: GenerationMode,
    url: str,
    token: str,
    random_seed: int,
    max_examples: int,
    report: FuzzReport,
) -> None:
    def send(case: Case, headers: dict[str, str]) -> int:
        report.requests += 1
        status: int = case.call(base_url=url, headers=headers, timeout=TIMEOUT_S).status_code
        return status

    @seed(random_seed)
    @settings(
        max_examples=max_examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Case) -> None:
        name = f"{case.method} {operation.path}"
        if (status := send(case, {"Authorization": f"Bearer {token}"})) >= 500:
            report.failures.append(f"{name}: {status} with a token")
        before = _state(url, token)
        # An empty token is none: wrong ones would be counted, and then make everybody wait.
        if (status := send(case, {"Authorization": ""})) not in REFUSALS:
            report.failures.append(f"{name}: {status} without a token")
        if _state(url, token) != before:
            report.failures.append(f"{name}: changed something without a token")

    # An operation without parameters cannot be asked in a wrong way.
    with contextlib.suppress(Unsatisfiable, unittest.SkipTest):
        run()


def _state(url: str, token: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}"}
    answer = httpx.get(f"{url}/admin/forget-domains", headers=headers, timeout=TIMEOUT_S)
    state: dict[str, Any] = answer.raise_for_status().json()
    return state
