"""What the application is made of, and the tasks that run as long as it does."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from engines.topology import Topology

from ..downstream.service import ConnectionLimits, Service
from ..exchange.canary import Canary
from ..exchange.media import Media
from ..exchange.memory import MemoryBudget
from ..exchange.parsing import Parser
from ..exchange.plane import DataPlane
from ..exchange.receive import Receiver
from ..exchange.release import Releaser
from ..exchange.retry import RetryBudget
from ..exchange.stored import StoredResponses
from ..metrics import Metrics
from ..nodes import topology
from ..nodes.clients import NodeClients
from ..nodes.fleet import Fleet, Limits
from ..nodes.pauses import Pauses
from ..nodes.prober import Prober
from ..nodes.topology import Stamp
from ..nodes.transfer import TransferWatch
from ..routing.decode import DecodeRouter
from ..routing.elastic import Elastic
from ..routing.prefill import PrefillRouter
from ..routing.split import Split
from ..settings import ProxySettings
from ..upstream.client import Headers
from . import admin, tls
from .admission import Admission
from .board import Board
from .condition import Condition
from .endpoint import Endpoint
from .keys import KeyRing
from .recent import Recent
from .sharing import Sharing
from .shutdown import Shutdown
from .supervision import Supervisor
from .view import View

if TYPE_CHECKING:
    from .tracing.tracing import Tracing

logger = logging.getLogger("pd_proxy.nodes")

_LOOK_AT_LOAD_EVERY_S = 1.0
_TRACES_AT_THE_END_S = 3.0
_AT_THE_END_S = 10.0
"""For what is on its way when the last client's answer is finished."""


class Components:
    """One worker's."""

    def __init__(self, settings: ProxySettings, nodes: Topology, applied: Stamp, board: Board) -> None:
        """`applied`: which writing of the topology file these nodes are from. Raises KeysError."""
        self.settings = settings
        self.board = board
        self._applied = applied
        limits = Limits(settings.max_node_in_flight, settings.max_node_waiting, settings.max_node_kv_usage)
        self.fleet = Fleet(nodes, limits, any_version=settings.any_version)
        self.keys = KeyRing(settings.api_keys, settings.api_keys_file)
        self.admission = Admission(settings, self.fleet.has_room)
        self.memory = MemoryBudget(settings.max_request_memory_bytes)
        self.watch = TransferWatch(self.fleet)
        self.pauses = Pauses()
        self.metrics = Metrics()
        self.supervisor = Supervisor(self.metrics)
        self.receiver = Receiver(Parser(), Media(settings))
        node_headers = _node_headers(settings)
        clients = NodeClients(self.fleet, settings.connect_timeout_s)
        json = (b"content-type", b"application/json")
        self.releaser = Releaser(self.fleet, clients, self.metrics, [json, *node_headers])
        self.stored = StoredResponses(self.fleet, clients, node_headers)
        decodes = DecodeRouter(self.fleet)
        self.plane = DataPlane(
            settings,
            self.fleet,
            clients,
            self.metrics,
            self.releaser,
            RetryBudget(),
            self.stored,
            PrefillRouter(settings.prefill_policy, self.fleet, decodes, board.journal),
            decodes,
            Split(settings.split == "when-faster"),
        )
        self.shutdown = Shutdown(settings)
        self.condition = Condition(settings, self.fleet, self.watch, self.supervisor, self.shutdown)
        self.tracing = _tracing(settings, self.metrics, self.fleet)
        self.recent = Recent(board.ended) if settings.admin_port else None
        self.endpoint = Endpoint(
            self.plane, self.keys, self.admission, self.receiver, self.memory, node_headers, self.recent, self.tracing
        )
        self.prober = Prober(settings, self.fleet, self.watch, node_headers, self.pauses, self._after_a_probe)
        self.sharing = Sharing(board, self.metrics, self.fleet, self.watch, self._update_gauges, self.admission.let_in)
        self.canary = Canary(self.plane, node_headers, self._is_closing, self.sharing.publish)
        self.elastic = Elastic(
            self.fleet, self.plane.prefills.backlog_s, settings.ttft_target_s, settings.tpot_target_s
        )
        self.service: Service | None = None

    def serve(self, service: Service) -> None:
        """Its connections are watched, and told when the process ends."""
        self.service = self.shutdown.service = service

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While this lasts the proxy serves."""
        await self.prober.probe_all(self.fleet)  # who accepts requests knows the nodes: a new worker may not refuse
        self._add_tasks()
        try:
            async with self.supervisor.running():
                with self.shutdown.announced():
                    yield
                await self.canary.close(within_s=min(self.shutdown.grace_left_s, _AT_THE_END_S))
                await self.releaser.close(within_s=min(self.shutdown.grace_left_s, _AT_THE_END_S))
        finally:
            await self.prober.close()
            await self.receiver.close()
            self.plane.clients.close()
            if self.tracing is not None:
                await asyncio.to_thread(self.tracing.close, _TRACES_AT_THE_END_S)
            self.board.close()

    def _add_tasks(self) -> None:
        settings, add = self.settings, self.supervisor.add
        add("prober", partial(self.sharing.lead, self.prober.run))
        if settings.canary_interval_s:
            add("KV canary", partial(self.sharing.lead, self.canary.run))
        add("roles of nodes", partial(self.sharing.lead, self._follow_load))
        add("event loop", partial(self.pauses.run, self._observe_loop))
        if self.service is not None:
            add("clients' connections", self.service.watch)
        if self.board.is_shared:
            add("board", self.sharing.run)
        if settings.topology_file:
            follow = partial(topology.follow, settings.topology_file, self._applied, self.fleet, self.prober.probe_all)
            add("topology", follow)
        if settings.api_keys_file:
            add("keys", self.keys.follow)
        if settings.tls_certificate and settings.tls_key:
            add("certificate", partial(tls.follow, settings.tls_certificate, settings.tls_key))
        if settings.admin_port and settings.topology_file and self.recent is not None:
            view = View(self.plane, self.watch, self.condition, self.board, self.recent)
            add("admin", partial(admin.serve, settings, view))

    def _is_closing(self) -> bool:
        return self.service is not None and self.service.is_closing

    async def _follow_load(self) -> None:
        while True:
            change = self.elastic.step()
            if change is not None:
                logger.info("%s", change)
                self.metrics.role_changes.count(change.reason)
                self.sharing.publish()
            await asyncio.sleep(_LOOK_AT_LOAD_EVERY_S)

    def _observe_loop(self, late_s: float) -> None:
        self.metrics.loop_lag_seconds.observe(late_s)
        self.metrics.tasks = len(asyncio.all_tasks())

    def _update_gauges(self) -> None:
        self.metrics.queued = self.admission.waiting
        self.metrics.request_memory_bytes = self.memory.used
        self.metrics.connections = len(self.service.connections) if self.service else 0

    def _after_a_probe(self) -> None:
        self.sharing.publish()
        self.admission.let_in()


def _tracing(settings: ProxySettings, metrics: Metrics, fleet: Fleet) -> "Tracing | None":
    if settings.otlp_traces_endpoint is None:
        return None
    from .tracing.tracing import Tracing  # noqa: PLC0415  an extra

    return Tracing(settings, settings.otlp_traces_endpoint, metrics, fleet)


def limits_of(settings: ProxySettings) -> ConnectionLimits:
    """Of a listener's connections."""
    return ConnectionLimits(
        settings.head_timeout_s,
        settings.body_timeout_s,
        settings.client_stall_timeout_s,
        settings.keep_alive_s,
        settings.max_connections,
    )


def _node_headers(settings: ProxySettings) -> Headers:
    """The proxy's own key for its nodes; a client's key never goes there."""
    key = settings.node_api_key
    return [(b"authorization", b"Bearer " + key.encode())] if key else []
