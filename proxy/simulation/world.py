"""Requests, nodes in virtual time, and the proxy's own routers between them."""

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engines import topology
from engines.base import Gauges, NodeFacts, NodeRole, Prefilled, Role
from engines.performance import Constants

from ..nodes.fleet import Fleet, Limits
from ..nodes.node import Node
from ..routing.decode import DecodeRouter
from ..routing.prefill import PrefillRouter
from ..routing.prompts import Prompt
from .engines import DecodeEngine, Job, PrefillEngine

_NO_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """How many nodes of each kind; ordinary ones hand nothing over."""

    prefill: int = 0
    decode: int = 0
    ordinary: int = 0


class World:
    """One deployment, played once."""

    def __init__(self, shape: Shape, constants: Constants) -> None:
        self._shape = shape
        self._constants = constants
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.now = 0.0
        self._fleet = _fleet(shape, constants)
        self._prefills = PrefillRouter("prefix-cost", self._fleet, clock=lambda: self.now)
        self._decodes = DecodeRouter(self._fleet, clock=lambda: self.now)
        self._prefill_engines = {node: PrefillEngine(constants, self._at) for node in self._fleet.of(Role.PREFILL)}
        self._decode_engines = {
            node: DecodeEngine(constants, self._at, caches=bool(shape.ordinary)) for node in self._fleet.of(Role.DECODE)
        }

    def play(self, jobs: Sequence[Job]) -> None:
        """Every request to its end; what became of it is in it."""
        for job in jobs:
            self._at(job.due, lambda job=job: self._come(job))  # type: ignore[misc]
        while self._events:
            self.now, _, happen = heapq.heappop(self._events)
            happen()

    def busy(self, seconds: float) -> dict[str, float]:
        """The share of the time that nodes of each kind had work."""
        spent = {
            "prefill": [engine.busy_s for engine in self._prefill_engines.values()],
            "ordinary" if self._shape.ordinary else "decode": [one.busy_s for one in self._decode_engines.values()],
        }
        return {name: sum(some) / (len(some) * max(seconds, 1e-9)) for name, some in spent.items() if some}

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), happen))

    def _come(self, job: Job) -> None:
        prompt = Prompt(job.keys, max(job.tokens / job.piece_tokens, 1.0), job.tokens)
        decode = self._decodes.choose(prompt)
        decode.live.prompts += job.tokens
        if not self._prefill_engines:
            self._decodes.has(decode, prompt)
            self._answer(job, decode, has_kv=False)
            return
        prefill = self._prefills.choose(prompt, partner=decode)
        sent = self._prefills.sent(prefill, None, prompt)
        sent.__enter__()

        def computed(cached: float) -> None:
            sent.prefilled = Prefilled({}, job.tokens, int(cached))
            sent.__exit__()
            job.stages["hand-off"] = self._constants.hand_off_s(job.tokens)
            self._at(self.now + job.stages["hand-off"], lambda: self._answer(job, decode, has_kv=True))

        self._prefill_engines[prefill].prefill(job, self.now, computed)

    def _answer(self, job: Job, node: Node, *, has_kv: bool) -> None:
        began = self.now
        node.live.begin(began)

        def done() -> None:
            node.live.prompts -= job.tokens
            node.live.end(began)
            if job.output > 1:
                node.live.measured((job.ended - job.first) / (job.output - 1))

        self._decode_engines[node].answer(job, self.now, done, has_kv=has_kv)


def _fleet(shape: Shape, constants: Constants) -> Fleet:
    """All of them usable, without a look at any."""
    specs = [
        topology.Node(
            name=f"{role}-{number}",
            role=role,
            url=f"http://{role}-{number}:1",
            bootstrap=f"http://{role}-{number}:2" if role is NodeRole.PREFILL else None,
        )
        for role, numbers in ((NodeRole.PREFILL, shape.prefill), (NodeRole.DECODE, shape.decode + shape.ordinary))
        for number in range(numbers)
    ]
    connector = "none" if shape.ordinary else "MooncakeConnector"
    fleet = Fleet(topology.Topology(connector=connector, engine="sim", nodes=tuple(specs)), Limits(in_flight=_NO_LIMIT))
    for node in fleet:
        caches = bool(shape.ordinary) or node.spec.role is NodeRole.PREFILL
        node.ready((), NodeFacts((), Gauges(), "sim", cache_tokens=constants.kv_tokens if caches else 0))
    return fleet
