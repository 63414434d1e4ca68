"""A request for several sequences: an exchange for each, side by side, and one answer made of theirs.

The answer begins when every sequence's has: until then any of them may be refused, and the client hears that with the
node's own status. Afterwards the first that fails breaks the answer off. When one has failed, nobody waits for the
others any more: for them it is as if their client had left.
"""

import asyncio
from collections.abc import Iterable, Sequence

from engines.openai.choices import Merged, Share, share_suffix, shares
from engines.openai.sse import Splitter

from ..errors import ClientGoneError, NodeBrokeOffError, NodeError, OverloadedError
from ..upstream.client import Answer, Headers
from ..upstream.deadline import Deadline
from .exchange import Exchange
from .filters import StreamFilter
from .plane import Client, DataPlane, Request, SamePrompt
from .presence import Presence, Why
from .record import Record

Head = tuple[int, list[tuple[bytes, bytes]]]


def exchange_for(
    plane: DataPlane, request: Request, client: Client, presence: Presence, record: Record
) -> "Exchange | FanOut":
    """What answers this request. Short prompts are not split: they would not be handed off either. Nor is one whose
    bodies, one for each sequence, are more than may be in memory now.
    """
    found = shares(request.path, request.asked)
    shortest = plane.settings.min_prefill_tokens
    if found and any(share.asked.tokens >= shortest for share in found) and _has_memory(request, found):
        return FanOut(plane, request, client, presence, record, found)
    return Exchange(plane, request, client, presence, record)


def _has_memory(request: Request, found: Sequence[Share]) -> bool:
    more = sum(share.asked.prompt_bytes for share in found) - request.asked.prompt_bytes
    try:
        if request.memory is not None and more > 0:
            request.memory.add(more)
    except OverloadedError:
        return False
    return True


class FanOut:
    """Stands where one exchange stands."""

    def __init__(  # noqa: PLR0913, PLR0917  what an exchange has, and the shares
        self,
        plane: DataPlane,
        request: Request,
        client: Client,
        presence: Presence,
        record: Record,
        found: Sequence[Share],
    ) -> None:
        self._plane = plane
        self._request = request
        self._client = client
        self._presence = presence
        self.record = record
        """Of the whole request."""
        options = request.asked.body.get("stream_options") or {}
        self._merged = Merged(found, wants_usage=bool(options.get("include_usage")))
        self._is_stream = bool(request.asked.body.get("stream"))
        prompts = {share.prompt: SamePrompt() for share in found}
        self._parts = [Part(self, share, _request_of(share, request, prompts[share.prompt])) for share in found]
        self._writing = asyncio.Lock()
        self._all_begun = asyncio.Event()
        self._is_over = False
        """Nobody waits any more, or one part has failed."""
        self._is_refused = False

    async def run(self) -> None:
        """Answer the client. Raises ProxyError, ClientGoneError; what a node answered, errors too, is passed on."""
        tasks = [asyncio.create_task(self._answered(part)) for part in self._parts]
        try:
            with self._presence.on_leave(self._end_all):
                failure = await self._until_done(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._account()
        self._presence.check()
        if failure is not None:
            raise failure
        self._finish()

    async def _until_done(self, tasks: Sequence["asyncio.Task[None]"]) -> Exception | None:
        """What the first of them has failed with. A refusal is passed on at once."""
        failure: Exception | None = None
        for task in asyncio.as_completed(tasks):
            try:
                await task
            except Exception as exc:  # noqa: BLE001  raised when the others have ended
                failure = failure or exc
            refused = next((part for part in self._parts if part.refusal is not None), None)
            if failure is None and refused is not None:
                self._refuse(refused)
            if not self._is_over and (failure is not None or refused is not None):
                self._end_all("client-left")
        return None if self._is_refused else failure

    async def _answered(self, part: "Part") -> None:
        part.presence = Presence(self._plane.settings.request_timeout_s)
        if self._is_over:
            raise ClientGoneError
        try:
            await Exchange(self._plane, part.request, part, part.presence, part.record).run()
        except asyncio.CancelledError:
            if not part.presence.is_cause_of_cancellation():
                raise
            raise ClientGoneError from None

    def _end_all(self, why: Why) -> None:
        self._is_over = True
        for part in self._parts:
            if part.presence is not None:
                part.presence.end(why)

    def _refuse(self, part: "Part") -> None:
        """Its node's refusal is the whole request's. Once the client's answer has begun none can be."""
        if part.refusal is not None and not self._client.started:
            self._is_refused = True
            status, headers, body = part.refusal
            self._client.answer(status, self._with_own_headers(headers), body)

    # -- as the parts see it

    async def begun(self) -> None:
        """Until every part has begun; the last one begins the client's answer."""
        self.begin_if_all_have()
        await self._all_begun.wait()

    def begin_if_all_have(self) -> None:
        """The client's answer, once."""
        if not self._all_begun.is_set() and all(part.head is not None for part in self._parts):
            status, headers = self._parts[0].head or (200, [])
            first = b"".join(part.taken() for part in self._parts)
            self._client.begin(status, self._with_own_headers(headers), first)
            self._request.forget_prompt()
            self._all_begun.set()

    @property
    def has_begun(self) -> bool:
        """The client's answer has."""
        return self._all_begun.is_set()

    def numbered(self, part: "Part", whole: bytes) -> bytes:
        """Events of a part as those of the whole answer. Raises ValueError when they are none."""
        return self._merged.events(part.share, whole)

    def write(self, told: bytes) -> None:
        if told and not self._is_over:
            self._client.write(told)

    async def drained(self, stall_s: float) -> None:
        async with self._writing:
            await self._client.drained(stall_s)

    # -- the end

    def _finish(self) -> None:
        if self._is_refused:
            return
        if self._is_stream:
            self._client.write(self._merged.ending())
            self._client.finish()
        else:
            headers = self._parts[0].head[1] if self._parts[0].head else []
            try:
                whole = self._merged.whole([part.taken() for part in self._parts])
            except ValueError as exc:
                raise NodeError("a node's answer is not one of this route") from exc
            self._client.answer(200, self._with_own_headers(headers), whole)

    def _with_own_headers(self, headers: Iterable[tuple[bytes, bytes]]) -> Headers:
        """Of the whole request, not of a part."""
        self._account()
        own = {b"x-pd-path": self.record.path_header(), b"x-request-id": self._request.id.encode("latin-1")}
        return [(name, own.get(name, value)) for name, value in headers]

    def _account(self) -> None:
        """What is told of the parts, together."""
        record, parts = self.record, [part.record for part in self._parts]
        told = next((part for part in parts if part.path != "disaggregated"), parts[0])
        record.path, record.reason = told.path, told.reason
        record.status = next((part.status for part in parts if part.status not in (0, 200)), 200)
        record.failures = [failure for part in parts for failure in part.failures]
        record.retries = sum(part.retries for part in parts)
        record.resumed = sum(part.resumed for part in parts)
        record.transfer_id = ",".join(part.transfer_id for part in parts if part.transfer_id) or None
        record.prompt_tokens = sum({part.share.prompt: part.record.prompt_tokens for part in self._parts}.values())
        record.output_tokens = sum(part.output_tokens for part in parts)
        record.first_event = max(part.first_event for part in parts)


class Part:
    """Stands where a client stands in the exchange of one sequence."""

    def __init__(self, fan_out: FanOut, share: Share, request: Request) -> None:
        self.share = share
        self.request = request
        whole = fan_out.record
        self.record = Record(
            request.id, request.path, stages=whole.stages, part=share_suffix(share), follower=whole.follower
        )
        self.presence: Presence | None = None
        self.head: Head | None = None
        self.refusal: tuple[int, list[tuple[bytes, bytes]], bytes] | None = None
        self.started = False
        self._fan_out = fan_out
        self._splitter = Splitter()
        self._held: list[bytes] = []

    def taken(self) -> bytes:
        """What has come and is not with the client yet."""
        held, self._held = b"".join(self._held), []
        return held

    # -- as an exchange sees a client

    def answer(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        self.started = True
        is_stream = bool(self.share.asked.body.get("stream"))
        if status == 200 and not is_stream:
            self.head = status, list(headers)
            self._held.append(body)
            return
        if status == 200:
            raise NodeError("a node answered a request for a stream with none")
        self.refusal = status, list(headers), body

    def begin(self, status: int, headers: Iterable[tuple[bytes, bytes]], first: bytes) -> None:
        self.started = True
        self.head = status, list(headers)
        self._held.append(self._fan_out.numbered(self, self._splitter.feed(first)))

    async def relay(self, answer: Answer, through: StreamFilter, *, silence_s: float, stall_s: float) -> None:
        """A part that has begun is not read before the others have. Raises NodeError."""
        answer.hold()
        await self._fan_out.begun()
        while chunk := await answer.chunk(Deadline(silence_s, "send anything")):
            self.write(through.feed(chunk))
            await self._fan_out.drained(stall_s)
            if through.has_failed:
                raise NodeBrokeOffError("the node failed in the middle of its answer", "Its own log tells why")
        if not through.is_done:
            raise NodeBrokeOffError("the node ended its stream before its end")
        self.finish()

    def write(self, chunk: bytes) -> None:
        """What comes before the client's answer has begun, as it does of a stream that goes on elsewhere, is held."""
        told = self._fan_out.numbered(self, self._splitter.feed(chunk))
        if self._fan_out.has_begun:
            self._fan_out.write(told)
        else:
            self._held.append(told)
            self._fan_out.begin_if_all_have()

    async def drained(self, stall_s: float) -> None:
        await self._fan_out.drained(stall_s)

    def finish(self) -> None:
        """The end of the whole answer is written when all parts have come to theirs."""
        self._fan_out.begin_if_all_have()


def _request_of(share: Share, request: Request, same_prompt: SamePrompt) -> Request:
    name = f"{request.id}{share_suffix(share)}"
    encoded = name.encode("latin-1")
    headers = [(key, encoded if key == b"x-request-id" else value) for key, value in request.headers]
    return Request(request.path, share.asked, name, headers, same_prompt=same_prompt)
