"""`/metrics`: the figures of all workers and each node's state, in Prometheus' format."""

import platform
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from engines.base import Role

from ..metrics import BETWEEN, EDGES_S, Counts, Metrics, Seconds
from ..nodes.fleet import Fleet
from ..nodes.transfer import TransferWatch
from ..routing.split import Split
from .board import Board


def own_version() -> str:
    """Of pd-launch, as it is installed."""
    try:
        return version("pd-launch")
    except PackageNotFoundError:
        return "unknown"


def text(  # noqa: PLR0913, PLR0917  all there is to tell
    metrics: Metrics, board: Board, fleet: Fleet, watch: TransferWatch, split: Split, down: Iterable[str]
) -> bytes:
    """The sum over all workers, and each node's state. `down`: background tasks that are not running now."""
    registry = CollectorRegistry()
    counted = [metrics.snapshot(), *(row["metrics"] for row in board.others(alive=False))]
    now = [metrics.snapshot(), *(row["metrics"] for row in board.others())]
    registry.register(_Own(metrics, counted, now))
    registry.register(_Nodes(fleet, watch))
    registry.register(_Crossover(split))
    registry.register(_Build(tuple(down)))
    if not board.is_shared:  # else each scrape would tell of another process
        ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Own(Collector):
    def __init__(self, metrics: Metrics, counted: list[Mapping[str, Any]], now: list[Mapping[str, Any]]) -> None:
        self._metrics = metrics
        self._counted = counted
        self._now = now

    def collect(self) -> Iterable[Metric]:
        for name, counts in self._metrics.of(Counts):
            counter = CounterMetricFamily(f"pd_{name}", counts.text, labels=counts.labels)
            for key, value in _summed(snapshot["counts"].get(name, {}) for snapshot in self._counted).items():
                counter.add_metric(key.split(BETWEEN), value)
            yield counter
        for name, value in _summed(snapshot["gauges"] for snapshot in self._now).items():
            yield GaugeMetricFamily(f"pd_{name}", f"{name.replace('_', ' ')}, now.", value=value)
        for name, seconds in self._metrics.of(Seconds):
            histogram = HistogramMetricFamily(f"pd_{name}", seconds.text, labels=seconds.labels)
            for key, series in _columns(snapshot["seconds"].get(name, {}) for snapshot in self._counted).items():
                *buckets, total = series
                labels = key.split(BETWEEN) if seconds.labels else []
                histogram.add_metric(labels, _cumulated(buckets), total)
            yield histogram


class _Crossover(Collector):
    """Of the worker that is asked: each learns its own."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def collect(self) -> Iterable[Metric]:
        tokens = self._split.crossover_tokens
        if tokens is not None:
            name, text = "pd_split_crossover_tokens", "Prompts shorter than this are answered by a decode node alone."
            yield GaugeMetricFamily(name, text, value=tokens)


class _Nodes(Collector):
    """Each node's state."""

    def __init__(self, fleet: Fleet, watch: TransferWatch) -> None:
        self._fleet = fleet
        self._watch = watch

    def collect(self) -> Iterable[Metric]:
        usable = GaugeMetricFamily("pd_node_usable", "1 when the node gets requests.", labels=["node", "role"])
        in_flight = GaugeMetricFamily("pd_node_in_flight", "Legs on the node now.", labels=["node", "role"])
        live = GaugeMetricFamily(
            "pd_node_live_tokens", "Of running requests, prompts and about what was generated.", labels=["node"]
        )
        now = time.monotonic()
        breaker = GaugeMetricFamily("pd_node_breaker_open", "1 when requests failed in a row.", labels=["node", "role"])
        for node in self._fleet:
            labels = [node.spec.name, node.spec.role.value]
            usable.add_metric(labels, float(node.usable))
            in_flight.add_metric(labels, node.load)
            breaker.add_metric(labels, float(node.breaker.is_open))
            if node.spec.role.does(Role.DECODE):
                live.add_metric(labels[:1], round(node.live_tokens(now)))
        held = GaugeMetricFamily(
            "pd_node_held_hand_offs", "Hand-offs whose KV a prefill node keeps for a decode node.", labels=["node"]
        )
        for node in self._fleet.of(Role.PREFILL):
            held.add_metric([node.spec.name], node.all_held)
        yield usable
        yield in_flight
        yield breaker
        yield live
        yield held
        yield self._fenced()
        yield from self._transfers()

    def _fenced(self) -> Metric:
        fenced = GaugeMetricFamily(
            "pd_pair_fenced", "1 when the KV canary's answers differ: no hand-offs.", labels=["prefill", "decode"]
        )
        for (prefill, decode), _ in self._fleet.pairs:
            fenced.add_metric(
                [prefill.spec.name, decode.spec.name], float(self._fleet.pairs.is_fenced(prefill, decode))
            )
        return fenced

    def _transfers(self) -> Iterable[Metric]:
        handed = CounterMetricFamily(
            "pd_hand_off_prompt_tokens", "Prompt tokens of the hand-offs the decode node took.", labels=["node"]
        )
        arrived = CounterMetricFamily(
            "pd_arrived_prompt_tokens", "Prompt tokens whose KV the decode node says it received.", labels=["node"]
        )
        moving = GaugeMetricFamily(
            "pd_kv_moving", "1 when KV moves to the decode node, 0 when it does not.", labels=["node"]
        )
        for node in self._fleet.of(Role.DECODE):
            handed.add_metric([node.spec.name], node.all_handed_over[1])
            arrived.add_metric([node.spec.name], self._watch.arrived(node))
            if self._watch.verdict(node) != "unproven":
                moving.add_metric([node.spec.name], float(self._watch.verdict(node) == "moving"))
        yield handed
        yield arrived
        yield moving


class _Build(Collector):
    """What runs, and which of its own tasks do not."""

    def __init__(self, down: tuple[str, ...]) -> None:
        self._down = down

    def collect(self) -> Iterable[Metric]:
        yield InfoMetricFamily(
            "pd_build", "What runs.", {"version": own_version(), "python": platform.python_version()}
        )
        tasks = GaugeMetricFamily("pd_tasks_down", "Background tasks that failed and are to be restarted.")
        tasks.add_metric([], len(self._down))
        yield tasks


def _summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0) + value
    return total


def _columns(parts: Iterable[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    total: dict[str, list[float]] = {}
    for part in parts:
        for key, series in part.items():
            before = total.get(key)
            total[key] = list(series) if before is None else [a + b for a, b in zip(before, series, strict=True)]
    return total


def _cumulated(buckets: list[float]) -> list[tuple[str, float]]:
    total, found = 0.0, []
    for edge, value in zip((*map(str, EDGES_S), "+Inf"), buckets, strict=True):
        total += value
        found.append((edge, total))
    return found
