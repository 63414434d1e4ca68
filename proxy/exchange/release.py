"""Giving back a hand-off that will not be used: the prefill node would keep its KV until the transfer timeout.

There is no call for it. What frees it is a decode node's refusal: vLLM pulls nothing for a request that it refuses,
and the prefill node lets go. So a request made to be refused is sent to a decode node (`bodies.release_body`).
"""

import asyncio
import logging

import orjson

from engines.base import JSONObject, Role
from engines.openai.routes import COMPLETIONS
from engines.vllm import bodies

from ..errors import NodeError, ProxyError
from ..nodes.fleet import Pool
from ..serving.metrics import Metrics
from ..upstream.client import Deadline, Headers, NodeClients
from .background import Background

logger = logging.getLogger("pd_proxy.release")

MOST_AT_ONCE = 256
_TRIES = 5
_BETWEEN_TRIES_S = 1.0
_TRY_S = 10.0


class Releaser:
    """Bounded and counted; what is over the bound expires by itself."""

    def __init__(self, pool: Pool, clients: NodeClients, metrics: Metrics, headers: Headers) -> None:
        self._pool = pool
        self._clients = clients
        self._metrics = metrics
        self._headers = headers
        self._background = Background(MOST_AT_ONCE)

    def release(self, body: JSONObject, transfer_params: JSONObject) -> None:
        """Give back, soon, what a decode leg with these parameters would have fetched. `body` is the client's."""
        if self._background.is_full:
            self._metrics.releases.count("skipped")
        else:
            self._background.start(self._send(bodies.release_body(body, transfer_params)), "release of a hand-off")

    async def close(self) -> None:
        await self._background.close()

    async def _send(self, body: JSONObject) -> None:
        """A node that has just failed is often the only one: a few tries, well within the transfer timeout."""
        outcome, problem = "failed", ""
        self._metrics.releases_pending += 1
        try:
            for _ in range(_TRIES):
                try:
                    await self._be_refused(body)
                except ProxyError as exc:
                    problem = str(exc)
                    await asyncio.sleep(_BETWEEN_TRIES_S)
                else:
                    outcome = "done"
                    return
            logger.warning("a hand-off was not released: %s", problem)
        finally:
            self._metrics.releases_pending -= 1
            self._metrics.releases.count(outcome)

    async def _be_refused(self, body: JSONObject) -> None:
        """Raises ProxyError when there is no decode node, or it does not refuse."""
        node = self._pool.choose(Role.DECODE)
        with node.lease():
            client = self._clients.of(node)
            answer = await client.request(
                b"POST",
                COMPLETIONS.path.encode(),
                self._headers,
                orjson.dumps(body),
                deadline=Deadline(_TRY_S, "answer"),
            )
            try:
                raw = await answer.load()
            finally:
                answer.close()
        if answer.status not in (400, 404):
            raise NodeError(f"node {node.spec.name} did not refuse: {answer.status} {raw[:200]!r}")
