"""Which prefill node, and which of its data-parallel ranks, computes a prompt. The policies are one function each.

`prefix-cost` (ROUTING.md, A6): the one where the request is through first, and others are kept waiting least. Its
cost on a node is the node's backlog plus the price of what the node would have to compute for it, in seconds. At the
price of 1 each request goes where it ends first itself, computes anew what is cached elsewhere, and all behind it pay
for that; so work costs more the more is waiting.
"""

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol, Self

from engines.base import JSONObject, Prefilled, Rank, Role

from ..nodes.fleet import Fleet
from ..nodes.node import Node
from .backlog import FIRST_RATE, Backlog
from .decode import DecodeRouter
from .policy import Cost, choose, fewest_requests
from .prefixes import Expected, PrefixModel
from .prompts import Prompt, prompt_of, without_keys

_IDLE_PRICE = 1.5
_HIGHEST_PRICE = 8.0
_ALIKE = 2.0
"""Rates of nodes that differ by less are taken to be one: of equal nodes the one that finds more in its cache measures
less, for what every prefill takes is then more of its time, and it must not lose its conversations for that.
"""
_MOST_WRONG = 8.0
"""How many times more, or fewer, tokens a guess may be corrected to."""
_WEIGHT = 0.05
"""Of the newest prompt in the correction of guesses."""
_BLOCK_TOKENS = 16
"""vLLM's block on GPUs; what is cached is a multiple of a block."""


@dataclass(slots=True)
class Queue:
    """One rank of a node."""

    prefixes: PrefixModel = field(default_factory=PrefixModel)
    backlog: Backlog = field(default_factory=Backlog)


@dataclass(slots=True)
class _Known:
    """What is known of a node in one life of it."""

    life: int
    queues: dict[int, Queue] = field(default_factory=dict)


@dataclass(slots=True)
class _UnderWay:
    """A prefill that was sent and has not ended."""

    node: Node
    queue: Queue
    prompt: Prompt
    expected: Expected
    number: int


class Notices(Protocol):
    """What the worker processes of one proxy tell each other at once (`serving/journal.py`)."""

    def write(self, data: Any, keys: tuple[int, ...] = ()) -> None: ...

    def read(self) -> Iterator[tuple[int, tuple[Any, tuple[int, ...]] | None]]:
        """(worker, notice); None in the place of one when some were missed, or the worker is another now."""


@dataclass(slots=True)
class Audit:
    """A prediction beside the truth, in tokens of the prompt."""

    predicted: int
    cached: int
    outcome: str
    """as-predicted, less, more."""


class Sent:
    """A prefill under way, on this process's account; a context manager."""

    __slots__ = ("_end", "audit", "prefilled")

    def __init__(self, end: "Callable[[Prefilled | None], Audit | None]") -> None:
        self._end = end
        self.prefilled: Prefilled | None = None
        """To be set when it has ended well."""
        self.audit: Audit | None = None
        """Afterwards, where something was predicted and the node has said what was so."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.audit = self._end(self.prefilled)


class PrefillRouter:
    """What all requests of this process share."""

    def __init__(
        self,
        policy: str,
        fleet: Fleet,
        decodes: DecodeRouter | None = None,
        notices: Notices | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`policy`: prefix-cost, least-load or round-robin; `notices`: to and from the other worker processes, for
        `decodes` too.
        """
        self._fleet = fleet
        self._notices = notices
        self._now = clock
        self._told = 0
        self._others: dict[tuple[int, int], _UnderWay] = {}
        """What the other workers have under way: by worker, and its number there."""
        self._known: dict[Node, _Known] = {}
        self._queues = 0
        self._under_way = 0
        self._usual_rate = FIRST_RATE
        self._correction = 1.0
        """Tokens of a prompt to those guessed."""
        self._policy = policy
        self._decodes = decodes
        if decodes is not None and notices is not None:
            decodes.tell = self._tell_decoded

    @property
    def looks_at_prompts(self) -> bool:
        """Whether the choice depends on the prompt: with one rank of one node there is none."""
        if self._policy != "prefix-cost":
            return False
        nodes = self._fleet.of(Role.PREFILL)
        return len(nodes) > 1 or any(len(node.ranks) > 1 for node in nodes)

    def read(self, body: JSONObject, tokens: int, session: bytes = b"", *, with_keys: bool) -> Prompt:
        """The prompt of a body; `tokens`: a guess, made better by what nodes have counted so far."""
        prompt = (prompt_of if with_keys else without_keys)(body, tokens, session)
        if prompt.guess:
            prompt.tokens = round(prompt.guess * self._correction)
        return prompt

    def outlook(self, node: Node, rank: Rank | None, prompt: Prompt) -> tuple[float, float]:
        """(seconds until the node is through with what it has, tokens of the prompt that it would compute)."""
        queue = self._queue(node, rank.number if rank else 0)
        backlog_s = queue.backlog.seconds(queue.backlog.rate or self._usual_rate, self._now())
        return max(backlog_s, 0.0), prompt.tokens - queue.prefixes.cached(prompt)

    def backlog_s(self, node: Node) -> float:
        """Until the node's quickest rank is through with what it has."""
        self._hear()
        ranks = node.ranks or (None,)
        return min(self.outlook(node, rank, Prompt())[0] for rank in ranks)

    def choose(
        self, prompt: Prompt, avoid: Collection[Node] = (), model: object = None, partner: Node | None = None
    ) -> Node:
        """Raises NoNodeError, as `policy.choose` does."""
        self._hear()
        return choose(self._fleet, Role.PREFILL, avoid, model, partner, cost_of=self._costs(prompt))

    def rank_of(self, node: Node, prompt: Prompt) -> Rank | None:
        """The node's rank that is to have it; None for a connector whose nodes have no identity to know."""
        after = node.next_rank()  # of equals, the next in turn
        if after is None or self._policy != "prefix-cost" or len(node.ranks) < 2:
            return after
        turn, cost_in = node.ranks.index(after), self._cost_in(prompt)
        in_turn = node.ranks[turn:] + node.ranks[:turn]
        return min(
            in_turn, key=lambda rank: (cost_in(self._queue(node, rank.number)), prompt.turn_at(str(rank.number)))
        )

    def sent(self, node: Node, rank: Rank | None, prompt: Prompt) -> Sent:
        """Count it on the node, for as long as this is entered."""
        number = self._tell_begin(node, rank, prompt)
        under_way = self._begin(node, rank.number if rank else 0, prompt)

        def end(told: Prefilled | None) -> Audit | None:
            self._tell_end(number, told)
            return self._end(under_way, told)

        return Sent(end)

    def _begin(self, node: Node, rank: int, prompt: Prompt) -> _UnderWay:
        queue = self._queue(node, rank)
        uncached = prompt.tokens - queue.prefixes.cached(prompt)
        expected = queue.prefixes.sent(prompt)
        number = queue.backlog.begin(uncached, self._now())
        self._under_way += 1
        return _UnderWay(node, queue, prompt, expected, number)

    def _end(self, under_way: _UnderWay, told: Prefilled | None) -> Audit | None:
        """`told`: what the node said; None when it failed."""
        self._under_way -= 1
        queue = under_way.queue
        if told is None:
            queue.backlog.end(under_way.number, self._now())
            queue.prefixes.lost(under_way.prompt, under_way.expected)
            return None
        queue.backlog.end(under_way.number, self._now(), told.prompt_tokens - _cached(told))
        others = (other for known in self._known.values() for other in known.queues.values())
        rates = [other.backlog.rate for other in others if other.backlog.rate is not None]
        self._correct(under_way.prompt.guess, told.prompt_tokens)
        self._usual_rate = median(rates) if rates else FIRST_RATE
        return _learn(under_way, told)

    def _correct(self, guess: int, tokens: int) -> None:
        if guess:
            found = min(max(tokens / guess, 1 / _MOST_WRONG), _MOST_WRONG)
            self._correction += _WEIGHT * (found - self._correction)

    # -- what each costs

    def _costs(self, prompt: Prompt) -> Callable[[Node], Cost]:
        """Of the policy, as of now."""
        if self._policy == "round-robin":
            return lambda _: (0.0, 0)
        if self._policy == "least-load":
            return fewest_requests
        cost_in = self._cost_in(prompt)

        def cost(node: Node) -> Cost:
            ranks = [rank.number for rank in node.ranks] or (0,)
            return min(cost_in(self._queue(node, number)) for number in ranks), prompt.turn_at(node.spec.url)

        return cost

    def _cost_in(self, prompt: Prompt) -> Callable[[Queue], float]:
        """Of one rank, as of now, in seconds. Work on an idle one is cheap, so that a prompt that everybody sends is
        soon on all of them.
        """
        now, usual = self._now(), self._usual_rate
        price = min(_HIGHEST_PRICE, _IDLE_PRICE + self._under_way / max(self._queues, 1))

        def cost(queue: Queue) -> float:
            backlog, own = queue.backlog, queue.backlog.rate
            rate = usual if own is None or 1 / _ALIKE < own / usual < _ALIKE else own
            work = (prompt.tokens - queue.prefixes.cached(prompt)) / rate
            return backlog.seconds(rate, now) + price * work if backlog else _IDLE_PRICE * work

        return cost

    # -- the other worker processes

    def _tell_begin(self, node: Node, rank: Rank | None, prompt: Prompt) -> int:
        self._told += 1
        if self._notices is not None and self.looks_at_prompts:
            place = node.spec.url, rank.number if rank else 0
            self._notices.write(["begin", self._told, *place, prompt.tokens, prompt.pieces], prompt.keys)
        return self._told

    def _tell_decoded(self, url: str, prompt: Prompt) -> None:
        if self._notices is not None:
            self._notices.write(["decoded", 0, url, prompt.tokens, prompt.pieces], prompt.keys)

    def _tell_end(self, number: int, told: Prefilled | None) -> None:
        if self._notices is not None and self.looks_at_prompts:
            self._notices.write(["end", number, told and [told.prompt_tokens, told.cached_tokens]])

    def _hear(self) -> None:
        """What the others have sent, and what became of it."""
        for worker, notice in self._notices.read() if self._notices is not None else ():
            if notice is None:
                self._forget(worker)
                continue
            (kind, number, *rest), keys = notice
            if kind == "decoded" and self._decodes is not None:
                url, tokens, pieces = rest
                self._decodes.heard(url, Prompt(keys, pieces, tokens))
            elif kind == "begin":
                url, rank, tokens, pieces = rest
                self._others_begin((worker, number), url, rank, Prompt(keys, pieces, tokens))
            elif (under_way := self._others.pop((worker, number), None)) is not None:
                self._end(under_way, Prefilled({}, *rest[0]) if rest[0] else None)

    def _others_begin(self, key: tuple[int, int], url: str, rank: int, prompt: Prompt) -> None:
        node = next((node for node in self._fleet.of(Role.PREFILL) if node.spec.url == url), None)
        if node is not None:
            self._others[key] = self._begin(node, rank, prompt)

    def _forget(self, worker: int) -> None:
        """Its prefills under way: it may have died, or their ends were missed."""
        for key in [key for key in self._others if key[0] == worker]:
            self._end(self._others.pop(key), None)

    def _queue(self, node: Node, rank: int) -> Queue:
        known = self._known.get(node)
        if known is None:
            present = set(self._fleet.of(Role.PREFILL))
            self._known = {node: known for node, known in self._known.items() if node in present}
            known = self._known[node] = _Known(node.life)
            self._queues = sum(len(known.queues) for known in self._known.values())
        elif known.life != node.life:
            known.life = node.life
            for old in known.queues.values():
                old.prefixes.clear()
        if rank not in known.queues:
            known.queues[rank] = Queue()
            self._queues += 1
        queue = known.queues[rank]
        queue.prefixes.capacity = node.cache_tokens
        return queue


def _cached(told: Prefilled) -> int:
    """As the node says; a number that cannot be is none."""
    return min(max(told.cached_tokens or 0, 0), told.prompt_tokens)


def _learn(under_way: _UnderWay, told: Prefilled) -> Audit | None:
    prompt, expected, queue = under_way.prompt, under_way.expected, under_way.queue
    if not prompt.keys:
        return None
    prompt.tokens = told.prompt_tokens
    block = under_way.node.layout.get("block_size", "")
    slack = (int(block) if block.isdecimal() else _BLOCK_TOKENS) + round(told.prompt_tokens / prompt.pieces)
    if told.cached_tokens is None:
        queue.prefixes.computed(prompt, expected, None, slack)
        return None
    cached = _cached(told)
    queue.prefixes.computed(prompt, expected, cached, slack)
    outcome = "as-predicted"
    if cached + slack < expected.certain:
        outcome = "less"
    elif cached > max(expected.certain, expected.pieces * prompt.piece_tokens) + slack:
        outcome = "more"
    return Audit(round(expected.certain), cached, outcome)
