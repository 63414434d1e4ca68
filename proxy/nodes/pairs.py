"""Which prefill node's KV each decode node reads as it should. No I/O: `exchange/canary.py` reports here."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .node import Node

logger = logging.getLogger("pd_proxy.nodes")

Outcome = Literal["same", "differs", "not judged"]
Pair = tuple[Node, Node]
"""A prefill node and a decode node."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one pair, as it was in these lives of its nodes."""

    outcome: Outcome
    problem: str
    """Why they do not fit, or could not be judged; empty when they fit."""
    lives: tuple[int, int]


class Pairs:
    """The last verdict on each pair. One that differs is fenced until a later verdict is that it is the same."""

    def __init__(self) -> None:
        self._verdicts: dict[Pair, Verdict] = {}
        self._fenced: dict[Pair, str] = {}
        """... and how it differed."""

    def __iter__(self) -> Iterator[tuple[Pair, Verdict]]:
        return iter(self._verdicts.items())

    def judged(self, pair: Pair, verdict: Verdict) -> None:
        """Take in a verdict; one that could not be had leaves a fenced pair fenced, and says both."""
        fenced = self._fenced.get(pair)
        if verdict.outcome == "same":
            if self._fenced.pop(pair, None) is not None:
                logger.info("hand-offs from %s to %s again: the answers are the same now", *_names(pair))
        elif verdict.outcome == "differs":
            if fenced is None:
                logger.error("no hand-offs from %s to %s any more: %s", *_names(pair), verdict.problem)
            self._fenced[pair] = verdict.problem
        elif fenced is not None:
            verdict = replace(verdict, outcome="differs", problem=f"{fenced}; not judged since: {verdict.problem}")
        self._verdicts[pair] = verdict

    def adopt(self, found: Iterable[tuple[Pair, Verdict]]) -> None:
        """All verdicts, as another process has them; what it does not know is forgotten."""
        theirs = dict(found)
        self.forget({pair for pair in self._verdicts if pair not in theirs})
        for pair, verdict in theirs.items():
            if self._verdicts.get(pair) != verdict:
                if verdict.outcome != "differs":
                    self._fenced.pop(pair, None)
                self.judged(pair, verdict)

    def verdict(self, pair: Pair) -> Verdict | None:
        """The last one, if it is on these lives of both nodes."""
        found = self._verdicts.get(pair)
        return found if found is not None and found.lives == lives(pair) else None

    @property
    def are_any_fenced(self) -> bool:
        return bool(self._fenced)

    def is_fenced(self, prefill: Node, decode: Node) -> bool:
        return bool(self._fenced) and (prefill, decode) in self._fenced

    def forget_all_but(self, nodes: set[Node]) -> None:
        self.forget({pair for pair in self._verdicts if not nodes.issuperset(pair)})

    def forget(self, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            self._verdicts.pop(pair, None)
            self._fenced.pop(pair, None)


def lives(pair: Pair) -> tuple[int, int]:
    prefill, decode = pair
    return prefill.life, decode.life


def _names(pair: Pair) -> tuple[str, str]:
    prefill, decode = pair
    return prefill.spec.name, decode.spec.name
