"""The answer of a node on its way to the client: as it is, put together, or as a stream that may outlive its node."""

import time

import orjson

from engines.openai.collect import Collector, StreamError
from engines.openai.continuation import SentTokens
from engines.openai.routes import CHAT, Route

from ..errors import NodeBrokeOffError, NodeError
from ..upstream.client import Answer, Headers
from ..upstream.deadline import Deadline
from .filters import PassBytes, PassEvents, StreamFilter
from .leg import Leg, rules_for
from .plane import Client, DataPlane, Request
from .record import Record

JSON = (b"content-type", b"application/json")
_UNBUFFERED = (b"x-accel-buffering", b"no")
"""A front like nginx holds a stream back otherwise."""
_PASSED_TO_CLIENT = (b"content-type", b"retry-after")


class Delivery:
    """Writes to one client; the status and the headers are the same whichever way the answer comes."""

    __slots__ = ("_client", "_plane", "_record", "_request")

    def __init__(self, plane: DataPlane, request: Request, client: Client, record: Record) -> None:
        self._plane = plane
        self._request = request
        self._client = client
        self._record = record

    def pass_on(self, status: int, node_headers: Headers, body: bytes) -> None:
        """A whole answer."""
        self._record.status = status
        self._record.first_event = self._record.first_event or time.perf_counter()
        self._client.answer(status, self._headers(node_headers), body)

    async def relay(self, leg: Leg, answer: Answer, first: bytes, route: Route | None, sent: SentTokens | None) -> None:
        """A stream, bytes as they come. `sent`: what notes its tokens, if it could go on after a failure.

        Raises NodeError, noted, when the node does not finish it.
        """
        record, settings = self._record, self._plane.settings
        rules = rules_for(route.events if route else None, answer.headers)
        through: StreamFilter = PassBytes()
        if rules is not None:
            through = sent or PassEvents(rules)
        record.status = 200
        began = time.perf_counter()
        try:
            self._client.begin(200, [*self._headers(answer.headers), _UNBUFFERED], through.feed(first))
            self._request.forget_prompt()  # no other attempt can follow
            await self._client.relay(
                answer,
                through,
                silence_s=settings.decode_silence_timeout_s,
                stall_s=settings.client_stall_timeout_s,
            )
        except ValueError as exc:
            broken = NodeBrokeOffError(f"node {leg.node.spec.name} sent a stream that cannot be read")
            leg.note(broken)
            raise broken from exc
        except NodeError as exc:
            leg.note(exc)
            raise
        finally:
            if sent is not None:
                record.output_tokens += sent.tokens
                if sent.tokens > 1:
                    mean_s = (time.perf_counter() - began) / (sent.tokens - 1)
                    self._plane.metrics.mean_inter_token_seconds.observe(mean_s)
                    leg.node.live.measured(mean_s)

    async def collect(self, leg: Leg, answer: Answer, first: bytes, route: Route) -> None:
        """A stream, put together to the whole answer the client asked for. Raises NodeError, noted."""
        collector = Collector(chat=route is CHAT)
        silence_s = self._plane.settings.decode_silence_timeout_s
        name = leg.node.spec.name
        chunk = first
        try:
            while chunk:
                collector.feed(chunk)
                chunk = await answer.chunk(Deadline(silence_s, "send anything"))
            if not collector.is_whole:
                raise NodeBrokeOffError(f"node {name} ended its answer before its end")
        except StreamError as exc:
            failed = NodeError(f"node {name} failed in the middle of its answer", "Its own log tells why")
            leg.note(failed)
            raise failed from exc
        except ValueError as exc:
            unreadable = NodeError(f"node {name} sent a stream that cannot be read")
            leg.note(unreadable)
            raise unreadable from exc
        except NodeError as exc:
            leg.note(exc)
            raise
        whole = collector.answer()
        self._record.output_tokens = (whole["usage"] or {}).get("completion_tokens") or 0
        self.pass_on(200, [JSON], orjson.dumps(whole))

    def _headers(self, node_headers: Headers) -> Headers:
        record = self._record
        headers = [header for header in node_headers if header[0] in _PASSED_TO_CLIENT]
        headers += ((b"x-pd-path", record.path_header()), (b"x-request-id", record.request_id.encode("latin-1")))
        return headers
