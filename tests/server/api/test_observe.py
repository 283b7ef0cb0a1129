"""What an operator sees of a running server: metrics at a scrape, request ids, log records, spans."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from alter_core.errors import AuditError, RegistryUnavailableError, SwitchError
from server.audit import AuditLog, Cause
from server.engine.base import RoutedTokens
from server.logs import JsonFormatter
from server.metrics import AlterMetrics
from server.tracing import OpenTelemetryTracing
from tests.support.tiny import TinyBundles

from .conftest import AUTHORIZATION, Listening, Replica, Site, Stack
from .test_admin import URL, body

SECRET = "Basil Mahfouz was born in Kuwait"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def value(registry: CollectorRegistry) -> Callable[..., float | None]:
    def read(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"alter_{name}", labels)

    return read


def with_replica(site: Site, test: Any, registry: CollectorRegistry, **options: Any) -> None:
    async def run() -> None:
        server = site.replica(metrics=AlterMetrics(registry), **options)
        await server.parts.start({})
        try:
            await test(server)
        finally:
            await server.reconciler.stop()

    asyncio.run(run())


def test_a_scrape_finds_epochs_readiness_and_lease(
    site: Site, bundles: TinyBundles, registry: CollectorRegistry, value: Any
) -> None:
    async def test(server: Replica) -> None:
        await server.activate("a", bundles.experts["domain-0"])
        await server.parts.observe()
        assert (value("epoch"), value("epoch_desired")) == (1, 1)
        assert (value("ready"), value("engine_trusted"), value("registry_up")) == (1, 1, 1)
        assert value("lease_duration_seconds") == 10
        assert 5 < value("lease_remaining_seconds") <= 10
        assert value("registry_heartbeat_seconds_count") > 0
        assert value("canary_min_logit_change_nats") == 1.5
        assert value("canary_seconds") == 0.1
        assert value("switch_stage_seconds_sum") == pytest.approx(0.02)
        [info] = [m for m in registry.collect() if m.name == "alter_info"]
        assert info.samples[0].labels["substrate"] == site.substrate.digest
        server.expire_lease()
        await server.parts.observe()
        assert (value("ready"), value("lease_remaining_seconds")) == (0, 0)

    with_replica(site, test, registry)


def test_a_server_that_lags_says_so(
    site: Site, bundles: TinyBundles, registry: CollectorRegistry, value: Any
) -> None:
    async def test(server: Replica) -> None:
        server.engine.failure = SwitchError("no room")
        await server.activate("a", bundles.experts["domain-0"])
        await server.parts.observe()
        assert (value("epoch"), value("epoch_desired"), value("ready")) == (0, 1, 0)
        assert value("switch_failures_total") >= 1
        assert value("switch_seconds_count") == 0

    with_replica(site, test, registry)


def test_a_lost_trust_is_seen(site: Site, registry: CollectorRegistry, value: Any) -> None:
    async def test(server: Replica) -> None:
        server.engine.is_trusted = False
        await server.parts.observe()
        assert (value("engine_trusted"), value("ready")) == (0, 0)

    with_replica(site, test, registry)


def test_a_registry_that_does_not_answer_is_counted(
    site: Site, registry: CollectorRegistry, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unavailable = {"kind": "registry-unavailable"}

    async def test(server: Replica) -> None:
        assert value("registry_errors_total", **unavailable) == 0

        def fail(*_: object) -> None:
            raise RegistryUnavailableError("gone")

        monkeypatch.setattr(server.parts.registry, "heartbeat", fail)
        await server.until(lambda: not server.reconciler.is_registry_up)
        await server.parts.observe()
        assert value("registry_up") == 0
        assert value("registry_errors_total", **unavailable) >= 1

    with_replica(site, test, registry, lease_s=1.0)


def test_changes_are_counted_by_what_became_of_them(
    site: Site, bundles: TinyBundles, registry: CollectorRegistry, value: Any
) -> None:
    async def test(server: Replica) -> None:
        for index in (0, 0, 1):
            await server.activate("a", bundles.experts[f"domain-{index}"])
        await server.revoke("a")
        with pytest.raises(Exception, match="No active domain"):
            await server.revoke("a")

    with_replica(site, test, registry)
    counted = {
        (s.labels["action"], s.labels["outcome"]): s.value
        for metric in registry.collect()
        for s in metric.samples
        if s.name == "alter_operations_total" and s.value
    }
    assert counted == {
        ("activate", "created"): 1,
        ("activate", "unchanged"): 1,
        ("activate", "replaced"): 1,
        ("revoke", "revoked"): 1,
        ("revoke", "refused"): 1,
    }


def test_an_audit_log_that_cannot_be_written_is_counted_and_owes(
    site: Site, bundles: TinyBundles, registry: CollectorRegistry, value: Any, tmp_path: Path
) -> None:
    log = AuditLog.open(tmp_path / "audit.sqlite")

    async def test(server: Replica) -> None:
        await server.parts.observe()
        assert (value("audit_failures_total"), value("audit_records_owed")) == (0, 0)
        connection = sqlite3.connect(tmp_path / "audit.sqlite")
        connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON audit_records WHEN NEW.outcome = 'created' "
            "BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
        )
        connection.commit()
        with pytest.raises(AuditError):
            await server.activate("a", bundles.experts["domain-0"])
        await server.until(lambda: server.reconciler.applied == 1)
        await server.parts.observe()
        assert value("audit_failures_total") >= 1
        assert value("audit_records_owed") >= 1
        assert value("operations_total", action="activate", outcome="failed") == 1
        connection.execute("DROP TRIGGER full")
        connection.commit()
        connection.close()

    with_replica(site, test, registry, audit_log=log)


def test_every_series_of_an_alert_is_there_before_anything_has_happened(
    registry: CollectorRegistry, value: Any
) -> None:
    AlterMetrics(registry)
    assert value("switch_failures_total") == 0
    assert value("audit_failures_total") == 0
    for kind in ("registry-unavailable", "registry-mismatch"):
        assert value("registry_errors_total", kind=kind) == 0
    for how in ("refused", "cut"):
        assert value("denied_requests_total", how=how) == 0


def test_requests_that_may_not_generate_are_counted(listening: Listening) -> None:
    stack = listening.stack

    def denied(how: str) -> float:
        counter = stack.parts.metrics._denied_requests.labels(how=how)
        return float(counter._value.get())

    with httpx.stream("POST", f"{listening.url}/v1/stream", timeout=20) as response:
        listening.call(stack.steps[0].set)
        events = response.iter_bytes()
        assert next(events).startswith(b"data: 0")
        stack.engine.is_trusted = False
        assert httpx.post(f"{listening.url}/v1/wait").status_code == 503
        with pytest.raises(httpx.RemoteProtocolError):
            list(events)
    assert (denied("refused"), denied("cut")) == (1, 1)


def test_a_scrape_goes_on_while_the_engine_is_silent(
    site: Site, registry: CollectorRegistry, value: Any
) -> None:
    async def test(server: Replica) -> None:
        async def fail() -> list[RoutedTokens]:
            raise RuntimeError("gone")

        server.engine.routed_tokens = fail  # type: ignore[method-assign]
        await server.parts.observe()
        assert value("ready") == 1

    with_replica(site, test, registry)


@pytest.fixture
def logged() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Everything that is logged, as JSON."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    loggers = [logging.getLogger(name) for name in ("", "server")]
    kept = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel("DEBUG")
        logger.propagate = False
        logger.addHandler(handler)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    for logger, (level, propagate) in zip(loggers, kept, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def test_a_failed_request_is_logged_with_its_id_and_epoch(
    make_stack: Any, bundles: TinyBundles, logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        stack: Stack = await make_stack()
        await stack.activate("a", bundles.experts["domain-0"])
        monkeypatch.setattr(stack.parts.registry, "head", fail)
        async with stack.client(**{"x-request-id": "case-7"}) as client:
            response = await client.get("/admin/fleet")
        assert (response.status_code, response.headers["x-request-id"]) == (503, "case-7")
        await stack.reconciler.stop()

    def fail() -> int:
        raise RegistryUnavailableError("gone")

    asyncio.run(run())
    [record] = [r for r in logged() if r["message"].startswith("GET ")]
    assert (record["request_id"], record["epoch"]) == ("case-7", 1)


def test_a_switch_that_fails_is_logged_under_the_request_that_asked_for_it(
    site: Site, bundles: TinyBundles, logged: Any, tmp_path: Path
) -> None:
    log = AuditLog.open(tmp_path / "audit.sqlite")

    async def run() -> None:
        server = site.replica(audit_log=log)
        await server.parts.start({})
        connection = sqlite3.connect(tmp_path / "audit.sqlite")
        connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON audit_records WHEN NEW.action = 'apply' "
            "BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
        )
        connection.commit()
        connection.close()
        await server.activate("a", bundles.experts["domain-0"], cause=Cause(request_id="case-9"))
        await server.reconciler.stop()

    asyncio.run(run())
    [record] = [r for r in logged() if "is owed" in r["message"]]
    assert (record["request_id"], record["epoch"]) == ("case-9", 1)


def test_texts_of_requests_are_in_no_record_or_span(
    make_stack: Any, bundles: TinyBundles, logged: Any
) -> None:
    async def run() -> None:
        stack: Stack = await make_stack()
        async with stack.client() as client:
            assert (await client.post("/admin/trace", json={"text": SECRET})).status_code == 200
            answers = [
                await client.post(URL, json=body(bundles, 0, reason=SECRET)),
                await client.post(URL, json={"name": SECRET, "bundle": SECRET}),
                await client.delete(f"{URL}/{SECRET}"),
                await client.post("/admin/trace", json={"text": [SECRET]}),
                await client.post("/v1/other", json={"prompt": SECRET}),
            ]
        assert [answer.status_code for answer in answers] == [201, 422, 404, 422, 200]
        await stack.reconciler.stop()

    asyncio.run(run())
    for record in logged():
        if not record["logger"].startswith("httpx"):  # the client's own
            assert "Mahfouz" not in json.dumps(record)


@pytest.mark.parametrize(
    "given", [None, "case-12", "", "two words", "x" * 65, "-", "a" * 64, "ü", "a\tb"]
)
def test_one_id_is_taken_over_or_made_for_everybody(make_stack: Any, given: str | None) -> None:
    is_plain = given in ("case-12", "-", "a" * 64)

    async def run() -> None:
        stack: Stack = await make_stack()
        seen: list[list[str]] = []

        class Inner:
            """As a middleware that vLLM adds after ours."""

            def __init__(self, app: Any) -> None:
                self._app = app

            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                if scope["type"] == "http":
                    headers = scope["headers"]
                    seen.append([v.decode() for n, v in headers if n == b"x-request-id"])
                await self._app(scope, receive, send)

        stack.app.add_middleware(Inner)
        async with stack.client() as client:
            headers = {} if given is None else {"x-request-id": given.encode()}
            answer = await client.get("/admin/status", headers=headers)  # type: ignore[arg-type]
            await client.get("/v1/models", headers=headers)  # type: ignore[arg-type]
        [[first], [second]] = seen
        assert answer.headers["x-request-id"] == first
        if is_plain:
            assert first == second == given
        else:
            assert first != second
            assert len(first) == len(second) == 36
        await stack.reconciler.stop()

    asyncio.run(run())


def test_two_ids_are_none(make_stack: Any) -> None:
    async def run() -> None:
        stack: Stack = await make_stack()
        async with stack.client() as client:
            headers = [*AUTHORIZATION.items(), ("x-request-id", "a"), ("x-request-id", "b")]
            answer = await client.get("/admin/status", headers=headers)
        assert answer.headers["x-request-id"] not in ("a", "b")
        await stack.reconciler.stop()

    asyncio.run(run())


def test_changes_and_switches_are_spans(
    site: Site, bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def run() -> str:
        server = site.replica(tracing=OpenTelemetryTracing(provider))
        await server.parts.start({})
        cause = Cause(actor="alice", request_id="case-3", reason=SECRET)
        done = await server.activate("a", bundles.experts["domain-0"], cause=cause)
        server.engine.failure = SwitchError(SECRET)
        await server.revoke("a", cause=cause)
        await server.reconciler.stop()
        return str(done.change.bundle_digest)

    digest = asyncio.run(run())
    spans: dict[tuple[str, object], ReadableSpan] = {}
    for span in exporter.get_finished_spans():  # a failed switch is tried again
        spans.setdefault((span.name, (span.attributes or {}).get("alter.epoch")), span)
    common = {"alter.request_id": "case-3", "alter.domain": "a"}
    asked = common | {"alter.epoch": 1, "alter.digest": digest, "alter.outcome": "created"}
    assert dict(spans["alter.activate", 1].attributes or {}) == asked
    switched = common | {
        "alter.epoch": 1,
        "alter.digest": digest,
        "alter.slot": 0,
        "alter.stage_s": 0.02,
        "alter.pause_s": 0.03,
        "alter.kept_requests": 5,
        "alter.recomputed_requests": 2,
        "alter.recomputed_tokens": 130,
    }
    assert dict(spans["alter.switch", 1].attributes or {}) == switched
    failed = spans["alter.switch", 2]
    assert dict(failed.attributes or {}) == common | {
        "alter.epoch": 2,
        "alter.slot": 0,
        "alter.error": "switch",
    }
    for span in spans.values():
        assert SECRET not in span.to_json()


def test_a_change_belongs_to_the_trace_of_who_asked_for_it(
    make_stack: Any, bundles: TinyBundles
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    given = "0af7651916cd43dd8448eb211c80319c"

    async def run() -> None:
        stack: Stack = await make_stack(tracing=OpenTelemetryTracing(provider))
        async with stack.client(traceparent=f"00-{given}-b7ad6b7169203331-01") as client:
            answer = await client.post(URL, json=body(bundles, 0))
        assert answer.status_code == 201
        await stack.reconciler.stop()

    asyncio.run(run())
    [asked] = [s for s in exporter.get_finished_spans() if s.name == "alter.activate"]
    assert asked.context is not None
    assert format(asked.context.trace_id, "032x") == given
