"""Spans of changes and switches; and nothing at all without the flag."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from alter_core.errors import SwitchError
from server.tracing import NO_TRACING, OpenTelemetryTracing, open_tracing


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> OpenTelemetryTracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return OpenTelemetryTracing(provider)


def test_a_span_has_what_is_known_of_it(
    tracing: OpenTelemetryTracing, exporter: InMemorySpanExporter
) -> None:
    with tracing.span("switch", domain="a", digest=None) as span:
        span.set(epoch=3, pause_s=0.03)
    [done] = exporter.get_finished_spans()
    assert done.name == "alter.switch"
    assert dict(done.attributes or {}) == {
        "alter.domain": "a",
        "alter.epoch": 3,
        "alter.pause_s": 0.03,
    }
    assert done.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SwitchError("says what is to be forgotten", got="that too"), "switch"),
        (RuntimeError("says it"), "RuntimeError"),
        (asyncio.CancelledError(), "CancelledError"),
    ],
)
def test_an_error_is_its_kind_and_not_its_text(
    tracing: OpenTelemetryTracing,
    exporter: InMemorySpanExporter,
    error: BaseException,
    kind: str,
) -> None:
    with pytest.raises(type(error)), tracing.span("switch"):
        raise error
    [done] = exporter.get_finished_spans()
    assert (done.status.status_code, done.status.description) == (StatusCode.ERROR, kind)
    assert dict(done.attributes or {}) == {"alter.error": kind}
    assert list(done.events) == []


def trace_ids(spans: tuple[ReadableSpan, ...]) -> list[str]:
    return [format(span.context.trace_id, "032x") for span in spans if span.context]


def test_a_caller_s_trace_is_continued_and_another_one_is_not(
    tracing: OpenTelemetryTracing, exporter: InMemorySpanExporter
) -> None:
    given = "0af7651916cd43dd8448eb211c80319c"
    for headers in ({"traceparent": f"00-{given}-b7ad6b7169203331-01"}, {}, {"traceparent": "?"}):
        with tracing.continued(headers), tracing.span("activate"):
            pass
    first, second, third = trace_ids(exporter.get_finished_spans())
    assert first == given
    assert given not in (second, third)


def test_without_an_endpoint_nothing_is_traced_or_imported() -> None:
    program = """
import sys
from server.tracing import NO_TRACING, open_tracing
tracing = open_tracing(None)
assert tracing is NO_TRACING
with tracing.continued({"traceparent": "x"}), tracing.span("switch", epoch=1) as span:
    span.set(epoch=2)
print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_an_endpoint_takes_the_provider_of_the_process(
    exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # As vLLM's `init_tracer` sets it; it can be set but once.
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
    tracing: Any = open_tracing("http://collector:4317")
    assert tracing is not NO_TRACING
    with tracing.span("switch"):
        pass
    assert [span.name for span in exporter.get_finished_spans()] == ["alter.switch"]
