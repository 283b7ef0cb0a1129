"""An OTLP collector on the loopback interface that keeps what it is sent."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from .loopback import serving


class Collector:
    """What came, and where it is to be sent."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.bodies: list[bytes] = []

    @property
    def spans(self) -> list[Span]:
        """All spans so far."""
        requests = [ExportTraceServiceRequest.FromString(body) for body in list(self.bodies)]
        return [
            span
            for request in requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def wait_for(self, trace_id: str, names: set[str], timeout_s: float = 30) -> dict[str, Span]:
        """The spans of a trace by name, once those are there. Raises: TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = {s.name: s for s in self.spans if s.trace_id.hex() == trace_id}
            if names <= set(found):
                return found
            time.sleep(0.1)
        raise TimeoutError(f"{sorted(names)} did not come, but {sorted(found)} did")


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """Until the block ends; takes OTLP over HTTP."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as url:
        collector = Collector(f"{url}/v1/traces")
        yield collector
