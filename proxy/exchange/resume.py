"""A decode node died in the middle of a stream: the stream goes on, from another node, as if nothing had happened."""

from collections.abc import Iterable
from typing import Protocol

from engines.openai.continuation import Joint

from ..errors import NodeBrokeOffError
from ..upstream.client import Answer, Deadline
from .filters import Through


class Stream(Protocol):
    """A client in the middle of its answer."""

    @property
    def is_gone(self) -> bool: ...

    def write(self, chunk: bytes) -> None: ...

    async def drained(self, stall_s: float) -> None: ...

    def finish(self) -> None: ...


class CannotContinueError(Exception):
    """The continuation was refused, or cannot be asked for."""


class Continued:
    """Stands where a client stands in an exchange, and writes into the answer that its client has begun to read."""

    def __init__(self, client: Stream, joint: Joint) -> None:
        self._client = client
        self._joint = joint
        self.started = False

    @property
    def is_gone(self) -> bool:
        return self._client.is_gone

    def answer(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """No stream, but an error. Raises CannotContinueError."""
        del headers, body
        raise CannotContinueError(f"the continuation was answered {status}")

    def begin(self, status: int, headers: Iterable[tuple[bytes, bytes]], first: bytes) -> None:
        del status, headers  # the client has them already
        self.write(first)

    def write(self, chunk: bytes) -> None:
        if chunk:
            self.started = True
            self._client.write(self._joint.joined(chunk))

    async def drained(self, stall_s: float) -> None:
        await self._client.drained(stall_s)

    def finish(self) -> None:
        self._client.finish()

    async def relay(
        self, answer: Answer, deadline: Deadline, through: Through, *, silence_s: float, stall_s: float
    ) -> None:
        """Every event is looked into, unlike in a stream that nothing happens to. Raises NodeError."""
        while chunk := await answer.chunk(Deadline(min(silence_s, deadline.left_s), "send anything")):
            self.write(through.feed(chunk))
            await self._client.drained(stall_s)
            if through.has_failed:
                raise NodeBrokeOffError("the node failed in the middle of its answer")
        if not through.is_done:
            raise NodeBrokeOffError("the node ended its stream before its end")
        self.finish()
