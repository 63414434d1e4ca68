"""The generation routes: what is decided on a request's head, its exchange, and what is told of it in the end.

The one place where an error becomes an HTTP answer.
"""

import asyncio
import logging
import math
import re
import time
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import orjson

from engines.base import new_id
from engines.openai.errors import error_body, error_event
from engines.openai.routes import HANDED_OFF

from ..downstream.request import ClientRequest
from ..errors import (
    BadRequestError,
    BodyTooLargeError,
    ClientGoneError,
    ClientStalledError,
    NodeError,
    ProxyError,
    ShuttingDownError,
    UnsupportedEncodingError,
)
from ..exchange.fanout import exchange_for
from ..exchange.keepalive import KeptAlive
from ..exchange.memory import MemoryBudget, Reservation
from ..exchange.plane import DataPlane, Request
from ..exchange.presence import Presence
from ..exchange.receive import Receiver
from ..exchange.record import CUT_SHORT, Record
from ..upstream.client import Headers
from . import logs
from .admission import Admission
from .guard import MESSAGE, keys_in
from .keys import KeyRing
from .recent import Recent
from .tracing import PROPAGATED

if TYPE_CHECKING:
    from .tracing.tracing import Tracing

logger = logging.getLogger("pd_proxy")

_LONGEST_NAME = 128
"""Of a model, as records tell it."""
_LOWEST_PRIORITY = 1000
_SAFE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_PASSED_TO_NODES = frozenset({b"traceparent", b"tracestate", b"x-session-id", b"x-vllm-priority"})
_JSON = (b"content-type", b"application/json")


class UnauthorizedError(ProxyError):
    """No known key."""

    status = 401
    kind = "AuthenticationError"
    source = "client"

    def __init__(self) -> None:
        super().__init__(MESSAGE)


class Endpoint:
    """A handler of `Service.post`: key, limits and admission first, on the head alone; body and media afterwards."""

    def __init__(  # noqa: PLR0913, PLR0917  what it is made of
        self,
        plane: DataPlane,
        keys: KeyRing,
        admission: Admission,
        receiver: Receiver,
        memory: MemoryBudget,
        node_headers: Headers,
        recent: Recent | None,
        tracing: "Tracing | None",
    ) -> None:
        self._plane = plane
        self._settings = plane.settings
        self._keys = keys
        self._admission = admission
        self._receiver = receiver
        self._memory = memory
        self._node_headers = node_headers
        self._recent = recent
        self._tracing = tracing
        self._passed_to_nodes = _PASSED_TO_NODES if tracing is None else _PASSED_TO_NODES - PROPAGATED
        self._refusals = logs.Refusals()

    def __call__(self, request: ClientRequest) -> Coroutine[Any, Any, None] | None:
        """Refuse it at once, or return what answers it."""
        record = Record(_request_id(request.header(b"x-request-id")), request.path)
        try:
            name = self._keys.name_of(*keys_in(request)) if self._keys.is_needed else ""
            if name is None:
                raise UnauthorizedError
            record.key_name = name
            self._check_head(request)
            timeout_s = _timeout_s(request.header(b"x-request-timeout"), self._settings.request_timeout_s)
            is_inside = self._admission.try_enter()
        except ProxyError as exc:
            self._refuse(request, record, exc)
            self._account(record)
            record.error = exc.for_the_log
            self._refusals.log(record)
            return None
        return self._serve(request, record, timeout_s, is_inside=is_inside)

    def _check_head(self, request: ClientRequest) -> None:
        """VLLM takes only `application/json`; so do we, and read no compressed bodies (nor does vLLM)."""
        content_type = request.header(b"content-type") or b"application/json"
        if content_type != b"application/json" and not _is_json(content_type):
            raise BadRequestError("Unsupported Media Type: Only 'application/json' is allowed")
        if (request.header(b"content-encoding") or b"identity").lower() != b"identity":
            raise UnsupportedEncodingError("a compressed request body is not read", "Send it without Content-Encoding")
        if (request.length or 0) > self._settings.max_body_bytes:
            raise BodyTooLargeError(f"the request body is larger than {self._settings.max_body_bytes} bytes")

    async def _serve(self, client: ClientRequest, record: Record, timeout_s: float, *, is_inside: bool) -> None:
        """From admission to the last byte, and what is told of it."""
        metrics = self._plane.metrics
        presence = Presence(timeout_s)
        client.on_gone = lambda: presence.end("client-left")
        late = asyncio.get_running_loop().call_later(timeout_s, self._answer_late, client, record, presence)
        metrics.in_flight += 1
        if self._recent is not None:
            self._recent.begun(record)
        trace = self._tracing.follow(record, client.headers) if self._tracing is not None else None
        try:
            await self._admitted(client, record, presence, timeout_s, is_inside=is_inside)
        except asyncio.CancelledError:
            record.error = self._cancelled(client, record, presence)
        except ClientGoneError:
            record.status = 499  # nobody hears it, the metrics tell it
        except ProxyError as exc:
            record.error = self._failed(client, record, presence, exc)
        except Exception as exc:
            logger.exception("request %s failed in the proxy itself", record.request_id)
            hint = f"Request {record.request_id}"
            self._refuse(client, record, ProxyError("the proxy failed; its log tells more", hint))
            record.error = repr(exc)
        finally:
            late.cancel()
            client.on_gone = None
            metrics.in_flight -= 1
            self._account(record)
            if self._recent is not None:
                self._recent.ended(record)
            if trace is not None:
                trace.finish()
            if record.error or self._settings.log_requests:
                logs.request(record)

    async def _admitted(
        self, client: ClientRequest, record: Record, presence: Presence, timeout_s: float, *, is_inside: bool
    ) -> None:
        if client.is_gone:
            if is_inside:
                self._admission.leave()
            raise ClientGoneError
        queue = record.begin("queue", since=record.started)
        if not is_inside:
            await self._admission.enter(self._turn_of(client, record), _priority(client), timeout_s)
        queue.end()
        try:
            with self._memory.reservation() as memory:
                request = await self._read(client, record, memory)
                with self._kept_alive(client, request, record) as answered:
                    await exchange_for(self._plane, request, answered, presence, record).run()
        finally:
            self._admission.leave()

    def _kept_alive(
        self, client: ClientRequest, request: Request, record: Record
    ) -> AbstractContextManager[ClientRequest | KeptAlive]:
        """Where the answer goes; of a stream, with comments until it begins, if that is wanted."""
        every_s = self._settings.sse_keep_alive_s
        if not every_s or request.asked.body.get("stream") is not True or client.is_1_0:
            return nullcontext(client)
        return KeptAlive(client, client.path, every_s, [(b"x-request-id", record.request_id.encode("latin-1"))])

    async def _read(self, client: ClientRequest, record: Record, memory: Reservation) -> Request:
        reading = record.begin("read")
        raw = await client.body(self._settings.max_body_bytes, memory)
        asked = await self._receiver.asked(client.path, raw, memory)
        reading.size = len(raw)
        reading.end()
        record.model = _model(asked.body.get("model"))
        headers = [
            _JSON,
            (b"x-request-id", record.request_id.encode("latin-1")),
            *self._node_headers,
            *(header for header in client.headers if header[0] in self._passed_to_nodes),
        ]
        return Request(client.path, asked, record.request_id, headers, memory)

    @staticmethod
    def _turn_of(client: ClientRequest, record: Record) -> str:
        """Whose turn it is when requests must wait: a key's; where there are none, a client address's."""
        if record.key_name:
            return record.key_name
        address = client.connection.client_address
        return address[0] if address else ""

    # -- how it ended

    def _answer_late(self, client: ClientRequest, record: Record, presence: Presence) -> None:
        """The request's own time is over: the client hears it now, whatever becomes of its legs."""
        if presence.gone is None:
            presence.end("late")
            error = presence.error()
            assert isinstance(error, ProxyError)  # noqa: S101  it is late
            self._refuse(client, record, error)

    def _cancelled(self, client: ClientRequest, record: Record, presence: Presence) -> str:
        """By a client that left, or a request that is late; else by the server, whose grace time is over."""
        if presence.is_cause_of_cancellation():
            error = presence.error()
            if isinstance(error, ProxyError):
                return self._failed(client, record, presence, error)
            record.status = 499
            return ""
        self._refuse(client, record, ShuttingDownError("the proxy is shutting down"))
        return "shutting down"

    def _failed(self, client: ClientRequest, record: Record, presence: Presence, error: ProxyError) -> str:
        if presence.gone == "client-left":
            record.status = 499
            return ""
        self._refuse(client, record, error)
        return error.for_the_log

    def _refuse(self, client: ClientRequest, record: Record, error: ProxyError) -> None:
        """The error to the client: as an answer, or, when one has begun, as a last event and an end that is none.

        Nothing when the client has been answered.
        """
        record.status = error.status
        record.ended = record.ended or time.perf_counter()
        if client.has_answer:
            return
        told = error_body(str(error), error.kind, error.status, error.param)
        if client.started:
            client.write(error_event(client.path, told))
            client.break_off(at_once=isinstance(error, ClientStalledError))
            return
        headers = [_JSON, (b"x-request-id", record.request_id.encode("latin-1"))]
        if error.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % math.ceil(error.retry_after_s)))
        elif isinstance(error, NodeError) and not error.may_be_retried:
            headers.append((b"x-should-retry", b"false"))  # OpenAI's clients obey it; else they retry every 5xx
        if isinstance(error, UnauthorizedError):
            headers.append((b"www-authenticate", b"Bearer"))
        client.answer(error.status, headers, orjson.dumps(told))

    def _account(self, record: Record) -> None:
        """The metrics, once for a request."""
        record.ended = record.ended or time.perf_counter()
        for stage in record.stages:
            if not stage.ended and stage.name != "release":  # that goes on by itself
                stage.end(CUT_SHORT)
        metrics, route, path = self._plane.metrics, record.route, record.path
        metrics.requests.count(route, path, str(record.status))
        metrics.request_seconds.observe(record.seconds, route, path)
        spent = record.spent()
        if "queue" in spent:
            metrics.queue_seconds.observe(spent["queue"])
        if record.path == "aggregated" and record.reason is not None:
            metrics.aggregated.count(record.reason)
        if record.first_event and record.status == 200 and route in HANDED_OFF:
            metrics.time_to_first_event_seconds.observe(record.first_event_s, route, path)
        if "prefill" in spent:
            metrics.prefill_seconds.observe(spent["prefill"])
        if "hand-off" in spent:
            metrics.hand_off_seconds.observe(spent["hand-off"])
        if record.prompt_tokens:
            metrics.prompt_tokens.count(path, by=record.prompt_tokens)
        if record.output_tokens:
            metrics.output_tokens.count(path, by=record.output_tokens)


def _model(named: object) -> str:
    return named[:_LONGEST_NAME] if isinstance(named, str) else ""


def _is_json(content_type: bytes) -> bool:
    return content_type.split(b";", 1)[0].strip().lower() == b"application/json"


def _priority(client: ClientRequest) -> int:
    """From vLLM's header, before the body is read; 0 when there is none, or none that is a number.

    A client may let others go first; before others it may not put itself.
    """
    try:
        return max(0, min(_LOWEST_PRIORITY, int(client.header(b"x-vllm-priority") or 0)))
    except ValueError:
        return 0


def _timeout_s(given: bytes | None, most_s: float) -> float:
    """The client's own limit for its request, never more than ours. Raises BadRequestError when it is no number."""
    if given is None:
        return most_s
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise BadRequestError("x-request-timeout is a number of seconds above 0")
    return min(seconds, most_s)


def _request_id(given: bytes | None) -> str:
    """The client's own id when it is harmless in a log and a header, else a new one."""
    if given is not None and _SAFE_REQUEST_ID.fullmatch(given):
        return given.decode("latin-1")
    return new_id()
