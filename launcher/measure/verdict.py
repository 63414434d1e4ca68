"""What the rounds say together: medians, how far they can be trusted, and which arm wins for which targets."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from .loadgen import Row
from .results import Figures, is_good
from .slo import Slo, seconds

_DRAWS = 1000
_INSIDE = 0.95
"""Of the draws, which the spread covers."""
_ALIKE = 0.05
"""Of goodput, by which a cell of the map must differ."""
STEPS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the targets that were given: the grid."""

Rounds = Sequence[Sequence[Row]]


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of the best arm against the next."""

    best: str
    other: str
    ratio: Spread
    """Of their goodput, and between what it lies with 95 % of the draws."""

    @property
    def is_difference(self) -> bool:
        return not self.ratio.low <= 1 <= self.ratio.high

    def in_words(self, slo: Slo, rate: float) -> str:
        where = f"for this workload at {rate:.3g} requests/s with {slo}"
        spread = f"{self.ratio.low:.2f} to {self.ratio.high:.2f}"
        if not self.is_difference:
            return f"No difference between {self.best} and {self.other} {where}: {self.ratio.median:.2f} ({spread})."
        return f"{self.best} serves {self.ratio.median:.2f} times ({spread}) the goodput of {self.other} {where}."


def verdict(arms: Mapping[str, Rounds], slo: Slo, seed: int = 0) -> Verdict | None:
    """Of all arms that answered well at all; None when none did, or there is one only.

    All arms got the same requests in the same time, so the ratio of goodput is that of good answers; when the last one
    ended has no part in it. By bootstrap: rounds are drawn, and in each of them requests, so both kinds of luck are in
    the spread.
    """
    counts = {name: _counts(rounds, slo) for name, rounds in arms.items()}
    shares = {name: _median_share(rounds) for name, rounds in counts.items() if rounds}
    order = sorted(shares, key=lambda name: -shares[name])
    if len(order) < 2 or not shares[order[0]]:
        return None
    best, other = order[:2]
    chance = random.Random(seed)  # noqa: S311  the same verdict of the same rounds
    draws = sorted(_ratio(_drawn(counts[best], chance), _drawn(counts[other], chance)) for _ in range(_DRAWS))
    edge = round(_DRAWS * (1 - _INSIDE) / 2)
    ratio = _ratio(shares[best], shares[other])
    return Verdict(best, other, Spread(ratio, min(draws[edge], ratio), max(draws[-1 - edge], ratio)))


def _counts(rounds: Rounds, slo: Slo) -> list[tuple[int, int]]:
    """(good answers, requests) of each."""
    return [(sum(is_good(row, slo) for row in rows), len(rows)) for rows in rounds]


def _drawn(rounds: Sequence[tuple[int, int]], chance: random.Random) -> float:
    """The median share of good answers of so many rounds, each drawn with its requests."""
    found = []
    for good, number in chance.choices(rounds, k=len(rounds)):
        likely = (good + 1) / (number + 2)  # none of them bad is no proof that none ever is
        luck = chance.gauss(0, math.sqrt(likely * (1 - likely) / number))  # binomial, of hundreds of requests
        found.append(min(max(good / number + luck, 0.0), 1.0))
    return median(found)


def _median_share(rounds: Sequence[tuple[int, int]]) -> float:
    return median(good / max(number, 1) for good, number in rounds)


def _ratio(one: float, other: float) -> float:
    if other:
        return one / other
    return float("inf") if one else 1.0


@dataclass(frozen=True, slots=True)
class SloMap:
    """Which arm wins for which targets; "=" where none does, "" where nobody answers in time."""

    ttft: tuple[float, ...]
    tpot: tuple[float, ...]
    winners: tuple[tuple[str, ...], ...]
    """A row for each TTFT."""


def slo_map(arms: Mapping[str, Rounds], slo: Slo) -> SloMap:
    """Around the targets that were given, from the same rows: it costs no further run."""
    ttfts = tuple((slo.ttft or 1.0) * step for step in STEPS)
    tpots = tuple((slo.tpot or 0.1) * step for step in STEPS)
    rows = tuple(tuple(_winner(arms, replace(slo, ttft=ttft, tpot=tpot)) for tpot in tpots) for ttft in ttfts)
    return SloMap(ttfts, tpots, rows)


def _winner(arms: Mapping[str, Rounds], slo: Slo) -> str:
    shares = {name: _median_share(_counts(rounds, slo)) for name, rounds in arms.items() if rounds}
    order = sorted(shares, key=lambda name: -shares[name])
    if not order or not shares[order[0]]:
        return ""
    if len(order) > 1 and shares[order[1]] > (1 - _ALIKE) * shares[order[0]]:
        return "="
    return order[0]


def over_rounds(rounds: Sequence[Figures]) -> dict[str, Spread]:
    """Every figure of the table."""
    rows: dict[str, list[float]] = {
        "goodput, requests/s": [one.goodput for one in rounds],
        "... % of requests": [100 * one.good / max(one.requests, 1) for one in rounds],
    }
    for name, shares in (("ttft", ("p50", "p90", "p99")), ("tpot", ("p50", "p99")), ("e2e", ("p90",))):
        for share in shares:
            rows[f"{name} {share}"] = [getattr(one, name)[share] for one in rounds]
    rows["output tokens/s"] = [one.throughput for one in rounds]
    rows["errors"] = [float(one.errors) for one in rounds]
    return {name: Spread.of(values) for name, values in rows.items()}


def in_words(name: str, spread: Spread) -> str:
    """A cell: the median, and between what the rounds lay."""
    show = seconds if name.split(maxsplit=1)[0] in ("ttft", "tpot", "e2e") else (lambda value: f"{value:.3g}")
    if spread.low == spread.high:
        return show(spread.median)
    return f"{show(spread.median)} ({show(spread.low)} to {show(spread.high)})"
