"""Responses that a node keeps (`/v1/responses` with `store`): whoever has one answers for it.

It lives in the decode node that made it, as long as that lives. No table of them is kept here: the nodes are asked, so
that every worker knows, and a restart of the proxy forgets nothing.
"""

import asyncio
import re

from engines.base import Role
from engines.openai.routes import RESPONSES

from ..errors import NodeError, NoNodeError
from ..nodes.clients import NodeClients
from ..nodes.fleet import Fleet
from ..nodes.node import Node
from ..upstream.client import Answer, Headers
from ..upstream.deadline import Deadline

_ANSWERED_WITHIN_S = 10.0
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,255}")
"""What else is asked for no node has made; it goes into an address."""
_MAY_HAVE_IT = frozenset({401, 403, 408, 429})
"""With these a node says nothing of the response; any other 4xx means that it has none of that name."""


class StoredResponses:
    """Of all decode nodes."""

    def __init__(self, fleet: Fleet, clients: NodeClients, node_headers: Headers) -> None:
        self._fleet = fleet
        self._clients = clients
        self._node_headers = node_headers

    async def node_of(self, response_id: str) -> Node | None:
        """The node that has it; None when no node has.

        Raises NoNodeError when none of those that answer has it, and others may.
        """
        found, _ = await self._found(response_id)
        return found

    async def get(self, response_id: str) -> bytes | None:
        """The response as its node tells it; None when no node has it. Raises NoNodeError, as `node_of`."""
        _, told = await self._found(response_id)
        return told

    async def stream(self, node: Node, response_id: str, query: bytes) -> Answer:
        """The events of one that is made in the background. Raises NodeError."""
        path = _path(response_id) + b"?" + query
        return await self._clients.of(node).get(path, self._node_headers, Deadline(_ANSWERED_WITHIN_S, "answer"))

    async def cancel(self, node: Node, response_id: str) -> tuple[int, bytes]:
        """What the node says to that. Raises NodeError."""
        deadline = Deadline(_ANSWERED_WITHIN_S, "answer")
        path = _path(response_id) + b"/cancel"
        answer = await self._clients.of(node).request(b"POST", path, self._node_headers, b"", deadline=deadline)
        try:
            return answer.status, await answer.load()
        finally:
            answer.close()

    async def _found(self, response_id: str) -> tuple[Node | None, bytes | None]:
        """From the first that has it; the others are not waited for."""
        if not _ID.fullmatch(response_id):
            return None, None
        nodes = self._fleet.of(Role.DECODE)
        silent = [node.spec.name for node in nodes if not node.is_well]
        asking = [asyncio.create_task(self._ask(node, response_id)) for node in nodes if node.is_well]
        try:
            for answer in asyncio.as_completed(asking):
                node, told = await answer
                if isinstance(told, bytes):
                    return node, told
                if told is not None:
                    silent.append(node.spec.name)
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        if silent:
            raise NoNodeError(
                "no decode node that answers has this response, and one that does not may",
                f"Silent: {', '.join(silent)}",
            )
        return None, None

    async def _ask(self, node: Node, response_id: str) -> tuple[Node, bytes | NodeError | None]:
        """None: it says that it has none of that name."""
        try:
            answer = await self._clients.of(node).get(
                _path(response_id), self._node_headers, Deadline(_ANSWERED_WITHIN_S, "answer")
            )
            try:
                body = await answer.load()
            finally:
                answer.close()
        except NodeError as exc:
            return node, exc
        if answer.status == 200:
            return node, body
        has_none = 400 <= answer.status < 500 and answer.status not in _MAY_HAVE_IT
        return node, None if has_none else NodeError(f"node {node.spec.name} answered {answer.status}")


def _path(response_id: str) -> bytes:
    return f"{RESPONSES.path}/{response_id}".encode()
