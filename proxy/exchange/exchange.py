"""The life of one request.

split    the client's body becomes a prefill body and a decode body, or a reason for the aggregated path
choose   one decode node and one prefill node, leased for as long as their leg lasts
prefill  one token, awaited whole; it must have ended by length, or there is no KV to hand off
decode   status and first event awaited before the client gets a status line, then bytes as they come
again    a node that fails before the client has seen a byte costs an attempt, not the request: other nodes, a new
         prefill, a new hand-off
account  leases back, hand-off used or released, metrics
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import orjson

from engines.base import HandOff, JSONObject, PrefillRefusedError, Rank, Role
from engines.openai import continuation
from engines.openai.collect import Collector, StreamError
from engines.openai.continuation import ERROR_EVENT, SentTokens
from engines.openai.routes import COMPLETIONS, HANDED_OFF, Route
from engines.vllm import bodies
from engines.vllm.bodies import Prefilled

from ..errors import (
    ClientGoneError,
    LateError,
    NodeAnsweredError,
    NodeBrokeOffError,
    NodeError,
    NodeRefusedError,
    NodeTimeoutError,
    NoNodeError,
    NotServedError,
    ProxyError,
)
from ..nodes.fleet import Node, Pool
from ..serving.admission import Admission
from ..serving.metrics import Metrics
from ..settings import ProxySettings
from ..upstream.client import Answer, Deadline, Headers, NodeClients
from . import retry
from .filters import AsItIs, Through
from .release import Releaser
from .resume import CannotContinueError, Continued

logger = logging.getLogger("pd_proxy")

_PASSED_TO_CLIENT = (b"content-type", b"retry-after")
_JSON = (b"content-type", b"application/json")
_SEE_OFF_S = 5.0

Path = Literal["none", "disaggregated", "aggregated"]


class Client(Protocol):
    """Where the answer goes."""

    @property
    def is_gone(self) -> bool: ...

    @property
    def started(self) -> bool: ...

    def answer(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None: ...

    def begin(self, status: int, headers: Iterable[tuple[bytes, bytes]], first: bytes) -> None: ...

    async def relay(
        self, answer: Answer, deadline: Deadline, through: Through, *, silence_s: float, stall_s: float
    ) -> None: ...

    def write(self, chunk: bytes) -> None: ...

    async def drained(self, stall_s: float) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Request:
    """A client's request, read and parsed."""

    path: str
    body: JSONObject
    id: str
    headers: Headers
    """Those of the client's headers that the nodes get, the request id among them."""
    timeout_s: float
    """For all of it, queue and attempts included."""
    client: bytes = b""
    """Whose it is: each client gets its turn when requests must wait."""
    priority: int = 0
    """A lower one goes first."""


@dataclass(frozen=True, slots=True)
class DataPlane:
    """What every exchange shares."""

    settings: ProxySettings
    pool: Pool
    clients: NodeClients
    metrics: Metrics
    releaser: Releaser
    admission: Admission
    budget: retry.RetryBudget


class Exchange:
    """One client request with its legs."""

    def __init__(self, plane: DataPlane, request: Request, client: Client) -> None:
        self.path: Path = "none"
        self.reason: str | None = None
        self.status = 0
        self.nodes: list[str] = []
        """Names of the nodes that were asked, in order."""
        self._plane = plane
        self._request = request
        self._client = client
        self._started = time.perf_counter()
        self._deadline = Deadline(request.timeout_s, "finish the request")
        self._failed: set[Node] = set()
        self._failing: Node | None = None
        self._continues = 0
        self._pinned: JSONObject | None = None  # of a hand-off that no decode node has taken
        self._is_handed_over = False
        self._leave: Callable[[], object] = lambda: None

    async def run(self) -> None:
        """Answer the client. Raises ProxyError, ClientGoneError; what a node answered, errors too, is passed on."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  uvicorn runs every request in one
        self._leave = task.cancel
        admission, request = self._plane.admission, self._request
        await admission.enter(request.client, request.priority, request.timeout_s)
        try:
            await self._attempts()
        finally:
            admission.leave()

    async def _attempts(self) -> None:
        self._plane.budget.deposit()
        route = HANDED_OFF.get(self._request.path)
        min_tokens = self._plane.settings.min_prefill_tokens
        reason = "route" if route is None else bodies.aggregated_reason(self._request.body, min_tokens)
        failure: NodeError | None = None
        for attempt in range(1, retry.MOST_ATTEMPTS + 1):
            try:
                with self._plane.pool.choose(Role.DECODE, self._failed).lease() as decode:
                    if route is None or reason is not None:
                        await self._aggregated(decode, reason or "route")
                    else:
                        await self._disaggregated(decode, route)
            except NodeError as exc:
                if not self._may_retry(exc, attempt):
                    raise
                failure = exc
                self._plane.metrics.retries.count(retry.reason(exc))
            except NoNodeError:
                if failure is None:
                    raise
                raise failure from None
            else:
                return

    def client_left(self) -> None:
        """The client closed its connection. Cuts off what may be cut off; what may not is let end."""
        self._leave()

    def _may_retry(self, error: NodeError, attempt: int) -> bool:
        if self._client.started or self._client.is_gone or not error.may_be_retried:
            return False
        if attempt == retry.MOST_ATTEMPTS or not self._somebody_else_can(error):
            return False
        return self._plane.budget.withdraw()

    def _somebody_else_can(self, error: NodeError) -> bool:
        """A node that answers that it cannot is not asked again for the same; one that broke off may be."""
        if not isinstance(error, NodeAnsweredError) or self._failing is None:
            return True
        role = self._failing.spec.role
        if any(node.usable and node not in self._failed for node in self._plane.pool.of(role)):
            return True
        asked_to_wait = error.retry_after_s is not None
        return role is Role.PREFILL and not asked_to_wait and self._plane.settings.without_prefill == "aggregated"

    async def _aggregated(self, decode: Node, reason: str) -> None:
        self.path, self.reason = "aggregated", reason
        self._plane.metrics.aggregated.count(reason)
        answer, first = await self._open(decode, self._request.body | {"kv_transfer_params": None})
        sent = SentTokens(hide=False) if self._continues else None  # a continuation looks into every event
        try:
            if answer.status == 404 and b'"error"' not in first:  # the node's server knows no such route
                raise NotServedError(f"{self._request.path} is not served here")
            await self._relay(decode, answer, first, None, sent)
        finally:
            answer.close()

    async def _disaggregated(self, decode: Node, route: Route) -> None:
        self.path, self.reason = "disaggregated", None
        self._pinned, self._is_handed_over = None, False
        chosen = self._choose_prefill()
        if chosen is None:
            await self._aggregated(decode, "no-prefill")
            return
        with chosen.lease() as prefill:
            rank = prefill.next_rank()
            hand_off = self._plane.pool.connector.hand_off(prefill.spec.bootstrap, rank)
            answer = await self._prefill(prefill, route, hand_off, rank)
        raw = await answer.load()
        if answer.status != 200:
            self._pass_on(answer.status, answer.headers, raw)
            return
        try:
            prefilled = bodies.prefilled(route, raw)
            params = hand_off.decode_params(prefilled.answer)
        except PrefillRefusedError:
            await self._aggregated(decode, "prefill-stopped")
            return
        del answer, raw  # a stream may last, and there may be thousands
        self._pinned = params if hand_off.pins_kv else None
        if self._client.is_gone:
            self._give_back()
            raise ClientGoneError
        try:
            body = bodies.decode_body(route, self._request.body, params, prefilled, stream=self._streams(route))
            await self._decode(decode, route, body, prefilled)
        finally:
            if not self._is_handed_over:
                self._give_back()

    # -- prefill

    def _choose_prefill(self) -> Node | None:
        """None when decode nodes must do without. Raises NoNodeError when they shall not."""
        may_do_without = self._plane.settings.without_prefill == "aggregated"
        try:
            node = self._plane.pool.choose(Role.PREFILL, self._failed)
        except NoNodeError:
            if not may_do_without:
                raise
            return None
        return None if may_do_without and node in self._failed else node

    async def _prefill(self, node: Node, route: Route, hand_off: HandOff, rank: Rank | None) -> Answer:
        """The node's answer, read whole.

        Of a client that leaves while its prefill is running nobody would know that KV is held afterwards: vLLM cannot
        interrupt a step, and the step that makes the one token ends the request by length before it hears of the
        abort. So such a leg is let end. One that has not ended soon waits in the node's queue, or is long: there an
        abort comes in time, most likely, and spares the node the work.
        """
        headers = self._request.headers
        if rank is not None and rank.of > 1:
            headers = [*headers, (b"x-data-parallel-rank", str(rank.number).encode())]
        body = bodies.prefill_body(route, self._request.body, hand_off.prefill_params())
        deadline = self._until(self._plane.settings.prefill_timeout_s, "finish its prefill")
        started = time.perf_counter()
        cut, self._leave = self._leave, lambda: deadline.within(_SEE_OFF_S)
        try:
            answer = await self._send(node, body, headers, deadline)
            await self._load(node, answer)
        except NodeError as exc:
            if self._client.is_gone:
                raise ClientGoneError from None
            if isinstance(exc, NodeTimeoutError):
                exc.may_be_retried = False  # another node would need as long
            raise
        finally:
            self._leave = cut
        if answer.status == 200:
            node.breaker.succeeded()
        self._plane.metrics.prefill_seconds.observe(time.perf_counter() - started)
        return answer

    # -- decode

    def _streams(self, route: Route) -> bool:
        """Whether the decode leg is a stream: the client's own, or one collected here for a client that wants none.

        Tool calls are parsed by the node, and by another parser in a stream; a client that asked for a whole answer
        gets the one of the whole answer's parser.
        """
        body = self._request.body
        return bool(body.get("stream")) or (route.collects and not (body.get("tools") or body.get("functions")))

    async def _decode(self, node: Node, route: Route, body: JSONObject, prefilled: Prefilled) -> None:
        """The decode leg, and what becomes of the hand-off: used, or refused and given back, or lost with its leg."""
        outcome = "lost"
        sent = self._watched(route, body, prefilled)
        try:
            if not body.get("stream"):
                await self._decode_whole(node, body)
            else:
                answer, first = await self._open(node, body)
                try:
                    if self._request.body.get("stream") or answer.status != 200:
                        await self._relay(node, answer, first, prefilled, sent)
                    else:
                        await self._collect(node, route, answer, first)
                finally:
                    answer.close()
            outcome = "used" if self.status == 200 else "refused"
        finally:
            self._plane.metrics.hand_offs.count(outcome)
        if outcome == "used":
            node.handed_over(prefilled.prompt_tokens)

    async def _decode_whole(self, node: Node, body: JSONObject) -> None:
        """A leg that is not a stream is never cut off, not even for a client that has left (see engines/collect.py)."""
        cut, self._leave = self._leave, lambda: None
        try:
            answer = await self._hand_over(
                node, body, self._until(self._plane.settings.whole_answer_timeout_s, "finish its answer")
            )
            raw = await self._load(node, answer)
        finally:
            self._leave = cut
        if answer.status == 200:
            node.breaker.succeeded()
        self._pass_on(answer.status, answer.headers, raw)

    async def _collect(self, node: Node, route: Route, answer: Answer, first: bytes) -> None:
        """A stream, put together to the whole answer the client asked for."""
        collector = Collector(chat=route.forwards_ids_as == "kv_transfer_params")
        silence_s = self._plane.settings.decode_silence_timeout_s
        chunk = first
        try:
            while chunk:
                collector.feed(chunk)
                chunk = await answer.chunk(self._until(silence_s, "send anything"))
        except StreamError as exc:
            failed = NodeError(
                f"decode node {node.spec.name} failed in the middle of its answer", "Its own log tells why"
            )
            raise self._counted(node, failed) from exc
        except ValueError as exc:
            unreadable = NodeError(f"decode node {node.spec.name} sent a stream that cannot be read")
            raise self._counted(node, unreadable) from exc
        except NodeError as exc:
            raise self._counted(node, exc)  # noqa: B904  the same error, counted
        if not collector.is_whole:
            early = NodeBrokeOffError(f"decode node {node.spec.name} ended its answer before its end")
            raise self._counted(node, early)
        self._pass_on(200, [_JSON], orjson.dumps(collector.answer()))

    async def _open(self, node: Node, body: JSONObject) -> tuple[Answer, bytes]:
        """A decode leg whose status and first bytes have come; the caller closes it.

        Raises NodeError when a stream begins with an error: vLLM has already said 200 to it.
        """
        deadline = self._until(self._plane.settings.decode_start_timeout_s, "answer")
        started = time.perf_counter()
        answer = await self._hand_over(node, body, deadline)
        try:
            first = await answer.chunk()
            if answer.status == 200 and first.startswith(ERROR_EVENT):
                raise self._failure_in(first, node)
        except NodeError as exc:
            answer.close()
            raise self._counted(node, exc)  # noqa: B904  the same error, counted
        except BaseException:
            answer.close()
            raise
        if answer.status == 200:
            node.breaker.succeeded()
        now = time.perf_counter()
        self._plane.metrics.time_to_first_event_seconds.observe(now - self._started)
        if self.path == "disaggregated":
            self._plane.metrics.hand_off_seconds.observe(now - started)
        return answer, first

    async def _hand_over(self, node: Node, body: JSONObject, deadline: Deadline) -> Answer:
        """Send the decode leg. The hand-off is given back when no node has taken it.

        A node that has it and is cut off lets go by itself: vLLM's abort of a request frees its hand-off. But until the
        answer's head is here nobody knows whether the node's engine has it: of a request whose connection closes before
        its handler runs the engine never hears. So a leg on its way is not cut off for a client that leaves, either.
        """
        sent, self._is_handed_over = False, True  # from here on it is given back here
        cut = self._leave
        if self._pinned is not None and body.get("stream"):  # one that does not stream says nothing before its end
            self._leave = lambda: deadline.within(_SEE_OFF_S)

        def note() -> None:
            nonlocal sent
            sent = True

        try:
            answer = await self._send(node, body, self._request.headers, deadline, note)
        except NodeAnsweredError as exc:
            if not bodies.is_released_by_refusal(exc.status, _error_kind(exc.body)):
                self._give_back()
            raise
        except NodeError as exc:
            if not (sent and isinstance(exc, NodeTimeoutError)):
                self._give_back()
            if self._client.is_gone:
                raise ClientGoneError from None
            raise
        except asyncio.CancelledError:
            if not sent:
                self._give_back()
            raise
        finally:
            self._leave = cut
        if self._client.is_gone:
            answer.close()
            raise ClientGoneError
        if answer.status != 200:
            raw = await self._load(node, answer)
            if not bodies.is_released_by_refusal(answer.status, _error_kind(raw)):
                self._give_back()
        return answer

    def _failure_in(self, first: bytes, node: Node) -> NodeError | NodeRefusedError:
        """What a stream that begins with an error means; vLLM has already said 200 to it.

        A refusal made there is not followed by vLLM's rejection clean-up: the request never reached the engine, and
        the prefill node would keep its KV (seen on a live pair with `logprobs` above the limit).
        """
        error = _error_in(first)
        code = error.get("code")
        if isinstance(code, int) and 400 <= code < 500:
            self._give_back()
            return NodeRefusedError(code, error)
        return NodeError(f"decode node {node.spec.name} began its answer with an error", "Its own log tells why")

    def _give_back(self) -> None:
        if self._pinned is not None:
            self._plane.releaser.release(self._request.body, self._pinned)
            self._pinned = None

    # -- both

    def _until(self, seconds: float, what: str) -> Deadline:
        """A leg's deadline; the request's own is never passed. Raises LateError when that is over."""
        left = self._deadline.at - time.monotonic()
        if left <= 0:
            raise self._late()
        return Deadline(min(seconds, left), what)

    def _late(self) -> LateError:
        return LateError(f"the request was not answered in {self._deadline.seconds:g} s")

    async def _send(
        self,
        node: Node,
        body: JSONObject,
        headers: Headers,
        deadline: Deadline,
        on_sent: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Raises NodeError, NodeAnsweredError among them for a status that is the node's failure."""
        self.nodes.append(node.spec.name)
        self._plane.metrics.node_requests.count(node.spec.name)
        try:
            answer = await self._plane.clients.of(node).request(
                b"POST",
                self._request.path.encode(),
                headers,
                orjson.dumps(body),
                deadline=deadline,
                on_sent=on_sent,
            )
        except NodeError as exc:
            raise self._counted(node, exc)  # noqa: B904  the same error, counted
        if retry.is_node_failure(answer.status):
            raise self._counted(node, await self._refusal(node, answer))
        if answer.status in (401, 403):
            await self._load(node, answer)
            refused = NodeError(
                f"node {node.spec.name} does not take the proxy's key", "Set PD_NODE_API_KEY to the nodes' own"
            )
            refused.may_be_retried = False
            self._failed.add(node)
            raise refused
        return answer

    async def _refusal(self, node: Node, answer: Answer) -> NodeAnsweredError:
        return NodeAnsweredError(node.spec.name, answer.status, answer.headers, await self._load(node, answer))

    async def _load(self, node: Node, answer: Answer) -> bytes:
        try:
            return await answer.load()
        except NodeError as exc:
            answer.close()
            raise self._counted(node, exc)  # noqa: B904  the same error, counted
        except BaseException:
            answer.close()
            raise

    def _counted(self, node: Node, error: NodeError) -> NodeError | LateError:
        """Take note of a node's failure: it gets no more attempts of this request, and fewer of others."""
        if isinstance(error, NodeTimeoutError) and time.monotonic() >= self._deadline.at:
            return self._late()
        if self._client.is_gone:
            return error
        if node not in self._failed:
            self._failed.add(node)
            self._failing = node
            self._plane.metrics.node_errors.count(node.spec.name, retry.reason(error))
            node.met(error)
        return error

    async def _relay(
        self,
        node: Node,
        answer: Answer,
        first: bytes,
        prefilled: Prefilled | None = None,
        sent: SentTokens | None = None,
    ) -> None:
        if answer.status != 200:
            rest = [first]
            while chunk := await answer.chunk():
                rest.append(chunk)
            self._pass_on(answer.status, answer.headers, b"".join(rest))
            return
        if not (self._continues or _is_stream(answer.headers)):
            sent = None  # it has no tokens to be noted, and reaches the client as it is
        through = sent or AsItIs()
        self.status = 200
        self._client.begin(200, self._headers(answer.headers), through.feed(first))
        settings = self._plane.settings
        begun = time.perf_counter()
        try:
            await self._client.relay(
                answer,
                self._deadline,
                through,
                silence_s=settings.decode_silence_timeout_s,
                stall_s=settings.client_stall_timeout_s,
            )
        except NodeError as exc:
            error = self._counted(node, exc)
            if prefilled is None or sent is None or not isinstance(error, NodeError):
                raise error  # noqa: B904  the same error, counted
            if not await self._continue(node, prefilled, sent):
                raise error  # noqa: B904
        if sent is not None and sent.tokens > 1:
            mean_s = (time.perf_counter() - begun) / (sent.tokens - 1)
            self._plane.metrics.mean_inter_token_seconds.observe(mean_s)

    # -- a stream that lost its node

    def _watched(self, route: Route, body: JSONObject, prefilled: Prefilled) -> SentTokens | None:
        """Have the decode leg tell its tokens, if its stream is one that could go on without its node."""
        asked = self._request.body
        if not self._plane.settings.resume or prefilled.token_ids is None:
            return None
        if not continuation.can_be_continued(route, asked):
            return None
        body["return_token_ids"] = True
        return SentTokens(hide=not asked.get("return_token_ids"))

    async def _continue(self, lost: Node, prefilled: Prefilled, sent: SentTokens) -> bool:
        """Whether the client has got the rest of its stream, from other nodes."""
        outcome = "failed"
        try:
            may = self._continues < retry.MOST_CONTINUATIONS and self._plane.budget.withdraw()
            if may and (sent.is_finished or sent.can_go_on):
                await self._go_on(lost, prefilled, sent)
                outcome = "done"
        except (ProxyError, CannotContinueError, ValueError) as exc:
            logger.warning("request %s could not go on without %s: %s", self._request.id, lost.spec.name, exc)
        finally:
            self._plane.metrics.resumed.count(outcome)
        return outcome == "done"

    async def _go_on(self, lost: Node, prefilled: Prefilled, sent: SentTokens) -> None:
        request, client = self._request, self._client
        prompt, ids = orjson.loads(prefilled.token_ids or b"[]"), sent.token_ids()
        cached = None if prefilled.cached_tokens is None else {"cached_tokens": prefilled.cached_tokens}
        usage = {"prompt_tokens": prefilled.prompt_tokens, "prompt_tokens_details": cached}
        joint = continuation.Joint(request.body, sent.first_event, usage, len(ids))
        longest = self._plane.pool.max_model_len(request.body.get("model"))
        rest = continuation.continuation_body(request.body, prompt, ids, longest)
        if sent.is_finished or rest is None:
            client.write(joint.ending(None if sent.is_finished else "length", 0))
            client.finish()
            return
        name = f"{request.id}-on"
        headers = [(key, name.encode("latin-1") if key == b"x-request-id" else value) for key, value in request.headers]
        follower = Exchange(
            self._plane,
            Request(COMPLETIONS.path, rest, name, headers, self._deadline.left_s),
            Continued(client, joint),
        )
        follower._failed.add(lost)
        follower._continues = self._continues + 1
        cut, self._leave = self._leave, follower.client_left
        follower._leave = cut
        try:
            await follower._attempts()
        finally:
            self._leave = cut
            self.nodes += follower.nodes

    def _pass_on(self, status: int, node_headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        self.status = status
        self._client.answer(status, self._headers(node_headers), body)

    def _headers(self, node_headers: Iterable[tuple[bytes, bytes]]) -> Headers:
        headers = [header for header in node_headers if header[0] in _PASSED_TO_CLIENT]
        taken = self.path if self.reason is None else f"{self.path}; reason={self.reason}"
        headers += ((b"x-pd-path", taken.encode()), (b"x-request-id", self._request.id.encode("latin-1")))
        return headers


def _is_stream(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name == b"content-type" and kind.startswith(b"text/event-stream") for name, kind in headers)


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
