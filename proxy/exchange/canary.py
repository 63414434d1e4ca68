"""The KV canary: does each decode node read each prefill node's KV as that node wrote it?

Nobody else compares. A pair whose nodes differ in KV layout, rope settings or weights answers every request with fluent
nonsense, and all counters say that KV moved. So now and then a decode node is asked one greedy question alone, and each
of its pairs, as a client's request would be, for what follows (`engines/openai/canary.py` says what must be equal). A
pair that differs twice in a row gets no more hand-offs, until a later answer is the same again.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from engines.base import JSONObject, new_id
from engines.openai import canary
from engines.openai.request import Asked
from engines.openai.routes import COMPLETIONS

from ..errors import ProxyError
from ..nodes.node import Node
from ..nodes.pairs import Pair, Verdict, lives
from ..upstream.client import Answer, Headers
from .attempt import Attempt
from .background import Background
from .deliver import Delivery
from .filters import StreamFilter
from .plane import DataPlane, Only, Request
from .presence import Presence
from .record import Record

logger = logging.getLogger("pd_proxy.nodes")

_LOOK_EVERY_S = 0.5
_NEW_LIFE_S = 5.0
"""Since the last question, before a pair whose node has started again is asked: nodes may come and go."""
_AGAIN_S = 60.0
"""... before one that differs; before one that could not be judged, and longer each time. At most the interval."""
_PREFILL_AT_ONCE = 4
_MOST_AT_ONCE = 256
_JSON = (b"content-type", b"application/json")
_ALONE = "canary"
"""Why one node does both phases."""
Said = TypeVar("Said")


class NotJudgedError(Exception):
    """The pair, or its decode node alone, has given no answer that can be compared; the message says why."""


@dataclass(slots=True)
class _Asked:
    """What is remembered of a pair's questions."""

    ended_at: float = -math.inf
    not_judged: int = 0
    """Questions in a row that brought no verdict."""


class Canary:
    """Asks all pairs again and again, a decode node one question at a time: it is no load to speak of."""

    def __init__(
        self,
        plane: DataPlane,
        node_headers: Headers,
        is_closing: Callable[[], bool],
        after_a_verdict: Callable[[], object],
    ) -> None:
        """`is_closing`: no more questions."""
        self._plane = plane
        self._fleet = plane.fleet
        self._headers = [_JSON, *node_headers]
        self._interval_s = plane.settings.canary_interval_s
        self._is_closing = is_closing
        self._after_a_verdict = after_a_verdict
        self._asked: dict[Pair, _Asked] = {}
        self._asking: set[Pair] = set()
        self._background = Background(_MOST_AT_ONCE)

    async def run(self) -> None:
        """For ever. A question that is on its way when this is cancelled goes on: a leg that is cut leaves KV."""
        while True:
            self._forget_the_gone()
            for pair in [] if self._is_closing() else self._due():
                self._asking.add(pair)
                self._background.start(self._ask(pair), "KV canary")
            await asyncio.sleep(min(_LOOK_EVERY_S, self._interval_s))

    async def close(self, within_s: float) -> None:
        """Let the questions that are on their way come to their end, for at most so long."""
        await self._background.close(within_s)

    def _due(self) -> list[Pair]:
        """The one that was asked the longest time ago first: a pair that hangs keeps nobody else from his turn."""
        now = time.monotonic()
        due = [pair for pair in self._fleet.usable_pairs() if pair not in self._asking and self._is_due(pair, now)]
        due.sort(key=lambda pair: self._asked[pair].ended_at if pair in self._asked else -math.inf)
        prefills, decodes = Counter(prefill for prefill, _ in self._asking), {decode for _, decode in self._asking}
        chosen: list[Pair] = []
        for prefill, decode in due:
            if decode not in decodes and prefills[prefill] < _PREFILL_AT_ONCE and len(chosen) < self._room:
                chosen.append((prefill, decode))
                prefills[prefill] += 1
                decodes.add(decode)
        return chosen

    @property
    def _room(self) -> int:
        return _MOST_AT_ONCE - len(self._asking)

    def _is_due(self, pair: Pair, now: float) -> bool:
        if not all(node.breaker.admits(now) for node in pair):
            return False
        asked = self._asked.get(pair)
        return asked is None or now - asked.ended_at >= min(self._interval_s, self._wait_s(pair, asked))

    def _wait_s(self, pair: Pair, asked: _Asked) -> float:
        if asked.not_judged:  # in another life, too: the question may be what ended the last
            return _AGAIN_S * 2.0 ** min(asked.not_judged - 1, 30)
        verdict = self._fleet.pairs.verdict(pair)
        if verdict is None:
            return _NEW_LIFE_S
        return _AGAIN_S if verdict.outcome == "differs" else self._interval_s

    async def _ask(self, pair: Pair) -> None:
        asked = self._asked.setdefault(pair, _Asked())
        try:
            verdict = await self._verdict(pair, lives(pair))
            asked.not_judged = asked.not_judged + 1 if verdict.outcome == "not judged" else 0
            self._plane.metrics.canaries.count(verdict.outcome)
            if self._fleet.has_pair(pair):
                self._fleet.judged(pair, verdict)
                self._after_a_verdict()
        finally:
            asked.ended_at = time.monotonic()
            self._asking.discard(pair)

    async def _verdict(self, pair: Pair, seen: tuple[int, int]) -> Verdict:
        """Raises nothing: whatever the nodes answer is said of the pair."""
        try:
            problem = await self._difference(pair) and await self._difference(pair)
        except NotJudgedError as exc:
            return Verdict("not judged", str(exc), seen)
        except Exception:
            prefill, decode = pair
            logger.exception("the KV canary of %s and %s failed", prefill.spec.name, decode.spec.name)
            return Verdict("not judged", "the proxy's log tells more", seen)
        if problem and lives(pair) != seen:
            return Verdict("not judged", "a node started again meanwhile", seen)
        return Verdict("differs", problem, seen) if problem else Verdict("same", "", seen)

    async def _difference(self, pair: Pair) -> str | None:
        """Raises NotJudgedError."""
        prefill, decode = pair
        model, salt = _model(prefill, decode), new_id()
        raw = await self._answer(Only(decode=decode), canary.question(model, salt, self._fleet.max_model_len(model)))
        alone = _read(canary.alone, raw, decode)
        raw = await self._answer(Only(prefill, decode), canary.continuation(model, f"{salt}-pair", alone))
        return canary.difference(alone.steps, _read(canary.steps, raw, decode))

    async def _answer(self, only: Only, body: JSONObject) -> bytes:
        """Of a pair, or of a decode node alone. Raises NotJudgedError."""
        request = self._request(body)
        record = Record(request.id, request.path)
        answer = _Answer()
        delivery = Delivery(self._plane, request, answer, record)
        attempt = Attempt(self._plane, request, Presence(math.inf), record, delivery, set(), only)
        try:
            await attempt.run(COMPLETIONS, _ALONE if only.prefill is None else None)
        except ProxyError as exc:
            raise NotJudgedError(str(exc)) from exc
        if only.prefill is not None and record.path != "disaggregated":
            raise NotJudgedError(f"not handed over: {record.reason}")
        if answer.status != 200:
            raise NotJudgedError(f"{record.nodes[-1]} answered {answer.status}")
        return answer.body

    def _request(self, body: JSONObject) -> Request:
        name = f"canary-{new_id()}"
        asked = Asked(body, None, is_text=True, tokens=len(body["prompt"]))
        return Request(COMPLETIONS.path, asked, name, [*self._headers, (b"x-request-id", name.encode())])

    def _forget_the_gone(self) -> None:
        nodes = set(self._fleet)
        self._fleet.pairs.forget_all_but(nodes)
        self._asked = {pair: asked for pair, asked in self._asked.items() if nodes.issuperset(pair)}


class _Answer:
    """Stands where a client stands; it asked for a whole answer."""

    started = False

    def __init__(self) -> None:
        self.status = 0
        self.body = b""

    def answer(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        del headers
        self.status, self.body = status, body

    def begin(self, status: int, headers: Iterable[tuple[bytes, bytes]], first: bytes) -> None:
        del status, headers, first
        raise NotJudgedError("a stream came for a whole answer")

    async def relay(self, answer: Answer, through: StreamFilter, *, silence_s: float, stall_s: float) -> None:
        raise NotImplementedError

    def write(self, chunk: bytes) -> None:
        raise NotImplementedError

    async def drained(self, stall_s: float) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        raise NotImplementedError


def _model(prefill: Node, decode: Node) -> str:
    """One that both list; adapters share their base model's KV layout. Raises NotJudgedError."""
    for card in decode.models:
        if not card.get("parent") and card["id"] in prefill.names:
            return str(card["id"])
    raise NotJudgedError("they list no model in common")


def _read(reader: Callable[[bytes], Said], raw: bytes, node: Node) -> Said:
    try:
        return reader(raw)
    except ValueError as exc:
        raise NotJudgedError(f"{node.spec.name} gave {exc}") from exc
