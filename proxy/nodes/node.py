"""One node and what is known of it. No I/O: probes and exchanges report here."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from engines import topology
from engines.base import Gauges, JSONObject, NodeFacts, NodeRole, Rank, Role

from ..errors import NodeAnsweredError, NodeError, NodeRejectsKeyError, NodeUnreachableError
from .breaker import Breaker
from .live import LiveTokens

logger = logging.getLogger("pd_proxy.nodes")

NOT_PROBED = "not probed yet"


@dataclass(slots=True)
class Share:
    """A part of a node's load and history."""

    in_flight: int = 0
    hand_offs: int = 0
    handed_tokens: int = 0
    live_tokens: int = 0
    streams: int = 0
    held: int = 0


@dataclass(eq=False, slots=True)
class Node:
    """One node. Identity matters: two nodes are never equal."""

    spec: topology.Node
    problem: str | None = NOT_PROBED
    """What the last probe found, or the last attempt to connect; None when it was well."""
    misfit: str | None = None
    """What sets it apart from the other nodes, so that a hand-off between them would go wrong."""
    breaker: Breaker = field(default_factory=Breaker)
    """What requests found since."""
    ranks: tuple[Rank, ...] = ()
    """The data-parallel ranks of this life of a prefill node. Never kept over a failure."""
    models: tuple[JSONObject, ...] = ()
    """Its model cards, as its `/v1/models` lists them."""
    version: str = ""
    """Its engine's."""
    layout: Mapping[str, str] = field(default_factory=dict)
    """Of its KV cache: what must be equal on nodes between which KV moves."""
    cache_tokens: int | None = None
    """How many tokens of prompts it can keep for the next ones; None when it does not say."""
    gauges: Gauges = field(default_factory=Gauges)
    """Its own figures, as of the last probe."""
    in_flight: int = 0
    held: int = 0
    """Hand-offs whose KV it keeps for a decode node."""
    hand_offs: int = 0
    handed_tokens: int = 0
    """Hand-offs this decode node took, and their prompts' tokens."""
    live: LiveTokens = field(default_factory=LiveTokens)
    """KV that running requests hold here."""
    elsewhere: Share = field(default_factory=Share)
    """What the proxy's other worker processes have of these."""
    life: int = 0
    """Grows with every start of it that is noticed."""
    probed_at: float = 0.0
    """When the last probe of it that ended had begun, on the monotonic clock."""
    failed_at: float = 0.0
    """When it was last found to fail, on the monotonic clock: what was seen before then counts no more."""
    leaning: Role | None = None
    """What a node that does both is asked for first, for now (`routing/elastic.py`); None for the others."""
    _turn: int = 0

    def __repr__(self) -> str:
        return f"<node {self.spec.name}: {self.why_not or 'usable'}, {self.load} in flight>"

    @property
    def names(self) -> frozenset[str]:
        """Of the models it lists."""
        return frozenset(card["id"] for card in self.models)

    def leans_to(self, role: Role) -> bool:
        """It is there for this, first of all."""
        return self.leaning is role if self.spec.role is NodeRole.BOTH else self.spec.role.does(role)

    @property
    def load(self) -> int:
        """Requests on it, from all workers."""
        return self.in_flight + self.elsewhere.in_flight

    @property
    def all_held(self) -> int:
        """Hand-offs whose KV it keeps, of all workers."""
        return self.held + self.elsewhere.held

    def live_tokens(self, now: float) -> float:
        """Of running requests, prompts and answers so far, from all workers."""
        return self.live.count(now) + self.elsewhere.live_tokens

    @property
    def all_handed_over(self) -> tuple[int, int]:
        """Hand-offs it took, and their prompts' tokens, from all workers."""
        return self.hand_offs + self.elsewhere.hand_offs, self.handed_tokens + self.elsewhere.handed_tokens

    @property
    def is_well(self) -> bool:
        """Fit to finish what it has begun."""
        return self.problem is None and self.misfit is None

    @property
    def usable(self) -> bool:
        """Fit for what is new."""
        return self.problem is None and self.misfit is None and not self.spec.drain

    @property
    def why_not(self) -> str | None:
        """Why it gets no requests; None when it does."""
        return self.problem or self.misfit or ("draining" if self.spec.drain else None)

    def ready(self, ranks: tuple[Rank, ...], facts: NodeFacts) -> None:
        """A probe found it well."""
        if self.problem is not None:
            self.breaker = Breaker()  # another life of it, perhaps
            logger.info("node %s is usable", self.spec.name)
        if self.problem is not None or self.ranks != ranks:
            self.life += 1
        self.problem, self.ranks = None, ranks
        self.models, self.version, self.gauges = facts.models, facts.version, facts.gauges
        self.layout, self.cache_tokens = facts.layout, facts.cache_tokens

    def failed(self, problem: str) -> None:
        """No requests until a probe finds it well, and its identity with it."""
        if problem != self.problem:
            logger.warning("node %s is not usable: %s", self.spec.name, problem)
        self.problem, self.ranks, self.failed_at = problem, (), time.monotonic()

    def fits(self, misfit: str | None) -> None:
        """Whether it belongs to the other nodes; `misfit` says why not."""
        if misfit != self.misfit:
            level, words = (logging.WARNING, misfit) if misfit else (logging.INFO, "it fits the other nodes now")
            logger.log(level, "node %s: %s", self.spec.name, words)
        self.misfit = misfit

    def record_failure(self, error: NodeError) -> None:
        """A request failed here. One failure may be the request's; no connection, or several in a row, are the node's.

        A node that asks to be left alone for a while (Retry-After) is, and has not failed.
        """
        if isinstance(error, NodeUnreachableError):
            self.failed(str(error))
        elif isinstance(error, NodeAnsweredError) and error.retry_after_s is not None:
            self.breaker.rest(error.retry_after_s)
        elif not isinstance(error, NodeRejectsKeyError) and (
            not isinstance(error, NodeAnsweredError) or error.status != 429
        ):
            was_open = self.breaker.is_open
            self.breaker.record_failure()
            if self.breaker.is_open and not was_open:
                logger.warning("node %s: circuit breaker open after failures in a row: %s", self.spec.name, error)

    def next_rank(self) -> Rank | None:
        """The hand-off target of the next request; None for a connector whose nodes have no identity to know."""
        if not self.ranks:
            return None
        self._turn = (self._turn + 1) % len(self.ranks)
        return self.ranks[self._turn]

    def handed_over(self, prompt_tokens: int) -> None:
        """It took a hand-off: its first event came."""
        self.hand_offs += 1
        self.handed_tokens += prompt_tokens

    def lease(self, *, for_request: bool = False, tokens: int = 0) -> "Lease":
        """Count one request on this node, for as long as it lasts. `for_request`: a client's; the breaker counts it.
        `tokens`: of its prompt, where its KV stays as long.
        """
        return Lease(self, for_request=for_request, tokens=tokens)


class Lease:
    """One request on a node; a context manager. `move` takes it to another node."""

    __slots__ = ("_began", "_for_request", "_is_trial", "_tokens", "node")

    def __init__(self, node: Node, *, for_request: bool, tokens: int) -> None:
        self.node = node
        self._for_request = for_request
        self._is_trial = False
        self._tokens = tokens
        self._began: float | None = None

    def __enter__(self) -> Self:
        self.node.in_flight += 1
        self.node.live.prompts += self._tokens
        self._is_trial = self._for_request and self.node.breaker.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.node.in_flight -= 1
        self.node.live.prompts -= self._tokens
        if self._began is not None:
            self.node.live.end(self._began)
            self._began = None
        if self._is_trial:
            self.node.breaker.end_trial()

    def holds(self, tokens: int) -> None:
        """What its prompt has, now that it is known."""
        self.node.live.prompts += tokens - self._tokens
        self._tokens = tokens

    def generates(self) -> None:
        """Its first token is there, and others follow."""
        if self._began is None:
            self._began = time.monotonic()
            self.node.live.begin(self._began)

    def move(self, node: Node) -> None:
        """The request goes on at another node."""
        self.__exit__()
        self.node = node
        self.__enter__()
