"""Probes: is a node there, does it get on, what does it serve, and which life of it is this.

A node's `engine_id` is new with every start, and a decode node that is told an old one waits out the whole transfer
timeout. So identity is part of health: a prefill node is usable only with the ids its bootstrap server gives *now*.
A server that answers while its engine hangs is not well either: with requests running, tokens must come.

No answer of a node can end the prober: what cannot be understood is that node's problem.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import orjson

from engines.base import Gauges, Rank, Role
from engines.connectors import mooncake

from ..errors import NodeError, NodeTimeoutError
from ..settings import ProxySettings
from ..upstream.client import Headers, NodeClient
from ..upstream.deadline import Deadline
from .fleet import Fleet
from .node import Node
from .pauses import Pauses
from .transfer import TransferWatch

logger = logging.getLogger("pd_proxy.nodes")

_LATE_IN_A_ROW = 3
"""A busy machine answers late now and then; requests have deadlines of their own, and breakers."""

_SOONEST = 0.25
"""Of the probe interval: how soon after the last probe a closed connection may bring the next."""


class Prober:
    """Asks every node again and again, each at its own pace: one that hangs delays no other.

    The connection of the last probe is kept for the next, so that a death in between is heard at once.
    """

    def __init__(  # noqa: PLR0913, PLR0917  what it asks with, and whom it tells
        self,
        settings: ProxySettings,
        fleet: Fleet,
        watch: TransferWatch,
        node_headers: Headers,
        pauses: Pauses,
        after_a_probe: Callable[[], object],
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._watch = watch
        self._node_headers = node_headers
        self._pauses = pauses
        self._after_a_probe = after_a_probe
        self._clients: dict[str, NodeClient] = {}
        """By the address probed: connections of their own, which no request waits for."""
        self._progress: dict[Node, tuple[Gauges, float]] = {}
        self._late: dict[Node, int] = {}
        """Probes in a row that were not answered in time."""
        self._running: dict[Node, asyncio.Task[None]] = {}
        self._asked: list[Node] = []
        """Nodes that are being probed now; newcomers are, before they are in the fleet."""

    async def run(self) -> None:
        """Probe for ever."""
        while True:
            self._forget_the_gone()
            for node in self._fleet:
                self._begin(node)
            await asyncio.sleep(self._settings.probe_interval_s)

    async def probe_all(self, nodes: Iterable[Node]) -> None:
        """Probe these once, all at the same time."""
        await asyncio.gather(*(self.probe(node) for node in nodes))

    async def close(self) -> None:
        for task in tuple(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        for client in self._clients.values():
            client.close()

    async def probe(self, node: Node) -> None:
        """Ask a node all there is to ask, and note what was found. Raises nothing."""
        handed = node.all_handed_over  # before it is asked: these can be in its counters by now
        began = time.monotonic()
        self._asked.append(node)
        try:
            await self._ask(node)
        except _LateError as exc:
            self._note_late(node, str(exc), began)
        except _ProbeError as exc:
            node.failed(str(exc))
        except ValueError:
            node.failed(f"answers, but not as a {self._fleet.engine.name} server does")
        except Exception:
            logger.exception("the answers of node %s cannot be understood", node.spec.name)
            node.failed("its answers cannot be understood; the proxy's log tells more")
        else:
            self._late.pop(node, None)
            self._watch.observe(node, *handed)
        finally:
            self._asked.remove(node)
        node.probed_at = began
        self._fleet.compare()
        self._fleet.saw_usable()
        self._after_a_probe()

    def _begin(self, node: Node, wait_s: float = 0) -> None:
        if node not in self._running:
            self._running[node] = task = asyncio.create_task(self._probe_in(wait_s, node), name="probe")
            task.add_done_callback(lambda _: self._running.pop(node, None))

    async def _probe_in(self, wait_s: float, node: Node) -> None:
        await asyncio.sleep(wait_s)
        await self.probe(node)

    def _closed(self, address: str) -> None:
        """A server closed its connection: it may have died, and another life of it may be up before the next probe."""
        for node in self._fleet:
            if address in (node.spec.url, node.spec.bootstrap) and node.problem is None:
                soonest = node.probed_at + self._settings.probe_interval_s * _SOONEST
                self._begin(node, max(soonest - time.monotonic(), 0))

    async def _ask(self, node: Node) -> None:
        """Raises _ProbeError, ValueError."""
        engine, url = self._fleet.engine, node.spec.url
        await self._get(url, engine.health_path)
        models = await self._get(url, engine.models_path)
        version = await self._version(node)
        ranks = await self._identity(node)
        facts = engine.facts(models, await self._get(url, engine.metrics_path), version)
        self._must_get_on(node, facts.gauges)
        node.ready(ranks, facts)

    async def _version(self, node: Node) -> bytes:
        """It does not change within a life of the node."""
        if node.problem is None:
            return orjson.dumps({"version": node.version})
        try:
            return await self._get(node.spec.url, self._fleet.engine.version_path)
        except _AnsweredError:
            return b"{}"

    async def _identity(self, node: Node) -> tuple[Rank, ...]:
        if (
            not node.spec.role.does(Role.PREFILL)
            or not self._fleet.connector.has_bootstrap
            or node.spec.bootstrap is None
        ):
            return ()
        ids = mooncake.engine_ids(orjson.loads(await self._get(node.spec.bootstrap, "/query", [])))
        if not ids:
            raise _ProbeError("its bootstrap server knows no worker yet")
        return tuple(Rank(number, engine_id, len(ids)) for number, engine_id in sorted(ids.items()))

    def _note_late(self, node: Node, problem: str, began: float) -> None:
        """A probe that timed out while this process itself stood still says nothing of the node."""
        if self._pauses.stood_still_since(began) and node.problem is None:
            return
        self._late[node] = self._late.get(node, 0) + 1
        if node.problem is not None or self._late[node] >= _LATE_IN_A_ROW:
            node.failed(problem)

    def _must_get_on(self, node: Node, gauges: Gauges) -> None:
        now = time.monotonic()
        seen, since = self._progress.get(node, (gauges, now))
        if not gauges.running or _tokens(seen) != _tokens(gauges):
            self._progress[node] = gauges, now
            return
        self._progress[node] = seen, since
        limit_s = self._settings.decode_silence_timeout_s
        if node.spec.role.does(Role.PREFILL):  # it counts a prompt's tokens when all of them are computed
            limit_s = max(limit_s, self._settings.prefill_timeout_s)
        if now - since > limit_s:
            raise _ProbeError(f"has requests running and has made no token for {now - since:.0f} s")

    async def _get(self, base: str, path: str, headers: Headers | None = None) -> bytes:
        """`headers`: those for a node, its key among them, unless others are given. Raises _ProbeError."""
        client = self._clients.get(base)
        if client is None:
            client = NodeClient("probed", base, self._settings.probe_timeout_s, partial(self._closed, base))
            self._clients[base] = client
        deadline = Deadline(self._settings.probe_timeout_s, "answer")
        given = self._node_headers if headers is None else headers
        try:
            answer = await client.get((urlsplit(base).path.rstrip("/") + path).encode(), given, deadline)
            try:
                raw = await answer.load()
            finally:
                answer.close()
        except NodeTimeoutError as exc:
            raise _LateError(f"no answer to {path} in {deadline.seconds:g} s") from exc
        except NodeError as exc:
            if isinstance(exc.__cause__, TimeoutError):
                raise _LateError(f"no connection for {path} in {deadline.seconds:g} s") from exc
            raise _ProbeError(f"cannot be reached for {path}") from exc
        if answer.status != 200:
            raise _AnsweredError(f"answers {path} with {answer.status}")
        return raw

    def _forget_the_gone(self) -> None:
        nodes = {*self._fleet, *self._asked}
        addresses = {address for node in nodes for address in (node.spec.url, node.spec.bootstrap)}
        self._progress = {node: seen for node, seen in self._progress.items() if node in nodes}
        self._late = {node: times for node, times in self._late.items() if node in nodes}
        self._watch.forget_all_but(nodes)
        for address in self._clients.keys() - addresses:
            self._clients.pop(address).close()


class _ProbeError(Exception):
    """What a probe found, in words for `/health`."""


class _AnsweredError(_ProbeError):
    """An answer with another status than 200."""


class _LateError(_ProbeError):
    """It may be busy, and may be dead."""


def _tokens(gauges: Gauges) -> tuple[Any, ...]:
    return gauges.transferred, gauges.computed, gauges.generated
