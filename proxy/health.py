"""Probes: is a node there, what does it serve, and which life of it is this.

A node's `engine_id` is new with every start, and a decode node that is told an old one waits out the whole transfer
timeout. So identity is part of health: a prefill node is usable only with the ids its bootstrap server gives *now*.
"""

import asyncio
import logging

import httpx

from engines import mooncake, vllm
from engines.base import Rank, Role

from .config import ProxySettings
from .pool import Node, Pool

logger = logging.getLogger("pd_proxy.health")


class Prober:
    """Asks every node in turn of time, and tells the pool."""

    def __init__(self, settings: ProxySettings, pool: Pool, node_headers: dict[str, str]) -> None:
        self._settings = settings
        self._pool = pool
        self._client = httpx.AsyncClient(timeout=settings.probe_timeout_s, trust_env=False)
        self._node_headers = node_headers

    async def run(self) -> None:
        """Probe for ever."""
        while True:
            await self.round()
            await asyncio.sleep(self._settings.probe_interval_s)

    async def round(self) -> None:
        """Probe every node once, all at the same time."""
        await asyncio.gather(*(self._probe(node) for node in self._pool))

    async def close(self) -> None:
        await self._client.aclose()

    async def _probe(self, node: Node) -> None:
        before = node.problem
        try:
            await self._get(f"{node.spec.url}/health")
            models = vllm.model_cards((await self._get(f"{node.spec.url}/v1/models")).json())
            ranks = await self._identity(node)
        except _ProbeError as exc:
            node.failed(str(exc))
        except (KeyError, TypeError, ValueError):
            node.failed("answers, but not as a vLLM server does")
        else:
            node.ready(ranks, models)
        _log_change(node, before)

    async def _identity(self, node: Node) -> tuple[Rank, ...]:
        if node.spec.role is Role.DECODE or not self._pool.connector.has_bootstrap:
            return ()
        ids = mooncake.engine_ids((await self._get(f"{node.spec.bootstrap}/query", {})).json())
        if not ids:
            raise _ProbeError("its bootstrap server knows no worker yet")
        return tuple(Rank(number, engine_id, len(ids)) for number, engine_id in sorted(ids.items()))

    async def _get(self, url: str, headers: dict[str, str] | None = None) -> httpx.Response:
        """`headers`: those for a node, its key among them, unless others are given."""
        path = httpx.URL(url).path
        try:
            answer = await self._client.get(url, headers=self._node_headers if headers is None else headers)
        except httpx.TimeoutException as exc:
            raise _ProbeError(f"no answer to {path} in {self._settings.probe_timeout_s:g} s") from exc
        except httpx.HTTPError as exc:
            raise _ProbeError(f"cannot be reached for {path}") from exc
        if answer.status_code != httpx.codes.OK:
            raise _ProbeError(f"answers {path} with {answer.status_code}")
        return answer


class _ProbeError(Exception):
    """What a probe found, in words for `/health`."""


def _log_change(node: Node, before: str | None) -> None:
    if node.problem == before:
        return
    if node.problem is None:
        logger.info("node %s is usable", node.spec.name)
    else:
        logger.warning("node %s is not usable: %s", node.spec.name, node.problem)
