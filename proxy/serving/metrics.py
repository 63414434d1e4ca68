"""The proxy's own figures, under `pd_`. Observed once at the end of an exchange, never for a chunk.

Kept as plain numbers, and put into Prometheus' words when somebody asks: the client library takes a lock for every
count, and a worker process must hand its figures to the others (`board.py`), which numbers can be.
"""

import asyncio
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engines.base import Role

from ..nodes.fleet import Pool
from ..nodes.transfer import TransferWatch
from .board import Board

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_LOOK_EVERY_S = 0.5
_BETWEEN = "\n"
"""Between the label values of one count, in a key."""


class Counts:
    """A counter with labels. Their values come from us, never from a client: the number of series is bounded."""

    def __init__(self, text: str, *labels: str) -> None:
        self.text = text
        self.labels = labels
        self.values: dict[str, float] = {}

    def count(self, *labels: str) -> None:
        key = _BETWEEN.join(labels)
        self.values[key] = self.values.get(key, 0) + 1


class Seconds:
    """A histogram of durations."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.buckets = [0] * (len(_SECONDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.buckets[bisect_left(_SECONDS, seconds)] += 1
        self.sum += seconds


class Metrics:
    """What this process has counted."""

    def __init__(self) -> None:
        self.requests = Counts("Client requests by route, path taken and status.", "route", "path", "status")
        self.hand_offs = Counts("Prefill legs that held KV for a decode leg, by what became of it.", "outcome")
        self.aggregated = Counts("Requests answered by one node as a whole, by reason.", "reason")
        self.releases = Counts("Hand-offs given back because no decode node took them.", "outcome")
        self.node_requests = Counts("Requests sent to a node: legs, attempts, continuations.", "node")
        self.node_errors = Counts("Failures of a node, by kind.", "node", "kind")
        self.retries = Counts("Attempts after the first, by what made them necessary.", "reason")
        self.resumed = Counts("Streams that lost their node in the middle, by whether they went on.", "outcome")
        self.in_flight = 0
        self.queued = 0
        self.releases_pending = 0
        self.tasks = 0
        self.prefill_seconds = Seconds("Prefill leg, request to answer.")
        self.time_to_first_event_seconds = Seconds("Client request to the first byte of decode's answer.")
        self.hand_off_seconds = Seconds("Decode leg, request to first event: its queue, the KV's way, the first step.")
        self.mean_inter_token_seconds = Seconds("Time between two tokens of a stream, its mean.")
        self.loop_lag_seconds = Seconds("How late a timer of the event loop was: what every stream waits for.")
        self.request_seconds = Seconds("Client request to the end of its answer.")

    def snapshot(self) -> dict[str, Any]:
        """All of it as JSON-able data, to be summed with that of other workers."""
        return {
            "counts": {name: counts.values for name, counts in self._of(Counts)},
            "gauges": {
                "requests_in_flight": self.in_flight,
                "requests_queued": self.queued,
                "releases_pending": self.releases_pending,
                "tasks": self.tasks,
            },
            "seconds": {name: [*seconds.buckets, seconds.sum] for name, seconds in self._of(Seconds)},
        }

    def _of(self, kind: Any) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in vars(self).items() if isinstance(value, kind)]

    def adopt(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from the counts of a worker that died."""
        for name, counts in self._of(Counts):
            counts.values = dict(snapshot["counts"][name])
        for name, seconds in self._of(Seconds):
            *seconds.buckets, seconds.sum = snapshot["seconds"][name]

    def text(self, board: Board, pool: Pool, watch: TransferWatch) -> bytes:
        """In Prometheus' format: the sum over all workers, and each node's state."""
        registry = CollectorRegistry()
        counted = [self.snapshot(), *(row["metrics"] for row in board.others(alive=False))]
        now = [self.snapshot(), *(row["metrics"] for row in board.others())]
        registry.register(_Own(self, counted, now))
        registry.register(_Nodes(pool, watch))
        return generate_latest(registry)


async def observe_loop(metrics: Metrics) -> None:
    """For ever: how much later than asked for the event loop comes back, and how many tasks it has."""
    while True:
        due = time.monotonic() + _LOOK_EVERY_S
        await asyncio.sleep(_LOOK_EVERY_S)
        metrics.loop_lag_seconds.observe(max(0.0, time.monotonic() - due))
        metrics.tasks = len(asyncio.all_tasks())


class _Own(Collector):
    def __init__(self, metrics: Metrics, counted: list[Mapping[str, Any]], now: list[Mapping[str, Any]]) -> None:
        self._metrics = metrics
        self._counted = counted
        self._now = now

    def collect(self) -> Iterable[Metric]:
        for name, counts in self._metrics._of(Counts):  # noqa: SLF001  one unit
            counter = CounterMetricFamily(f"pd_{name}", counts.text, labels=counts.labels)
            for key, value in _summed(snapshot["counts"][name] for snapshot in self._counted).items():
                counter.add_metric(key.split(_BETWEEN), value)
            yield counter
        for name, value in _summed(snapshot["gauges"] for snapshot in self._now).items():
            yield GaugeMetricFamily(f"pd_{name}", f"{name.replace('_', ' ')}, now.", value=value)
        for name, seconds in self._metrics._of(Seconds):  # noqa: SLF001
            columns = zip(*(snapshot["seconds"][name] for snapshot in self._counted), strict=True)
            *buckets, total = (sum(column) for column in columns)
            yield HistogramMetricFamily(f"pd_{name}", seconds.text, buckets=_cumulated(buckets), sum_value=total)


class _Nodes(Collector):
    """Each node's state."""

    def __init__(self, pool: Pool, watch: TransferWatch) -> None:
        self._pool = pool
        self._watch = watch

    def collect(self) -> Iterable[Metric]:
        usable = GaugeMetricFamily("pd_node_usable", "1 when the node gets requests.", labels=["node", "role"])
        in_flight = GaugeMetricFamily("pd_node_in_flight", "Legs on the node now.", labels=["node", "role"])
        breaker = GaugeMetricFamily("pd_node_breaker_open", "1 when requests failed in a row.", labels=["node", "role"])
        for node in self._pool:
            labels = [node.spec.name, node.spec.role.value]
            usable.add_metric(labels, float(node.usable))
            in_flight.add_metric(labels, node.load)
            breaker.add_metric(labels, float(node.breaker.is_open))
        yield usable
        yield in_flight
        yield breaker
        yield from self._transfers()

    def _transfers(self) -> Iterable[Metric]:
        handed = CounterMetricFamily(
            "pd_hand_off_prompt_tokens", "Prompt tokens of the hand-offs the decode node answered.", labels=["node"]
        )
        arrived = CounterMetricFamily(
            "pd_arrived_prompt_tokens", "Prompt tokens whose KV the decode node says it received.", labels=["node"]
        )
        moving = GaugeMetricFamily(
            "pd_kv_moving", "1 when KV moves to the decode node, 0 when it does not.", labels=["node"]
        )
        for node in self._pool.of(Role.DECODE):
            handed.add_metric([node.spec.name], node.all_handed_over[1])
            arrived.add_metric([node.spec.name], self._watch.arrived(node))
            if self._watch.verdict(node) != "unproven":
                moving.add_metric([node.spec.name], float(self._watch.verdict(node) == "moving"))
        yield handed
        yield arrived
        yield moving


def _summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0) + value
    return total


def _cumulated(buckets: list[float]) -> list[tuple[str, float]]:
    total, found = 0.0, []
    for edge, value in zip((*map(str, _SECONDS), "+Inf"), buckets, strict=True):
        total += value
        found.append((edge, total))
    return found
