"""Spans of what changes, exported where vLLM exports those of requests: `--otlp-traces-endpoint`.

    alter.activate, alter.revoke   a change that this server was asked for, until it is recorded
    alter.switch                   one switch of this server's engine

vLLM sets the provider of the process up; these join it. Without the flag OpenTelemetry is not even imported.
Attributes are epochs, names, digests and figures, and an error is its kind: never a text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from alter_core.errors import AlterError, problem_kind

if TYPE_CHECKING:
    from opentelemetry.trace import Span as OpenTelemetrySpan
    from opentelemetry.trace import TracerProvider

Attribute = str | int | float | bool | None
PREFIX = "alter."


class Span(Protocol):
    """What is being traced."""

    def set(self, **attributes: Attribute) -> None:
        """Adds attributes, each under `alter.`; None is left out."""
        ...


class Tracing(Protocol):
    """Makes spans."""

    def span(self, name: str, **attributes: Attribute) -> AbstractContextManager[Span]:
        """A span `alter.NAME` around a block, below the current one; what the block raises marks it."""
        ...

    def continued(self, headers: Mapping[str, str]) -> AbstractContextManager[None]:
        """Spans of the block belong to the trace that a request's headers name, if they name one."""
        ...


class NoTracing:
    """Traces nothing."""

    def set(self, **attributes: Attribute) -> None:
        """See `Span`."""

    def span(self, name: str, **attributes: Attribute) -> AbstractContextManager[Span]:
        """See `Tracing`."""
        return contextlib.nullcontext(self)

    def continued(self, headers: Mapping[str, str]) -> AbstractContextManager[None]:
        """See `Tracing`."""
        return contextlib.nullcontext()


NO_TRACING = NoTracing()


class OpenTelemetryTracing:
    """Traces by OpenTelemetry."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        """`provider` None: that of the process."""
        from opentelemetry import trace

        self._tracer = trace.get_tracer("alter", tracer_provider=provider)

    @contextlib.contextmanager
    def span(self, name: str, **attributes: Attribute) -> Iterator[Span]:
        """See `Tracing`."""
        from opentelemetry.trace import StatusCode

        with self._tracer.start_as_current_span(
            PREFIX + name, record_exception=False, set_status_on_exception=False
        ) as started:
            span = _Span(started)
            span.set(**attributes)
            try:
                yield span
            except BaseException as error:
                kind = (
                    problem_kind(type(error))
                    if isinstance(error, AlterError)
                    else type(error).__name__
                )
                span.set(error=kind)
                started.set_status(StatusCode.ERROR, kind)
                raise

    @contextlib.contextmanager
    def continued(self, headers: Mapping[str, str]) -> Iterator[None]:
        """See `Tracing`."""
        from opentelemetry import context, propagate

        token = context.attach(propagate.extract(headers))
        try:
            yield
        finally:
            context.detach(token)


class _Span:
    def __init__(self, span: OpenTelemetrySpan) -> None:
        self._span = span

    def set(self, **attributes: Attribute) -> None:
        for name, value in attributes.items():
            if value is not None:
                self._span.set_attribute(PREFIX + name, value)


def open_tracing(endpoint: str | None) -> Tracing:
    """What vLLM's `--otlp-traces-endpoint` asks for; its engine client must have been made."""
    return NO_TRACING if endpoint is None else OpenTelemetryTracing()
