"""One request to one node, sent once; what its answer means is said here, and its failures are noted here."""

from collections.abc import Callable

import orjson

from engines.base import JSONObject
from engines.openai.errors import error_in
from engines.openai.sse import OPENAI_EVENTS, EventRules, Splitter

from ..errors import (
    BadRequestError,
    NodeAnsweredError,
    NodeBrokeOffError,
    NodeError,
    NodeFullError,
    NodeRefusedError,
    NodeRejectsKeyError,
)
from ..nodes.node import Node
from ..upstream.client import Answer, Headers
from ..upstream.deadline import Deadline
from .plane import DataPlane
from .presence import Presence
from .record import CUT_SHORT, Record, StageName
from .retry import is_node_failure


def _nothing() -> None:
    return


class Leg:
    """A request to `node` on `path`. All its methods raise NodeError, once noted at the node and in the record."""

    __slots__ = ("_answer", "_path", "_plane", "_presence", "_record", "avoid", "node", "stage")

    def __init__(  # noqa: PLR0913, PLR0917  what an attempt has
        self,
        plane: DataPlane,
        node: Node,
        path: str,
        presence: Presence,
        record: Record,
        avoid: set[Node],
        stage: StageName,
    ) -> None:
        """`avoid`: where a node that fails is put, so that this request does not go there again. `stage`: what of the
        request begins with it, now.
        """
        self._plane = plane
        self._path = path
        self._presence = presence
        self._record = record
        self._answer: Answer | None = None
        self.avoid = avoid
        self.node = node
        self.stage = record.begin(stage, node.spec.name)

    def goes_on(self, stage: StageName) -> None:
        """The stage is over, and this one begins."""
        self.stage.end()
        self.stage = self._record.begin(stage, self.node.spec.name)

    async def open(
        self, body: JSONObject, headers: Headers, deadline: Deadline, on_sent: Callable[[], None] = _nothing
    ) -> Answer:
        """Send it; the answer when its head is here: 200, or a status that is not the node's failure.

        Raises NodeAnsweredError for a status that is, NodeRejectsKeyError for 401 and 403, BadRequestError.
        """
        try:
            raw = orjson.dumps(body)
        except TypeError as exc:  # what can be read may be nested deeper than what can be written
            raise BadRequestError("the request body is nested too deeply") from exc
        follower = self._record.follower
        if follower is not None:
            headers = [*headers, *follower.headers(self.stage)]
        self._plane.metrics.node_requests.count(self.node.spec.name)
        try:
            answer = self._answer = await self._plane.clients.of(self.node).request(
                b"POST", self._path.encode(), headers, raw, deadline=deadline, on_sent=on_sent
            )
            if answer.status != 200:
                await self._judge(answer)
        except NodeError as exc:
            self.note(exc)
            raise
        return answer

    async def load(self) -> bytes:
        """The whole body of the answer."""
        assert self._answer is not None  # noqa: S101  opened before
        try:
            raw = await self._answer.load()
        except NodeError as exc:
            self.note(exc)
            raise
        if self._answer.status == 200:
            self.node.breaker.record_success()
        return raw

    async def first_event(self, rules: EventRules | None) -> bytes:
        """The first bytes of the answer; of a stream with these rules at least one whole event of the engine's own.
        Comments are dropped.

        Raises NodeRefusedError or NodeError when a stream begins with an error: the engine has said 200 to it already.
        """
        assert self._answer is not None  # noqa: S101
        try:
            if rules is None or self._answer.status != 200:
                first = await self._answer.chunk()
            else:
                first = await self._first_event(self._answer, rules)
        except NodeError as exc:
            self.note(exc)
            raise
        if self._answer.status == 200:
            self.node.breaker.record_success()
        return first

    def note(self, error: NodeError) -> None:
        """Take note of a failure: the node gets no more attempts of this request, and fewer of others.

        What follows from cutting a leg short for a client that left is no failure of the node.
        """
        if self._presence.gone is not None and error.reason == "late":
            return
        self.stage.end(error.reason)
        self._record.failed(self.node.spec.name, error)
        self.avoid.add(self.node)
        self._plane.metrics.node_errors.count(self.node.spec.name, error.reason)
        self.node.record_failure(error)

    def close(self) -> None:
        """Give up what is not read; that tells the node to stop."""
        self.stage.end(CUT_SHORT)
        if self._answer is not None:
            self._answer.close()

    async def _judge(self, answer: Answer) -> None:
        if answer.status in (401, 403):
            await answer.load()
            raise NodeRejectsKeyError(self.node.spec.name)
        if is_node_failure(answer.status):
            raise NodeAnsweredError(self.node.spec.name, answer.status, answer.headers, await answer.load())

    async def _first_event(self, answer: Answer, rules: EventRules) -> bytes:
        """Most streams come an event a read; only if the first read is not a whole one are more taken."""
        splitter = Splitter()
        whole, read = b"", []
        while not _has_begun(whole, rules):
            chunk = await answer.chunk()
            if not chunk:
                raise NodeBrokeOffError(f"node {self.node.spec.name} ended its stream before its first event")
            read.append(chunk)
            whole += self._cut(splitter, chunk)
        failure = rules.error_in(whole)
        if failure is not None and not _has_begun(rules.before_error(whole), rules):  # comments are none
            raise self._failure(failure)
        return b"".join(read)

    def _cut(self, splitter: Splitter, chunk: bytes) -> bytes:
        try:
            return splitter.feed(chunk)
        except ValueError as exc:
            raise NodeError(f"node {self.node.spec.name} sent a stream that cannot be read") from exc

    def _failure(self, data: bytes) -> NodeError | NodeRefusedError:
        error = error_in(data)
        code = error.get("code")
        if code == 503:
            return NodeFullError(self.node.spec.name)
        if isinstance(code, int) and 400 <= code < 500:
            return NodeRefusedError(self.node.spec.name, code, error)
        return NodeError(f"node {self.node.spec.name} began its answer with an error", "Its own log tells why")


def _has_begun(whole: bytes, rules: EventRules) -> bool:
    return whole.startswith(b"data:") or rules.has_begun(whole)


def rules_for(path_rules: EventRules | None, headers: Headers) -> EventRules | None:
    """Those of a route whose answer is a stream; None when the answer is none."""
    is_stream = any(name == b"content-type" and kind.startswith(b"text/event-stream") for name, kind in headers)
    return (path_rules or OPENAI_EVENTS) if is_stream else None
