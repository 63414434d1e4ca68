"""Giving back a hand-off that will not be used: the prefill node would keep its KV until the transfer timeout.

There is no call for it. What frees it is a decode node's refusal: the engine pulls nothing for a request that it
refuses, and the prefill node frees the KV. So a request made to be refused is sent to a decode node
(`Engine.release_leg`). A release is repeated only when it cannot have been received: a second pull for a hand-off
that is gone keeps one of the prefill node's sender tasks for the whole transfer timeout.
"""

import asyncio
import logging

import orjson

from engines.base import JSONObject, Role
from engines.openai.errors import error_in
from engines.openai.routes import COMPLETIONS

from ..errors import NodeError, NoNodeError, ProxyError
from ..metrics import Metrics
from ..nodes.clients import NodeClients
from ..nodes.fleet import Fleet
from ..nodes.node import Node
from ..routing.policy import choose
from ..upstream.client import Headers
from ..upstream.deadline import Deadline
from .background import Background
from .record import Stage

logger = logging.getLogger("pd_proxy.release")

MOST_AT_ONCE = 256
_TRIES = 5
_BETWEEN_TRIES_S = 1.0
_TRY_S = 10.0


class Releaser:
    """Bounded and counted; what is over the bound expires by itself."""

    def __init__(self, fleet: Fleet, clients: NodeClients, metrics: Metrics, headers: Headers) -> None:
        self._fleet = fleet
        self._clients = clients
        self._metrics = metrics
        self._headers = headers
        self._background = Background(MOST_AT_ONCE)

    def settled(self, outcome: str) -> None:
        """A hand-off came to its end; the prefill node held something for it unless `outcome` says otherwise."""
        if outcome != "not-held":
            self._metrics.hand_offs.count(outcome)

    def release(self, holder: Node, model: object, transfer_params: JSONObject, stage: Stage) -> None:
        """Give back, soon, what a decode leg with these parameters would have fetched from `holder`. `stage` ends with
        it, most often after its request.
        """
        if self._background.is_full:
            self._metrics.releases.count("skipped")
            stage.end("skipped")
        else:
            body = self._fleet.engine.release_leg(model, transfer_params)
            self._background.start(self._send(holder, orjson.dumps(body), stage), "release of a hand-off")

    async def close(self, within_s: float) -> None:
        """Let what is due be sent, for at most so long."""
        await self._background.close(within_s)

    async def _send(self, holder: Node, body: bytes, stage: Stage) -> None:
        """A node that has just failed is often the only one: a few tries, well within the transfer timeout."""
        outcome = "failed"
        self._metrics.releases_pending += 1
        try:
            outcome = await self._tried(holder, body)
        finally:
            self._metrics.releases_pending -= 1
            self._metrics.releases.count(outcome)
            stage.end("" if outcome == "done" else outcome)

    async def _tried(self, holder: Node, body: bytes) -> str:
        """The outcome: done, unknown (it may have been received), unsupported, failed."""
        problem: ProxyError | None = None
        for _ in range(_TRIES):
            try:
                node = self._chosen(holder)
                if not self._fleet.engine.survives_refusals(node.version):
                    return "unsupported"
                await self._be_refused(node, body)
            except (NodeError, NoNodeError) as exc:
                problem = exc
                if isinstance(exc, NodeError) and exc.maybe_received:
                    logger.warning("a hand-off may not have been released, and expires by itself: %s", exc)
                    return "unknown"
                await asyncio.sleep(_BETWEEN_TRIES_S)
            else:
                return "done"
        logger.warning("a hand-off was not released, and expires by itself: %s", problem)
        return "failed"

    def _chosen(self, holder: Node) -> Node:
        """A decode node other than the holder; one that is drained, or fenced from it, will do: no KV is read.

        Raises NoNodeError.
        """
        usable = [node for node in self._fleet.of(Role.DECODE) if node.usable and node is not holder]
        if usable:
            return choose(self._fleet, Role.DECODE, {holder})
        others = (node for node in self._fleet.of(Role.DECODE) if node is not holder)
        drained = next((node for node in others if node.is_well), None)
        if drained is None:
            raise NoNodeError(f"no decode node other than {holder.spec.name} works")
        return drained

    async def _be_refused(self, node: Node, body: bytes) -> None:
        """Raises NodeError when the node is not reached, or does not refuse."""
        with node.lease():
            deadline = Deadline(_TRY_S, "answer")
            path = COMPLETIONS.path.encode()
            answer = await self._clients.of(node).request(b"POST", path, self._headers, body, deadline=deadline)
            try:
                raw = await answer.load()
            finally:
                answer.close()
        kind = str(error_in(raw).get("type", ""))
        if answer.status in (502, 504):  # of something in between: it may have been received
            raise NodeError(f"node {node.spec.name} answered {answer.status}")
        if answer.status != 200 and not self._fleet.engine.is_freed_by_refusal(answer.status, kind):
            raise _NotHeardError(f"node {node.spec.name} answered {answer.status} before its engine heard of it")


class _NotHeardError(NodeError):
    """A full queue, or a server that fails: the engine has not got the release."""

    maybe_received = False
