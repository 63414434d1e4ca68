"""Spans on their way to the collector: a queue of a bounded length, which a thread of the SDK's own empties."""

import logging
import os
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from ...metrics import Metrics

logger = logging.getLogger("pd_proxy.tracing")

_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_QUEUE = "OTEL_BSP_MAX_QUEUE_SIZE"
_USUAL_QUEUE = 2048


def processor(endpoint: str, metrics: Metrics) -> SpanProcessor:
    """For the collector there, by the protocol and with the limits that the OTEL_* variables give."""
    return _Bounded(_Counting(_exporter(endpoint), endpoint, metrics), metrics)


def _exporter(endpoint: str) -> SpanExporter:
    """By the protocol that vLLM would use with the same variables."""
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), "grpc")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGRPC  # noqa: PLC0415

        return OverGRPC(endpoint=endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHTTP  # noqa: PLC0415

    return OverHTTP(endpoint=endpoint)


class _Counting(SpanExporter):
    """Counts what becomes of spans; says once when the collector is lost, and once when it is there again."""

    def __init__(self, inner: SpanExporter, endpoint: str, metrics: Metrics) -> None:
        self._inner = inner
        self._endpoint = endpoint
        self._metrics = metrics
        self._is_lost = False
        self.done = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._inner.export(spans)
        except Exception as exc:  # noqa: BLE001  whatever it is, it concerns traces only
            logger.debug("spans were not exported: %r", exc)
            result = SpanExportResult.FAILURE
        is_lost = result is not SpanExportResult.SUCCESS
        if is_lost and not self._is_lost:
            logger.warning("the collector at %s takes no spans; requests go on without", self._endpoint)
        elif self._is_lost and not is_lost:
            logger.info("the collector at %s takes spans again", self._endpoint)
        self._is_lost = is_lost
        self._metrics.trace_spans.count("failed" if is_lost else "exported", by=len(spans))
        self.done += len(spans)
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._inner.force_flush(timeout_millis)


class _Bounded(SpanProcessor):
    """The SDK's own queue drops what it has no room for, and does not say how much; so it is never given that."""

    def __init__(self, exporter: _Counting, metrics: Metrics) -> None:
        self._exporter = exporter
        self._metrics = metrics
        self._room = int(os.environ.get(_QUEUE) or _USUAL_QUEUE)
        self._given = 0
        self._inner = BatchSpanProcessor(exporter, max_queue_size=self._room)

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is None or not span.context.trace_flags.sampled:
            return
        if self._given - self._exporter.done >= self._room:
            self._metrics.trace_spans.count("dropped")
            return
        self._given += 1
        self._inner.on_end(span)

    def shutdown(self) -> None:
        self._inner.shutdown()  # type: ignore[no-untyped-call]  # the SDK's

    def force_flush(self, timeout_millis: int | None = None) -> bool:
        return self._inner.force_flush(timeout_millis)
