"""A small OpenTelemetry collector: it keeps the spans it is sent (OTLP over HTTP, protobuf), or fails on purpose."""

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.processes import wait_until

HTTP = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"}
"""Environment of whoever sends spans here."""


@dataclass(frozen=True)
class Span:
    """As it came."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    kind: int
    began: int
    ended: int
    """Nanoseconds since 1970."""
    attributes: dict[str, Any]
    failed: bool
    links: tuple[str, ...] = ()
    events: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return (self.ended - self.began) / 1e9


@dataclass
class Sink:
    """What has come so far."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    status: int = 200
    """What it answers from now on."""
    silent: bool = False
    """It answers nothing at all."""
    asked: int = 0

    def of(self, trace: str) -> list[Span]:
        return [span for span in self.spans if span.trace == trace]

    def root(self, request_id: str) -> Span:
        """The proxy's own of a request, waited for."""

        def found() -> Span | None:
            return next((span for span in self.spans if span.attributes.get("pd.request_id") == request_id), None)

        span: Span = wait_until(found, f"the trace of {request_id}")
        return span

    def children(self, parent: Span) -> list[Span]:
        """In the order in which they began."""
        return sorted((span for span in self.spans if span.parent == parent.id), key=lambda span: span.began)


@contextmanager
def collector() -> Iterator[Sink]:
    sink = Sink()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            sink.asked += 1
            while sink.silent:
                time.sleep(0.1)
            if sink.status == 200:
                _take(sink, gzip.decompress(raw) if self.headers.get("content-encoding") == "gzip" else raw)
            body = ExportTraceServiceResponse().SerializeToString()
            self.send_response(sink.status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    sink.url = f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield sink
    finally:
        sink.silent = False
        server.shutdown()
        server.server_close()


def _take(sink: Sink, raw: bytes) -> None:
    for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
        service = _attributes(resource.resource.attributes).get("service.name", "")
        for scope in resource.scope_spans:
            for span in scope.spans:
                sink.spans.append(
                    Span(
                        service, span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(),
                        span.kind, span.start_time_unix_nano, span.end_time_unix_nano, _attributes(span.attributes),
                        span.status.code == 2, tuple(link.span_id.hex() for link in span.links),
                        tuple(event.name for event in span.events),
                    )
                )  # fmt: skip


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in pairs}
