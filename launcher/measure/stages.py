"""Where the time of a round went, by what nodes and proxy count themselves, and which of them binds.

A node's queue ends when the engine takes the request into its batch. On a decode node that is when its KV has come
(vLLM, scheduler.py): how many wait for room alone is looked at now and then, and by Little's law is the time they wait.
"""

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

import httpx

from engines.base import NodeRole, Role
from engines.vllm import metrics

from ..plan.plan import NodeProcess, Plan
from .loadgen import Row
from .results import Figures, e2e
from .slo import Slo

_LOOK_EVERY_S = 1.0
_COUNTED_WITHIN_S = 15.0
_OF_THE_PROXY = ("queue", "prefill", "hand_off")
NAMES = (
    "proxy queue", "queue", "prefill queue", "prefill", "hand-off", "decode queue", "decode", "the rest",
)  # fmt: skip
"""In the order in which a request goes through them. The rest: on its way, in servers, behind the last token."""
Binding = Literal["prefill", "decode", "transfer", "proxy", "nodes"]
"""What is to be made faster, or more of. nodes: of an arm whose nodes are all alike."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All counters at one time."""

    phases: dict[str, dict[str, tuple[float, float]]]
    """Of each node."""
    proxy: dict[str, tuple[float, float]]
    transferred: float
    """Prompt tokens that came to decode nodes."""


@dataclass(slots=True)
class Looks:
    """What was seen of each node, now and then."""

    waiting: dict[str, list[float]] = field(default_factory=dict)
    kv_usage: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, text: str) -> None:
        self.waiting.setdefault(name, []).append(metrics.waiting_for_room(text))
        self.kv_usage.setdefault(name, []).append(metrics.kv_cache_usage(text))


@dataclass(frozen=True, slots=True)
class Stages:
    """Of one round."""

    seconds: dict[str, float]
    """Of a request in the mean, in each of `NAMES` that its arm has."""
    load: dict[str, dict[str, float]]
    """Of a node of each role, in the mean: requests that it computes, that wait for room, and its KV in use."""
    transferred: float
    """Prompt tokens that came to decode nodes."""


async def watched(plan: Plan, work: Awaitable[list[Row]]) -> tuple[list[Row], Snapshot, Snapshot, Looks]:
    """`work`, and what nodes and proxy say before, meanwhile and afterwards."""
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        before, looks = await snapshot(client, plan), Looks()
        looking = asyncio.create_task(_look(client, plan, looks))
        try:
            rows = await work
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
        return rows, before, await _settled(client, plan, before, rows), looks


async def snapshot(client: httpx.AsyncClient, plan: Plan) -> Snapshot:
    """Raises httpx.HTTPError."""
    texts = {node.name: (await client.get(f"{node.url}/metrics")).text for node in plan.nodes}
    told = (await client.get(f"{plan.proxy_url}/metrics")).text
    return Snapshot(
        {name: metrics.phases(text) for name, text in texts.items()},
        {name: metrics.histogram(told, f"pd_{name}_seconds") for name in _OF_THE_PROXY},
        sum(metrics.transferred_tokens(texts[node.name]) for node in plan.of(Role.DECODE)),
    )


async def _settled(client: httpx.AsyncClient, plan: Plan, before: Snapshot, rows: Sequence[Row]) -> Snapshot:
    """A node publishes its counters a moment after its answers."""
    handed = sum(row.prompt_tokens for row in rows if row.path == "disaggregated")
    after = await snapshot(client, plan)
    deadline = time.monotonic() + _COUNTED_WITHIN_S
    while after.transferred - before.transferred < handed and time.monotonic() < deadline:
        await asyncio.sleep(0.3)
        after = await snapshot(client, plan)
    return after


async def _look(client: httpx.AsyncClient, plan: Plan, looks: Looks) -> None:
    while True:
        for node in plan.nodes:
            try:
                looks.add(node.name, (await client.get(f"{node.url}/metrics")).text)
            except (httpx.HTTPError, ValueError):
                continue
        await asyncio.sleep(_LOOK_EVERY_S)


def stages(plan: Plan, rows: Sequence[Row], before: Snapshot, after: Snapshot, looks: Looks) -> Stages:
    """Of nodes that do both, whose counters mix what they do, the legs as the proxy saw them, queues included."""
    came = [row for row in rows if not row.problem]
    whole = fmean(map(e2e, came)) if came else 0.0
    if any(node.role is NodeRole.BOTH for node in plan.nodes):
        found = _by_the_proxy(before, after, came)
    else:
        found = _by_the_nodes(plan, rows, before, after, looks)
    found["the rest"] = max(whole - sum(found.values()), 0.0)
    load = _load(plan, rows, before, after, looks)
    return Stages(found, load, after.transferred - before.transferred)


def _by_the_proxy(before: Snapshot, after: Snapshot, came: Sequence[Row]) -> dict[str, float]:
    mean = {name: _mean(before.proxy[name], after.proxy[name]) for name in _OF_THE_PROXY}
    decode = fmean(row.last - row.first for row in came) if came else 0.0
    return {
        "proxy queue": mean["queue"], "prefill": mean["prefill"], "hand-off": mean["hand_off"], "decode": decode,
    }  # fmt: skip


def _by_the_nodes(plan: Plan, rows: Sequence[Row], before: Snapshot, after: Snapshot, looks: Looks) -> dict[str, float]:
    decodes, prefills = plan.of(Role.DECODE), plan.of(Role.PREFILL)
    at_decode = _phases(decodes, before, after)
    wall = max((row.ended for row in rows), default=0.0)
    waiting = sum(fmean(looks.waiting[node.name]) for node in decodes if looks.waiting.get(node.name))
    for_room = min(waiting * wall / max(len(rows), 1), at_decode["queue"])
    found = {"proxy queue": _mean(before.proxy["queue"], after.proxy["queue"])}
    if not prefills:
        return found | at_decode
    at_prefill = _phases(prefills, before, after)
    return found | {
        "prefill queue": at_prefill["queue"],
        "prefill": at_prefill["prefill"],
        "hand-off": at_decode["queue"] - for_room,
        "decode queue": for_room,
        "decode": at_decode["prefill"] + at_decode["decode"],
    }


def _phases(nodes: Sequence[NodeProcess], before: Snapshot, after: Snapshot) -> dict[str, float]:
    """Seconds of a request, in the mean over all nodes."""
    found = {}
    for phase in metrics.PHASES:
        pairs = [(before.phases[node.name][phase], after.phases[node.name][phase]) for node in nodes]
        summed = [sum(now[place] - then[place] for then, now in pairs) for place in (0, 1)]
        found[phase] = summed[0] / summed[1] if summed[1] else 0.0
    return found


def _mean(before: tuple[float, float], after: tuple[float, float]) -> float:
    number = after[1] - before[1]
    return (after[0] - before[0]) / number if number else 0.0


def _load(
    plan: Plan, rows: Sequence[Row], before: Snapshot, after: Snapshot, looks: Looks
) -> dict[str, dict[str, float]]:
    """What computes is the time that it took, by the time there was (Little's law): a prefill node's gauge, read after
    each step, shows no request of one step.
    """
    wall = max((row.ended for row in rows), default=0.0)
    found = {}
    for role in NodeRole:
        names = [node.name for node in plan.of_kind(role) if looks.waiting.get(node.name)]
        if names and wall:
            spent = sum(
                after.phases[name][phase][0] - before.phases[name][phase][0]
                for name in names
                for phase in ("prefill", "decode")
            )
            found[str(role)] = {
                "computing": spent / wall / len(names),
                "waiting": fmean(value for name in names for value in looks.waiting[name]),
                "kv_usage": fmean(value for name in names for value in looks.kv_usage[name]),
            }
    return found


def binding(found: Mapping[str, float], measured: Figures, slo: Slo) -> Binding:
    """What keeps goodput down: the limit that is missed by most, or comes nearest, and what takes most of its time."""
    strain = {
        "tpot": measured.tpot["p90"] / slo.tpot if slo.tpot else 0.0,
        "ttft": measured.ttft["p90"] / slo.ttft if slo.ttft else 0.0,
        "e2e": measured.e2e["p90"] / slo.e2e if slo.e2e else 0.0,
    }
    worst = max(strain, key=lambda name: strain[name])
    shares: dict[Binding, float] = {
        "proxy": found.get("proxy queue", 0.0),
        "prefill": found.get("prefill queue", 0.0) + found.get("prefill", 0.0),
        "transfer": found.get("hand-off", 0.0),
        "decode": found.get("decode queue", 0.0),
    }
    if "hand-off" not in found:  # one kind of nodes
        shares = {"proxy": shares["proxy"], "nodes": found.get("queue", 0.0) + shares["prefill"]}
        after_first: Binding = "nodes"
    else:
        after_first = "decode"
    if worst == "tpot":
        return after_first
    if worst == "e2e":
        shares[after_first] += found.get("decode", 0.0)
    return max(shares, key=lambda name: shares[name])
