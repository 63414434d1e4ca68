"""Probes: is a node there, does it get on, what does it serve, and which life of it is this.

A node's `engine_id` is new with every start, and a decode node that is told an old one waits out the whole transfer
timeout. So identity is part of health: a prefill node is usable only with the ids its bootstrap server gives *now*.
A server that answers while its engine hangs is not well either: with requests running, tokens must come.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import orjson

from engines.base import Rank, Role
from engines.connectors import mooncake
from engines.vllm import metrics

from ..errors import NodeError, NodeTimeoutError
from ..settings import ProxySettings
from ..upstream.client import Deadline, Headers, NodeClient
from .fleet import Node, Pool
from .transfer import TransferWatch

logger = logging.getLogger("pd_proxy.health")

_LATE_IN_A_ROW = 3
"""A busy machine answers late now and then; requests have deadlines of their own, and breakers."""


class Prober:
    """Asks every node in turn of time, and tells the pool and the transfer watch."""

    def __init__(
        self,
        settings: ProxySettings,
        pool: Pool,
        watch: TransferWatch,
        node_headers: Headers,
        after_a_round: Callable[[], object],
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._watch = watch
        self._node_headers = node_headers
        self._after_a_round = after_a_round
        self._clients: dict[str, NodeClient] = {}
        """By the address probed: connections of their own, which no request waits for."""
        self._progress: dict[Node, tuple[metrics.Gauges, float]] = {}
        self._late: dict[Node, int] = {}
        """Probes in a row that were not answered in time."""

    async def run(self) -> None:
        """Probe for ever."""
        while True:
            await self.round()
            await asyncio.sleep(self._settings.probe_interval_s)

    async def round(self) -> None:
        """Probe every node once, all at the same time."""
        nodes = list(self._pool)
        self._progress = {node: seen for node, seen in self._progress.items() if node in nodes}
        self._late = {node: times for node, times in self._late.items() if node in nodes}
        self._watch.forget_all_but(nodes)
        await self.meet(nodes)
        self._after_a_round()

    async def meet(self, nodes: list[Node]) -> None:
        """Probe these once, all at the same time."""
        await asyncio.gather(*(self._probe(node) for node in nodes))

    async def close(self) -> None:
        for client in self._clients.values():
            client.close()

    async def _probe(self, node: Node) -> None:
        before = node.problem
        handed = node.all_handed_over  # before the look: these can be in its counters by now
        try:
            await self._get(node.spec.url, "/health")
            models = metrics.model_cards(orjson.loads(await self._get(node.spec.url, "/v1/models")))
            ranks = await self._identity(node)
            node.gauges = metrics.gauges((await self._get(node.spec.url, "/metrics")).decode("utf-8", "replace"))
            self._must_get_on(node)
        except _LateError as exc:
            self._late[node] = self._late.get(node, 0) + 1
            if node.problem is not None or self._late[node] >= _LATE_IN_A_ROW:
                node.failed(str(exc))
        except _ProbeError as exc:
            node.failed(str(exc))
        except (KeyError, TypeError, ValueError):
            node.failed("answers, but not as a vLLM server does")
        else:
            self._late.pop(node, None)
            misfit = self._pool.misfit(node, models)
            if misfit:
                node.failed(misfit)
            else:
                node.ready(ranks, models)
                self._watch.look(node, *handed)
        _log_change(node, before)

    async def _identity(self, node: Node) -> tuple[Rank, ...]:
        if node.spec.role is Role.DECODE or not self._pool.connector.has_bootstrap or node.spec.bootstrap is None:
            return ()
        ids = mooncake.engine_ids(orjson.loads(await self._get(node.spec.bootstrap, "/query", [])))
        if not ids:
            raise _ProbeError("its bootstrap server knows no worker yet")
        return tuple(Rank(number, engine_id, len(ids)) for number, engine_id in sorted(ids.items()))

    def _must_get_on(self, node: Node) -> None:
        now = time.monotonic()
        seen, since = self._progress.get(node, (node.gauges, now))
        if not node.gauges.running or _tokens(seen) != _tokens(node.gauges):
            self._progress[node] = node.gauges, now
            return
        self._progress[node] = seen, since
        limit_s = self._settings.decode_silence_timeout_s
        if node.spec.role is Role.PREFILL:  # it counts a prompt's tokens when all of them are computed
            limit_s = max(limit_s, self._settings.prefill_timeout_s)
        if now - since > limit_s:
            raise _ProbeError(f"has requests running and has made no token for {now - since:.0f} s")

    async def _get(self, base: str, path: str, headers: Headers | None = None) -> bytes:
        """`headers`: those for a node, its key among them, unless others are given."""
        client = self._clients.get(base)
        if client is None:
            client = self._clients[base] = NodeClient("probed", base, self._settings.probe_timeout_s)
        deadline = Deadline(self._settings.probe_timeout_s, "answer")
        given = self._node_headers if headers is None else headers
        whole_path = (urlsplit(base).path.rstrip("/") + path).encode()
        try:
            answer = await client.request(b"GET", whole_path, given, b"", deadline=deadline)
            try:
                raw = await answer.load()
            finally:
                answer.close()
        except NodeTimeoutError as exc:
            raise _LateError(f"no answer to {path} in {deadline.seconds:g} s") from exc
        except NodeError as exc:
            raise _ProbeError(f"cannot be reached for {path}") from exc
        if answer.status != 200:
            raise _ProbeError(f"answers {path} with {answer.status}")
        return raw


class _ProbeError(Exception):
    """What a probe found, in words for `/health`."""


class _LateError(_ProbeError):
    """It may be busy, and may be dead."""


def _tokens(gauges: metrics.Gauges) -> tuple[Any, ...]:
    return gauges.transferred, gauges.computed, gauges.generated


def _log_change(node: Node, before: str | None) -> None:
    if node.problem == before:
        return
    if node.problem is None:
        logger.info("node %s is usable", node.spec.name)
    else:
        logger.warning("node %s is not usable: %s", node.spec.name, node.problem)
