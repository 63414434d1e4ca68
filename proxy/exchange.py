"""The life of one request.

split    the client's body becomes a prefill body and a decode body, or a reason for the aggregated path
choose   one decode node and one prefill node, leased for as long as their leg lasts
prefill  one token, awaited whole; it must have ended by length, or there is no KV to hand off
decode   status and first event awaited before the client gets a status line, then bytes as they come
account  leases back, hand-off used or released, metrics
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol

import orjson

from engines import openai
from engines.base import HandOff, JSONObject, PrefillRefusedError, Rank, Role
from engines.collect import Collector, StreamError
from engines.openai import Prefilled
from engines.routes import HANDED_OFF, Route

from .background import Background
from .config import ProxySettings
from .errors import (
    NodeBrokeOffError,
    NodeError,
    NodeRefusedError,
    NodeTimeoutError,
    NotServedError,
    ProxyError,
)
from .metrics import Metrics
from .pool import Node, Pool
from .release import Releaser
from .transport import Answer, Headers, NodeClients

_ERROR_EVENT = b'data: {"error"'
_PASSED_TO_CLIENT = (b"content-type", b"retry-after")
_JSON = (b"content-type", b"application/json")
_SEE_OFF_S = 5.0

Path = Literal["none", "disaggregated", "aggregated"]


class Client(Protocol):
    """Where the answer goes."""

    async def start(self, status: int, headers: Headers) -> None: ...

    async def write(self, chunk: bytes) -> None: ...

    async def relay(self, answer: Answer, silence_s: float) -> None: ...

    async def finish(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Request:
    """A client's request, read and parsed."""

    path: str
    body: JSONObject
    id: str
    headers: Headers
    """Those of the client's headers that the nodes get, the request id among them."""


@dataclass(frozen=True, slots=True)
class DataPlane:
    """What every exchange shares."""

    settings: ProxySettings
    pool: Pool
    clients: NodeClients
    metrics: Metrics
    releaser: Releaser
    background: Background


@dataclass(slots=True)
class Exchange:
    """One client request with its legs."""

    plane: DataPlane
    request: Request
    client: Client
    started: float = field(default_factory=time.perf_counter)
    path: Path = "none"
    reason: str | None = None
    status: int = 0
    _pinned: JSONObject | None = None
    """Parameters of a hand-off that a prefill node keeps KV for and no decode node has taken."""

    async def run(self) -> None:
        """Answer the client. Raises ProxyError; what a node answered, errors too, is passed on and is none."""
        route = HANDED_OFF.get(self.request.path)
        if route is None:
            await self._aggregated("route")
        elif reason := openai.aggregated_reason(self.request.body, self.plane.settings.min_prefill_tokens):
            await self._aggregated(reason)
        else:
            await self._disaggregated(route)

    async def _aggregated(self, reason: str) -> None:
        self.path, self.reason = "aggregated", reason
        self.plane.metrics.aggregated.labels(reason).inc()
        with self.plane.pool.choose(Role.DECODE).lease() as decode:
            async with self._opened(decode, self.request.body | {"kv_transfer_params": None}) as (answer, first):
                if answer.status == 404 and b'"error"' not in first:  # the node's server knows no such route
                    raise NotServedError(f"{self.request.path} is not served here")
                await self._relay(decode, answer, first)

    async def _disaggregated(self, route: Route) -> None:
        self.path = "disaggregated"
        with self.plane.pool.choose(Role.DECODE).lease() as decode:
            with self.plane.pool.choose(Role.PREFILL).lease() as prefill:
                rank = prefill.next_rank()
                hand_off = self.plane.pool.connector.hand_off(prefill.spec.bootstrap, rank)
                answer = await self._prefill(prefill, route, hand_off, rank)
            if answer.status != 200:
                await self._pass_on(answer)
                return
            try:
                prefilled = openai.prefilled(route, await answer.load())
                params = hand_off.decode_params(prefilled.answer)
            except PrefillRefusedError:
                await self._aggregated("prefill-stopped")
                return
            self._pinned = params if hand_off.pins_kv else None
            body = openai.decode_body(route, self.request.body, params, prefilled, stream=self._streams(route))
            await self._decode(decode, route, body, prefilled)

    # -- prefill

    async def _prefill(self, node: Node, route: Route, hand_off: HandOff, rank: Rank | None) -> Answer:
        """The node's answer, read whole.

        Of a client that leaves while its prefill is running nobody would know that KV is held afterwards: vLLM cannot
        interrupt a step, and the step that makes the one token ends the request by length before it hears of the
        abort. So such a leg is seen off, not cut off.
        """
        leg = self.plane.background.start(self._prefill_leg(node, route, hand_off, rank), "prefill leg")
        try:
            return await asyncio.shield(leg)
        except asyncio.CancelledError:
            self.plane.background.start(self._see_off(leg, route, hand_off), "abandoned prefill leg")
            raise

    async def _see_off(self, leg: "asyncio.Task[Answer]", route: Route, hand_off: HandOff) -> None:
        """Let an abandoned prefill end, and give its KV back. One that has not ended by then waits in the node's queue,
        or is long: there an abort comes in time, most likely, and spares the node the work.
        """
        await asyncio.wait({leg}, timeout=_SEE_OFF_S)
        if not leg.done():
            leg.cancel()
            return
        with suppress(ProxyError, PrefillRefusedError):
            answer = leg.result()
            if answer.status == 200:
                params = hand_off.decode_params(openai.prefilled(route, await answer.load()).answer)
                self._pinned = params if hand_off.pins_kv else None
                self._give_back()

    async def _prefill_leg(self, node: Node, route: Route, hand_off: HandOff, rank: Rank | None) -> Answer:
        started = time.perf_counter()
        headers = self.request.headers
        if rank is not None and rank.of > 1:
            headers = [*headers, (b"x-data-parallel-rank", str(rank.number).encode())]
        body = openai.prefill_body(route, self.request.body, hand_off.prefill_params())
        async with _deadline(self.plane.settings.prefill_timeout_s, f"prefill node {node.spec.name} did not finish"):
            answer = await self._send(node, body, headers)
            await answer.load()
        self.plane.metrics.prefill_seconds.observe(time.perf_counter() - started)
        return answer

    # -- decode

    def _streams(self, route: Route) -> bool:
        """Whether the decode leg is a stream: the client's own, or one collected here for a client that wants none.

        Tool calls are parsed by the node, and by another parser in a stream; a client that asked for a whole answer
        gets the one of the whole answer's parser.
        """
        body = self.request.body
        return bool(body.get("stream")) or (route.collects and not (body.get("tools") or body.get("functions")))

    async def _decode(self, node: Node, route: Route, body: JSONObject, prefilled: Prefilled) -> None:
        """The decode leg, and what becomes of the hand-off: used, or refused and given back, or lost with its leg."""
        outcome = "lost"
        try:
            if not body.get("stream"):
                await self._decode_whole(node, body)
            elif self.request.body.get("stream"):
                async with self._opened(node, body) as (answer, first):
                    await self._relay(node, answer, first)
            else:
                await self._collect(node, route, body)
            outcome = "used" if self.status == 200 else "refused"
        finally:
            self.plane.metrics.hand_offs.labels(outcome).inc()
        if outcome == "used":
            node.handed_over(prefilled.prompt_tokens)

    async def _decode_whole(self, node: Node, body: JSONObject) -> None:
        """A leg that is not a stream is never cut off, not even for a client that has left (see engines/collect.py)."""

        async def leg() -> Answer:
            limit_s, late = self.plane.settings.whole_answer_timeout_s, f"decode node {node.spec.name} did not finish"
            with node.lease():
                async with _deadline(limit_s, late):
                    answer = await self._hand_over(node, body)
                    await answer.load()
                return answer

        await self._pass_on(await asyncio.shield(self.plane.background.start(leg(), "whole decode leg")))

    async def _collect(self, node: Node, route: Route, body: JSONObject) -> None:
        """A stream, put together to the whole answer the client asked for."""
        collector = Collector(chat=route.forwards_ids_as == "kv_transfer_params")
        async with self._opened(node, body) as (answer, first):
            if answer.status != 200:
                await self._relay(node, answer, first)
                return
            try:
                async for chunk in self._chunks(node, answer, first):
                    collector.feed(chunk)
            except StreamError as exc:
                raise NodeError(f"decode node {node.spec.name} failed: {exc}") from exc
            except (ValueError, KeyError, TypeError) as exc:
                raise NodeError(f"decode node {node.spec.name} sent a stream that cannot be read") from exc
            if not collector.is_whole:
                raise NodeBrokeOffError(f"decode node {node.spec.name} ended its answer before its end")
        await self._start(200, [_JSON])
        await self.client.write(orjson.dumps(collector.answer()))
        await self.client.finish()

    @asynccontextmanager
    async def _opened(self, node: Node, body: JSONObject) -> AsyncIterator[tuple[Answer, bytes]]:
        """A decode leg whose status and first bytes have come. Closed at the end, whatever is unread.

        Raises NodeError when a stream begins with an error: vLLM has already said 200 to it.
        """
        limit_s, late = self.plane.settings.decode_start_timeout_s, f"decode node {node.spec.name} did not answer"
        answer: Answer | None = None
        try:
            async with _deadline(limit_s, late):
                answer = await self._hand_over(node, body)
                first = await answer.chunk()
            if answer.status == 200 and first.startswith(_ERROR_EVENT):
                raise self._failure_in(first, node)
            self.plane.metrics.first_event_seconds.observe(time.perf_counter() - self.started)
            yield answer, first
        finally:
            if answer is not None:
                answer.close()

    async def _hand_over(self, node: Node, body: JSONObject) -> Answer:
        """Send the decode leg. The hand-off is given back when no node has taken it.

        A node that has it and is cut off lets go by itself: vLLM's abort of a request frees its hand-off.
        """
        sent = False

        def note() -> None:
            nonlocal sent
            sent = True

        try:
            answer = await self._send(node, body, self.request.headers, note)
        except NodeError:
            self._give_back()
            raise
        except asyncio.CancelledError:
            if not sent:
                self._give_back()
            raise
        if answer.status != 200 and not openai.is_released_by_refusal(answer.status, _error_kind(await answer.load())):
            self._give_back()
        return answer

    def _failure_in(self, first: bytes, node: Node) -> ProxyError:
        """What a stream that begins with an error means; vLLM has already said 200 to it.

        A refusal made there is not followed by vLLM's rejection clean-up: the request never reached the engine, and
        the prefill node would keep its KV (seen on a live pair with `logprobs` above the limit).
        """
        error = _error_in(first)
        code = error.get("code")
        if isinstance(code, int) and 400 <= code < 500:
            self._give_back()
            return NodeRefusedError(code, error)
        return NodeError(f"decode node {node.spec.name} failed: {error.get('message', 'it began with an error')}")

    def _give_back(self) -> None:
        if self._pinned is not None:
            self.plane.releaser.release(self.request.body, self._pinned)
            self._pinned = None

    # -- both

    async def _relay(self, node: Node, answer: Answer, first: bytes) -> None:
        await self._start(answer.status, answer.headers)
        if first:
            await self.client.write(first)
        silence_s = self.plane.settings.decode_silence_timeout_s
        try:
            await self.client.relay(answer, silence_s)
        except TimeoutError as exc:
            raise NodeTimeoutError(f"decode node {node.spec.name} fell silent for {silence_s:g} s") from exc

    async def _chunks(self, node: Node, answer: Answer, first: bytes) -> AsyncIterator[bytes]:
        chunk = first
        silence = f"decode node {node.spec.name} fell silent"
        while chunk:
            yield chunk
            async with _deadline(self.plane.settings.decode_silence_timeout_s, silence):
                chunk = await answer.chunk()

    async def _send(
        self, node: Node, body: JSONObject, headers: Headers, on_sent: Callable[[], None] = lambda: None
    ) -> Answer:
        try:
            return await self.plane.clients.of(node).request(
                b"POST", self.request.path.encode(), headers, orjson.dumps(body), on_sent
            )
        except NodeError as exc:
            node.failed(str(exc))  # until the next probe finds it well
            raise

    async def _start(self, status: int, node_headers: Headers) -> None:
        headers = [header for header in node_headers if header[0] in _PASSED_TO_CLIENT]
        taken = self.path if self.reason is None else f"{self.path}; reason={self.reason}"
        headers += [(b"x-pd-path", taken.encode()), (b"x-request-id", self.request.id.encode("latin-1"))]
        self.status = status
        await self.client.start(status, headers)

    async def _pass_on(self, answer: Answer) -> None:
        await self._start(answer.status, answer.headers)
        await self.client.write(await answer.load())
        await self.client.finish()


def _error_kind(body: bytes) -> str:
    try:
        return str(orjson.loads(body)["error"]["type"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""


def _error_in(event: bytes) -> JSONObject:
    try:
        error = orjson.loads(event.split(b"\n", 1)[0].removeprefix(b"data: "))["error"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}


@asynccontextmanager
async def _deadline(seconds: float, what: str) -> AsyncIterator[None]:
    """Raises NodeTimeoutError when the time is over."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as exc:
        raise NodeTimeoutError(f"{what} in {seconds:g} s") from exc
