"""Spans for an OpenTelemetry collector (`--otlp-traces-endpoint`), by the GenAI conventions; ours are under `pd.`.

    chat MODEL            SERVER, under the client's own span when it sent one
    ├─ pd.queue, pd.read
    ├─ pd.prefill         CLIENT: the node's own span (vLLM: llm_request) hangs under it
    ├─ pd.decode          CLIENT, likewise; pd.aggregated where one node does both phases
    │  └─ pd.hand_off     until the first event
    ├─ pd.resume          a stream that lost its node; the legs that follow hang under it
    └─ pd.release

A leg of a further attempt is linked to those that failed before. The official SDK makes, samples and sends them, from a
thread of its own and as the OTEL_* variables say; vLLM takes the same. What it has no room for is dropped, and counted.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanContext, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from engines.openai.routes import CHAT, COMPLETIONS, MESSAGES, RESPONSES

from ...exchange.record import Record, Stage
from ...metrics import Metrics
from ...nodes.fleet import Fleet
from ...settings import ProxySettings
from . import PROPAGATED
from .export import processor

logger = logging.getLogger("pd_proxy.tracing")

_OPERATIONS = {
    CHAT.path: "chat", MESSAGES.path: "chat", RESPONSES.path: "chat", COMPLETIONS.path: "text_completion",
    "/v1/embeddings": "embeddings",
}  # fmt: skip
_LEGS = {"prefill": "pd.prefill", "hand-off": "pd.decode", "aggregated": "pd.aggregated"}
_NANOSECONDS = 1_000_000_000


class Tracing:
    """Of one worker process."""

    def __init__(self, settings: ProxySettings, endpoint: str, metrics: Metrics, fleet: Fleet) -> None:
        name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "pd-proxy"}
        self._fleet = fleet
        self._address = {"server.address": settings.host, "server.port": settings.port}
        self._provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=False)
        self._provider.add_span_processor(processor(endpoint, metrics))
        self._tracer = self._provider.get_tracer("pd-proxy")
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it repeats itself; what matters is said here
        logger.info("traces go to %s", endpoint)

    def follow(self, record: Record, headers: Sequence[tuple[bytes, bytes]]) -> "Trace":
        """The trace of a request; `headers`: its client's."""
        begun = {**self._address, "gen_ai.provider.name": self._fleet.engine.name}
        made = record.follower = Trace(self._tracer, record, headers, begun)
        return made

    def close(self, within_s: float) -> None:
        """Send what is left, for at most so long; a collector that never answers keeps nobody."""
        sending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        sending.start()
        sending.join(within_s)


class Trace:
    """The spans of one request, ended when it is over: what is told of a stage may be known after its end."""

    def __init__(
        self,
        tracer: Tracer,
        record: Record,
        headers: Sequence[tuple[bytes, bytes]],
        further: Mapping[str, Any],
    ) -> None:
        self._tracer = tracer
        self._record = record
        self._epoch = time.time_ns() - time.perf_counter_ns()
        told = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers if name in PROPAGATED}
        context = TraceContextTextMapPropagator().extract(told)
        self._operation = _OPERATIONS.get(record.route, record.route)
        begun = {"gen_ai.operation.name": self._operation, "url.path": record.route, **further}
        self._root: Span = tracer.start_span(
            self._operation, context, SpanKind.SERVER, begun, start_time=self._at(record.started)
        )
        self._spans: dict[Stage, Span] = {}
        self._legs: dict[str, Span] = {}
        """Of each part of the request: the span of the leg under way."""
        self._leg_of: dict[Stage, Span] = {}
        self._resumes: dict[str, Span] = {}
        self._lost: list[SpanContext] = []
        self._is_over = False

    # -- as a record has it

    def begun(self, stage: Stage) -> None:
        """One span; a decode leg has one of its own around the hand-off's."""
        if stage.name == "decode":
            self._leg_of[stage] = self._legs[stage.part]  # it goes on in its leg's
            return
        parent = self._resumes.get(stage.part, self._root)
        if stage.name in _LEGS:
            leg = self._started(_LEGS[stage.name], parent, stage, is_leg=True)
            self._legs[stage.part] = self._leg_of[stage] = leg
            leg.set_attribute("pd.node", stage.node)
            self._spans[stage] = self._started("pd.hand_off", leg, stage) if stage.name == "hand-off" else leg
            return
        span = self._spans[stage] = self._started(f"pd.{stage.name}", parent, stage)
        if stage.name == "resume":
            self._resumes[stage.part] = span

    def ended(self, stage: Stage) -> None:
        """Told when all is over."""
        if stage.problem and stage.name in _LEGS:
            self._lost.append(self._leg_of[stage].get_span_context())
        if self._is_over:
            self._end(stage)

    def headers(self, stage: Stage) -> list[tuple[bytes, bytes]]:
        """So that the node's span hangs under this leg's."""
        context = self._leg_of[stage].get_span_context()
        parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        state = context.trace_state.to_header()
        told = [(b"traceparent", parent.encode())]
        return [*told, (b"tracestate", state.encode("latin-1"))] if state else told

    # -- the end

    def finish(self) -> None:
        """Of the request; a release may go on."""
        self._is_over = True
        for stage in self._record.stages:
            if stage.ended:
                self._end(stage)
                stage.follower = None  # records are kept for a while, and need none of this
        for leg in self._leg_of.values():
            if leg.is_recording():  # its answer came whole
                leg.end(self._at(self._record.ended))
        self._record.follower = None
        record, root = self._record, self._root
        if root.is_recording():
            root.update_name(f"{self._operation} {record.model}".strip())
            root.set_attributes({name: value for name, value in self._told().items() if value not in (None, "", 0)})
            if record.status >= 500:
                root.set_status(StatusCode.ERROR, record.error)
        root.end(self._at(record.ended))

    def _told(self) -> dict[str, Any]:
        record = self._record
        cached = [stage.cached for stage in record.stages if stage.cached]
        failed = record.status >= 400
        return {
            "gen_ai.request.model": record.model,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": max(cached, default=0),
            "http.response.status_code": record.status,
            "error.type": str(record.status) if failed else None,
            "pd.request_id": record.request_id,
            "pd.path": record.path,
            "pd.reason": record.reason,
            "pd.attempts": record.attempts,
            "pd.retries": record.retries,
            "pd.resumed": record.resumed,
            "pd.transfer_id": record.transfer_id,
            "pd.time_to_first_event_s": record.first_event_s,
            "pd.key": record.key_name,
        }

    def _end(self, stage: Stage) -> None:
        ended = self._at(stage.ended)
        if stage.name == "decode":
            self._end_span(self._leg_of[stage], stage, ended)
            return
        span = self._spans.pop(stage, None)
        if span is None:
            return
        told: dict[str, Any] = {
            "pd.node": stage.node, "pd.attempt": stage.attempt, "pd.sequence": stage.part,
            "pd.body_bytes": stage.size or None,
            "pd.prompt_tokens": stage.tokens or None, "pd.cached_tokens.predicted": stage.predicted,
            "pd.cached_tokens.actual": stage.cached, "pd.kv": stage.kv,
        }  # fmt: skip
        span.set_attributes({name: value for name, value in told.items() if value not in (None, "")})
        leg = self._leg_of[stage] if stage.name in ("hand-off", "aggregated") else None
        if leg is not None and not stage.problem:
            leg.add_event("first event", timestamp=ended)
        if leg is not span:
            self._end_span(span, stage, ended)
        if leg is not None and stage.problem:
            self._end_span(leg, stage, ended)

    def _end_span(self, span: Span, stage: Stage, ended: int) -> None:
        if stage.problem:
            span.set_attribute("error.type", stage.problem)
            span.set_status(StatusCode.ERROR, stage.problem)
        span.end(ended)

    def _started(self, name: str, parent: Span, stage: Stage, *, is_leg: bool = False) -> Span:
        kind = SpanKind.CLIENT if is_leg else SpanKind.INTERNAL
        links = [trace.Link(context) for context in self._lost] if is_leg else []
        return self._tracer.start_span(
            name, trace.set_span_in_context(parent), kind, links=links, start_time=self._at(stage.began)
        )

    def _at(self, moment: float) -> int:
        """On the collector's clock, from one on the machine's monotonic clock."""
        return int(moment * _NANOSECONDS) + self._epoch
