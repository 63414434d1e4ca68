"""One round of one arm in figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from .loadgen import Row
from .slo import Slo


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one round. Latencies in seconds; of answers that came."""

    requests: int
    errors: int
    wall: float
    """Seconds until the last answer's end."""
    good: int
    """Requests within all limits of the SLO."""
    output_tokens: int
    ttft: dict[str, float]
    """p50, p90, p99."""
    tpot: dict[str, float]
    e2e: dict[str, float]
    handed_over: int
    """Requests whose prompt one node computed for another."""

    @property
    def goodput(self) -> float:
        """Good requests a second."""
        return self.good / self.wall if self.wall else 0.0

    @property
    def throughput(self) -> float:
        """Tokens of answers a second."""
        return self.output_tokens / self.wall if self.wall else 0.0


def ttft(row: Row) -> float:
    """From when it was due: a request that was sent late has waited."""
    return row.first - row.due


def tpot(row: Row) -> float:
    return (row.last - row.first) / (row.output_tokens - 1) if row.output_tokens > 1 else 0.0


def e2e(row: Row) -> float:
    return row.ended - row.due


def is_good(row: Row, slo: Slo) -> bool:
    """Whether it came, within every limit."""
    limits = ((slo.ttft, ttft), (slo.tpot, tpot), (slo.e2e, e2e))
    return not row.problem and all(limit is None or of(row) <= limit for limit, of in limits)


def figures(rows: Sequence[Row], slo: Slo) -> Figures:
    came = [row for row in rows if not row.problem]
    return Figures(
        requests=len(rows),
        errors=len(rows) - len(came),
        wall=max((row.ended for row in rows), default=0.0),
        good=sum(is_good(row, slo) for row in rows),
        output_tokens=sum(row.output_tokens for row in came),
        ttft=_percentiles([ttft(row) for row in came]),
        tpot=_percentiles([tpot(row) for row in came if row.output_tokens > 1]),
        e2e=_percentiles([e2e(row) for row in came]),
        handed_over=sum(row.path == "disaggregated" for row in came),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted values; between two of them, in proportion. Infinite where there are none."""
    if not values:
        return float("inf")
    place = share * (len(values) - 1)
    low = int(place)
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def _percentiles(values: list[float]) -> dict[str, float]:
    values.sort()
    found = {f"p{share}": percentile(values, share / 100) for share in (50, 90, 99)}
    return found | {"mean": fmean(values) if values else float("inf")}
