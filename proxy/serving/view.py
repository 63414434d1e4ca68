"""What the page and `pd-launch status` show of nodes, hand-offs and requests: one picture a second, whoever looks.

Looked at every second while the proxy serves, so that changes have a time: a node that goes or comes, a drain, a role.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engines.base import JSONObject, Role

from ..exchange.plane import DataPlane
from ..exchange.record import Record
from ..nodes.fleet import Fleet
from ..nodes.node import Node
from ..nodes.transfer import TransferWatch
from .board import Board
from .condition import Condition
from .exposition import own_version
from .recent import Recent

_LOOK_EVERY_S = 1.0
_FRESH_S = 0.5
_MARKS_KEPT = 200
_LATELY_S = 60.0
"""What rates and latencies are of."""
_LOG_BYTES = 64 * 1024
_LOG_LINES = 200


@dataclass(slots=True)
class _Seen:
    """A node at the last look."""

    state: str
    since: float
    """Seconds since 1970."""
    life: int
    leaning: Role | None
    kv: str
    tokens: float = 0.0
    probed_at: float = 0.0
    tokens_s: float = 0.0
    """Prompt tokens computed, or tokens generated, a second, between the last two probes."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that changed."""

    at: float
    """Seconds since 1970."""
    node: str
    kind: str
    """up, down, drain, role, life, kv, fleet."""
    text: str


@dataclass(slots=True)
class _Lately:
    """Of the requests of the last minute."""

    seconds: float = _LATELY_S
    requests: int = 0
    failed: int = 0
    first_events: list[float] = field(default_factory=list)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Hand-offs, prefill node to decode node."""


class View:
    """Of one proxy, all workers together."""

    def __init__(
        self, plane: DataPlane, watch: TransferWatch, condition: Condition, board: Board, recent: Recent
    ) -> None:
        self.recent = recent
        self._plane = plane
        self._watch = watch
        self._condition = condition
        self._board = board
        self._seen: dict[Node, _Seen] = {}
        self._marks: deque[Mark] = deque(maxlen=_MARKS_KEPT)
        self._state: JSONObject = {}
        self._made_at = -_FRESH_S
        self._looked = asyncio.Event()

    @property
    def fleet(self) -> Fleet:
        return self._plane.fleet

    async def run(self) -> None:
        """Look for ever."""
        while True:
            self.recent.read_the_others()
            self._note_changes()
            self._looked.set()
            self._looked = asyncio.Event()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def next(self) -> JSONObject:
        """The picture of the next look."""
        await self._looked.wait()
        return self.state

    @property
    def state(self) -> JSONObject:
        """As of now, or of a moment ago: it is made when somebody looks, and once for all who do."""
        if time.monotonic() - self._made_at > _FRESH_S:
            self._made_at = time.monotonic()
            self._note_changes()
            self._state = self._looked_at(time.time())  # noqa: TID251  for people
        return self._state

    def log_of(self, name: str) -> Path | None:
        return next((node.spec.log for node in self.fleet if node.spec.name == name), None)

    # -- changes

    def _note_changes(self) -> None:
        now = time.time()  # noqa: TID251  for people
        is_first = not self._seen
        for node in self._seen.keys() - set(self.fleet):
            del self._seen[node]
            self._mark(now, node, "fleet", "was removed")
        for node in self.fleet:
            seen, state = self._seen.get(node), _state(node)
            kv = self._watch.verdict(node) if node.spec.role.does(Role.DECODE) else ""
            if seen is None:
                self._seen[node] = _Seen(state, now, node.life, node.leaning, kv)
                if not is_first:
                    self._mark(now, node, "fleet", "was added")
                continue
            self._note_rate(node, seen)
            if state != seen.state:
                kind = {"usable": "up", "draining": "drain"}.get(state, "down")
                self._mark(now, node, kind, state if kind != "down" else f"is not usable: {state}")
                seen.state, seen.since = state, now
            elif node.life != seen.life:
                self._mark(now, node, "life", "has started again")
            if node.leaning is not None and node.leaning != seen.leaning:
                self._mark(now, node, "role", f"turns to {node.leaning}")
            if kv not in (seen.kv, "unproven"):
                self._mark(now, node, "kv", f"KV is {kv}")
            seen.life, seen.leaning, seen.kv = node.life, node.leaning, kv
        for record in self.recent.since(_LOOK_EVERY_S):
            self._note_errors(record)

    def _note_rate(self, node: Node, seen: _Seen) -> None:
        does = node.leaning or Role(node.spec.role.value)
        tokens = node.gauges.computed if does is Role.PREFILL else node.gauges.generated
        if node.probed_at > seen.probed_at:
            since = node.probed_at - seen.probed_at
            seen.tokens_s = max(tokens - seen.tokens, 0.0) / since if seen.probed_at else 0.0
            seen.tokens, seen.probed_at = tokens, node.probed_at

    def _note_errors(self, record: Record) -> None:
        for failure in record.failures:
            name, _, kind = failure.rpartition(":")
            for node, seen in self._seen.items():
                if node.spec.name == name:
                    seen.error = f"{kind}: {record.error or 'another node answered'}"

    def _mark(self, now: float, node: Node, kind: str, text: str) -> None:
        self._marks.append(Mark(round(now, 1), node.spec.name, kind, text))

    # -- the picture

    def _looked_at(self, now: float) -> JSONObject:
        lately = self._lately()
        return {
            "at": round(now, 1),
            "version": own_version(),
            "status": self._condition.word(),
            "models": [card["id"] for card in self.fleet.models()][:8],
            "moves_kv": self.fleet.connector.moves_kv,
            "proxy": self._own_figures(lately),
            "nodes": [self._node(node) for node in self.fleet],
            "pairs": [
                {"prefill": one, "decode": other, "a_second": round(count / lately.seconds, 2)}
                for (one, other), count in lately.pairs.most_common(64)
            ],
            "fenced": [
                {"prefill": prefill.spec.name, "decode": decode.spec.name}
                for (prefill, decode), _ in self.fleet.pairs
                if self.fleet.pairs.is_fenced(prefill, decode)
            ],
            "marks": [asdict(mark) for mark in self._marks],
            "ended": self.recent.number,
        }

    def _own_figures(self, lately: _Lately) -> JSONObject:
        snapshots = [self._plane.metrics.snapshot(), *(row["metrics"] for row in self._board.others())]
        gauges: Counter[str] = Counter()
        for snapshot in snapshots:
            gauges.update(snapshot["gauges"])
        waits = sorted(lately.first_events)
        return {
            "in_flight": gauges["requests_in_flight"],
            "queued": gauges["requests_queued"],
            "requests_a_second": round(lately.requests / lately.seconds, 2),
            "failed": lately.failed,
            "ttft_p50_s": _percentile(waits, 0.5),
            "ttft_p99_s": _percentile(waits, 0.99),
        }

    def _node(self, node: Node) -> JSONObject:
        seen, spec, gauges = self._seen[node], node.spec, node.gauges
        found = {
            "name": spec.name,
            "role": spec.role.value,
            "leaning": node.leaning,
            "url": spec.url,
            "usable": node.usable,
            "state": seen.state,
            "since": round(seen.since, 1),
            "drain": spec.drain,
            "breaker_open": node.breaker.is_open,
            "in_flight": node.load,
            "running": gauges.running,
            "waiting": gauges.waiting,
            "kv_usage": round(gauges.kv_usage, 4),
            "held": node.all_held,
            "hand_offs": node.all_handed_over[0],
            "tokens_a_second": round(seen.tokens_s, 1),
            "kv": seen.kv,
            "error": seen.error,
            "finding": spec.finding,
            "has_log": spec.log is not None,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _lately(self) -> _Lately:
        """Of a minute, or of as long as the records reach back."""
        found, oldest = _Lately(), _LATELY_S
        for record in self.recent.since(_LATELY_S):
            found.requests += 1
            found.failed += record.status >= 500
            if record.first_event:
                found.first_events.append(record.first_event_s)
            oldest = time.perf_counter() - record.ended
            found.pairs.update(_hand_offs(record))
        if self.recent.is_full:
            found.seconds = min(max(oldest, 1.0), _LATELY_S)
        return found


def tail(file: Path) -> str:
    """The last lines of a log. Raises OSError."""
    with file.open("rb") as opened:
        opened.seek(0, 2)
        opened.seek(max(0, opened.tell() - _LOG_BYTES))
        lines = opened.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-_LOG_LINES:])


def _state(node: Node) -> str:
    return node.why_not or "usable"


def _hand_offs(record: Record) -> Iterator[tuple[str, str]]:
    """(prefill node, decode node) of each that was taken."""
    holders: dict[str, str] = {}
    for stage in record.stages:
        if stage.name == "prefill":
            holders[stage.part] = stage.node
        elif stage.name == "hand-off" and not stage.problem and stage.part in holders:
            yield holders[stage.part], stage.node


def _percentile(ordered: list[float], share: float) -> float | None:
    return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 4) if ordered else None
