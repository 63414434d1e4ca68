"""The life of one request.

split    the client's body becomes a prefill body and a decode body, or a reason for the aggregated path
choose   one decode node and one prefill node, leased for as long as their leg lasts
prefill  one token, awaited whole; it must have ended by length, or there is no KV to hand off
decode   status and first event awaited before the client gets a status line, then bytes as they come
account  leases back, hand-off settled, metrics
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import orjson

from engines import openai
from engines.base import JSONObject, Role
from engines.mooncake import HandOff

from .config import ProxySettings
from .errors import NodeError, NodeTimeoutError
from .metrics import Metrics
from .pool import Node, Pool
from .transport import Answer, Headers, NodeClient

_ERROR_EVENT = b'data: {"error"'
_PASSED_TO_CLIENT = (b"content-type", b"retry-after")


class Client(Protocol):
    """Where the answer goes."""

    async def start(self, status: int, headers: Headers) -> None: ...

    async def write(self, chunk: bytes) -> None: ...

    async def finish(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Request:
    """A client's request, read and parsed."""

    path: str
    body: JSONObject
    id: str


class NodeClients:
    """The HTTP client of each node, made when first needed and closed when its node has gone."""

    def __init__(self, pool: Pool, connect_timeout_s: float) -> None:
        self._pool = pool
        self._connect_timeout_s = connect_timeout_s
        self._clients: dict[Node, NodeClient] = {}

    def of(self, node: Node) -> NodeClient:
        client = self._clients.get(node)
        if client is None:
            self._forget_the_gone()
            client = NodeClient(node.spec.name, node.spec.url, self._connect_timeout_s)
            self._clients[node] = client
        return client

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def _forget_the_gone(self) -> None:
        for node in self._clients.keys() - set(self._pool):
            if not node.in_flight:
                self._clients.pop(node).close()


@dataclass(frozen=True, slots=True)
class DataPlane:
    """What every exchange shares."""

    settings: ProxySettings
    pool: Pool
    clients: NodeClients
    metrics: Metrics


@dataclass(slots=True)
class Exchange:
    """One client request with its legs."""

    plane: DataPlane
    request: Request
    client: Client
    started: float = field(default_factory=time.perf_counter)
    path: Literal["none", "disaggregated", "aggregated"] = "none"
    reason: str | None = None
    status: int = 0

    async def run(self) -> None:
        """Answer the client. Raises ProxyError; what a node answered, errors too, is passed on and is none."""
        self.reason = openai.aggregated_reason(self.request.body)
        if self.reason is not None:
            await self._aggregated()
        else:
            await self._disaggregated()

    async def _aggregated(self) -> None:
        self.path = "aggregated"
        with self.plane.pool.choose(Role.DECODE).lease() as decode:
            await self._decode(decode, {**self.request.body, "kv_transfer_params": None})

    async def _disaggregated(self) -> None:
        self.path = "disaggregated"
        with self.plane.pool.choose(Role.DECODE).lease() as decode:
            with self.plane.pool.choose(Role.PREFILL).lease() as prefill:
                hand_off = prefill.hand_off()
                prefilled = await self._prefill(prefill, hand_off)
            if prefilled is None:
                return
            body = openai.decode_body(self.request.body, hand_off.decode_params(), prefilled)
            await self._settle(self._decode(decode, body), prefilled)

    async def _settle(self, decode_leg: Awaitable[None], prefilled: openai.Prefilled) -> None:
        """Count what becomes of a hand-off: used, refused by the decode node, or lost with its leg."""
        outcome = "lost"
        try:
            await decode_leg
            outcome = "used" if self.status == 200 else "refused"
        finally:
            self.plane.metrics.hand_offs.labels(outcome).inc()
        if outcome == "used":
            self.plane.metrics.hand_off_tokens.inc(prefilled.prompt_tokens)

    async def _prefill(self, node: Node, hand_off: HandOff) -> openai.Prefilled | None:
        """None when the node refused the request: its answer has gone to the client."""
        started = time.perf_counter()
        body = openai.prefill_body(self.request.body, hand_off.prefill_params())
        async with _deadline(self.plane.settings.prefill_timeout_s, f"prefill node {node.spec.name} did not finish"):
            answer = await self._send(node, body)
            raw = await answer.body()
        if answer.status != 200:
            await self._pass_on(answer, raw)
            return None
        try:
            prefilled = openai.prefilled(orjson.loads(raw))
        except (openai.PrefillRefusedError, orjson.JSONDecodeError) as exc:
            raise NodeError(f"prefill node {node.spec.name}: {exc}") from exc
        self.plane.metrics.prefill_seconds.observe(time.perf_counter() - started)
        return prefilled

    async def _decode(self, node: Node, body: JSONObject) -> None:
        settings = self.plane.settings
        silence = f"decode node {node.spec.name} did not answer"
        async with _deadline(settings.decode_start_timeout_s, silence):
            answer = await self._send(node, body)
            first = await answer.chunk()
        try:
            if answer.status == 200 and first.startswith(_ERROR_EVENT):
                # vLLM has already said 200 to an answer that failed before it began; the client hears it as it is.
                raise NodeError(f"decode node {node.spec.name} failed: {_message_of(first)}")
            self.plane.metrics.first_event_seconds.observe(time.perf_counter() - self.started)
            await self._start(answer)
            await self._relay(node, answer, first)
        finally:
            answer.close()

    async def _relay(self, node: Node, answer: Answer, first: bytes) -> None:
        chunk = first
        silence = f"decode node {node.spec.name} fell silent"
        while chunk:
            await self.client.write(chunk)
            async with _deadline(self.plane.settings.decode_silence_timeout_s, silence):
                chunk = await answer.chunk()
        await self.client.finish()

    async def _send(self, node: Node, body: JSONObject) -> Answer:
        headers = [(b"content-type", b"application/json"), (b"x-request-id", self.request.id.encode("latin-1"))]
        raw = orjson.dumps(body)
        try:
            return await self.plane.clients.of(node).request(b"POST", self.request.path.encode(), headers, raw)
        except NodeError as exc:
            node.failed(str(exc))  # until the next probe finds it well
            raise

    async def _start(self, answer: Answer) -> None:
        headers = [header for header in answer.headers if header[0] in _PASSED_TO_CLIENT]
        taken = self.path if self.reason is None else f"{self.path}; reason={self.reason}"
        headers += [(b"x-pd-path", taken.encode()), (b"x-request-id", self.request.id.encode("latin-1"))]
        self.status = answer.status
        await self.client.start(answer.status, headers)

    async def _pass_on(self, answer: Answer, raw: bytes) -> None:
        await self._start(answer)
        await self.client.write(raw)
        await self.client.finish()


def _message_of(event: bytes) -> str:
    try:
        return str(orjson.loads(event.split(b"\n", 1)[0].removeprefix(b"data: "))["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return "it began its answer with an error"


@asynccontextmanager
async def _deadline(seconds: float, what: str) -> AsyncIterator[None]:
    """Raises NodeTimeoutError when the time is over."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as exc:
        raise NodeTimeoutError(f"{what} in {seconds:g} s") from exc
