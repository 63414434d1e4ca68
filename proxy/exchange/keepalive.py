"""A stream whose prompt is still computed says so: comments, which every reader of server-sent events passes over.

Load balancers cut a connection that is silent for a minute, and a long prompt takes longer. The price: the status line
is sent before anybody knows how the request ends, so an error comes as an event. Until the first event of the answer
the client has seen nothing of it, and the request may still be tried again.
"""

import asyncio
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

from engines.openai.errors import error_body, error_event, error_in

from ..upstream.client import Answer, Headers
from .filters import StreamFilter
from .plane import Client

COMMENT: Final = b": the prompt is being computed\n\n"
_HEAD: Final = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]


class KeptAlive:
    """Stands where a client stands in an exchange, until the answer begins; a context manager."""

    def __init__(self, client: Client, path: str, every_s: float, headers: Headers) -> None:
        self._client = client
        self._path = path
        self._every_s = every_s
        self._headers = headers
        self._timer: asyncio.TimerHandle | None = None
        self._said_head = False
        self.started = False

    def __enter__(self) -> Self:
        self._wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    # -- as an exchange sees a client

    def answer(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """A whole answer, though a stream was asked for: most likely an error."""
        self._begin()
        if not self._said_head:
            self._client.answer(status, headers, body)
            return
        if status == 200:
            event = b"data: " + body.replace(b"\n", b" ") + b"\n\n"
        else:
            told = {"error": error_body("the node refused the request", "BadRequestError", status)["error"]}
            told["error"] |= error_in(body)
            event = error_event(self._path, told)
        self._client.write(event)
        self._client.finish()

    def begin(self, status: int, headers: Iterable[tuple[bytes, bytes]], first: bytes) -> None:
        self._begin()
        if self._said_head:
            self._client.write(first)
        else:
            self._client.begin(status, headers, first)

    async def relay(self, answer: Answer, through: StreamFilter, *, silence_s: float, stall_s: float) -> None:
        await self._client.relay(answer, through, silence_s=silence_s, stall_s=stall_s)

    def write(self, chunk: bytes) -> None:
        self._client.write(chunk)

    async def drained(self, stall_s: float) -> None:
        await self._client.drained(stall_s)

    def finish(self) -> None:
        self._client.finish()

    # -- inside

    def _begin(self) -> None:
        self._stop()
        self.started = True

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._every_s, self._say)

    def _say(self) -> None:
        if self._said_head:
            self._client.write(COMMENT)
        else:
            self._said_head = True
            self._client.begin(200, [*_HEAD, *self._headers], COMMENT)
        self._wait()
