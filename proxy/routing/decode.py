"""Which decode node answers: the one that holds the fewest live tokens afterwards.

Live tokens are the KV of running requests, prompts and answers so far: they fill the cache, and each step reads all of
them. Requests say little of it, for one may hold a thousand times what another does. A node that caches prefixes has
part of the new prompt already; where a session's earlier turns were answered it holds the fewest.
"""

import time
from collections.abc import Callable, Collection
from typing import Protocol

from engines.base import Role

from ..nodes.fleet import Fleet
from ..nodes.node import Node
from .policy import Cost, choose
from .prefixes import PrefixModel
from .prompts import Prompt


class Tell(Protocol):
    """To the other worker processes: a node has got a prompt."""

    def __call__(self, url: str, prompt: Prompt) -> None: ...


class DecodeRouter:
    """What all requests of this process share."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet = fleet
        self._now = clock
        self._known: dict[Node, tuple[int, PrefixModel]] = {}
        """Of nodes that cache prefixes: their life, and what they have cached."""
        self.tell: Tell | None = None

    @property
    def looks_at_prompts(self) -> bool:
        """Whether the choice depends on what of the prompt is cached."""
        nodes = self._fleet.of(Role.DECODE)
        return len(nodes) > 1 and any(node.cache_tokens for node in nodes)

    def choose(
        self, prompt: Prompt, avoid: Collection[Node] = (), model: object = None, partner: Node | None = None
    ) -> Node:
        """Raises NoNodeError, as `policy.choose` does."""
        now = self._now()

        def cost(node: Node) -> Cost:
            return node.live_tokens(now) - self.cached(node, prompt), prompt.turn_at(node.spec.url)

        return choose(self._fleet, Role.DECODE, avoid, model, partner, cost_of=cost)

    def cached(self, node: Node, prompt: Prompt) -> float:
        """Tokens of the prompt that the node is believed to have."""
        return self._prefixes(node).cached(prompt) if node.cache_tokens and prompt.keys else 0.0

    def has(self, node: Node, prompt: Prompt) -> None:
        """The node has got the whole prompt, by a hand-off or by computing it."""
        if node.cache_tokens and prompt.keys:
            self._has(node, prompt)
            if self.tell is not None:
                self.tell(node.spec.url, prompt)

    def heard(self, url: str, prompt: Prompt) -> None:
        """... from another worker."""
        node = next((node for node in self._fleet.of(Role.DECODE) if node.spec.url == url), None)
        if node is not None and node.cache_tokens:
            self._has(node, prompt)

    def _has(self, node: Node, prompt: Prompt) -> None:
        prefixes = self._prefixes(node)
        prefixes.computed(prompt, prefixes.sent(prompt), None, 0)

    def _prefixes(self, node: Node) -> PrefixModel:
        life, prefixes = self._known.get(node, (node.life, None))
        if prefixes is None:
            present = set(self._fleet.of(Role.DECODE))
            self._known = {node: known for node, known in self._known.items() if node in present}
            prefixes = PrefixModel()
        elif life != node.life:
            prefixes.clear()
        self._known[node] = node.life, prefixes
        prefixes.capacity = node.cache_tokens
        return prefixes
