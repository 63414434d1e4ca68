"""A decode node died in the middle of a stream: the stream goes on, from another node, as if nothing had happened."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import orjson

from engines.base import JSONObject
from engines.openai.continuation import Splice, continuation_body
from engines.openai.request import Asked
from engines.openai.routes import COMPLETIONS, HANDED_OFF

from ..errors import NodeBrokeOffError
from ..nodes.fleet import Fleet
from ..upstream.client import Answer
from ..upstream.deadline import Deadline
from .filters import StreamFilter
from .plane import Client, Request

if TYPE_CHECKING:
    from .attempt import StreamLostError


class CannotContinueError(Exception):
    """The continuation was refused, or cannot be asked for."""


def continued(
    request: Request, client: Client, lost: "StreamLostError", fleet: Fleet
) -> tuple[Request, "Continued"] | None:
    """The request that makes the rest of a lost stream, and what writes it to the client.

    None when nothing but the stream's end was missing, which the client now has. Raises CannotContinueError.
    """
    prefilled, sent, body = lost.prefilled, lost.sent, request.asked.body
    route = HANDED_OFF[request.path]
    prompt = orjson.loads(prefilled.token_ids or b"[]")
    ids = sent.all_token_ids() if sent.is_finished else sent.token_ids()
    cached = None if prefilled.cached_tokens is None else {"cached_tokens": prefilled.cached_tokens}
    usage: JSONObject = {"prompt_tokens": prefilled.prompt_tokens, "prompt_tokens_details": cached}
    try:
        splice = Splice(route, body, sent.first_event, usage, len(ids))
        rest = continuation_body(route, body, prompt, ids, fleet.max_model_len(body.get("model")))
    except ValueError as exc:
        raise CannotContinueError(str(exc)) from exc
    if sent.is_finished or rest is None:
        client.write(splice.ending(None if sent.is_finished else "length", 0))
        client.finish()
        return None
    name = f"{request.id}-on".encode("latin-1")
    headers = [(key, name if key == b"x-request-id" else value) for key, value in request.headers]
    asked = Asked(rest, reason=None, is_text=True, tokens=len(rest["prompt"]))
    return Request(COMPLETIONS.path, asked, f"{request.id}-on", headers), Continued(client, splice)


class Continued:
    """Stands where a client stands in an exchange, and writes into the answer that its client has begun to read."""

    def __init__(self, client: Client, splice: Splice) -> None:
        self._client = client
        self._joint = splice
        self.started = False

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
            self._client.write(self._joint.spliced(chunk))

    async def drained(self, stall_s: float) -> None:
        await self._client.drained(stall_s)

    def finish(self) -> None:
        self._client.finish()

    async def relay(self, answer: Answer, through: StreamFilter, *, silence_s: float, stall_s: float) -> None:
        """Every event is looked into, unlike in a stream that nothing happens to. Raises NodeError."""
        while chunk := await answer.chunk(Deadline(silence_s, "send anything")):
            self.write(through.feed(chunk))
            await self._client.drained(stall_s)
            if through.has_failed:
                raise NodeBrokeOffError("the node failed in the middle of its answer")
        if not through.is_done:
            raise NodeBrokeOffError("the node ended its stream before its end")
        self.finish()
