"""Several logs read as one story: a failure's cause is often in another node's log than its end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .catalogue import Symptom
from .families import explained
from .lines import Clock
from .meaning import CAUSES, CONSEQUENCES, REMARKS, Kind, Meaning
from .scan import UNKNOWN, Found, Scan

_TOLD_WITHIN_S = 60.0
"""Before its end a process says why."""
_READ_ON = "The last lines of its log tell more"
_TOGETHER_S = 5.0
"""What a node says within so long belongs to one failure: the most telling of it is named."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A line with its meaning. `when`: seconds since 1970, None before the first time in its log."""

    log: str
    number: int
    when: float | None
    text: str
    meaning: Meaning
    times: int = 1


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What several logs say together. The first cause comes first; all empty for healthy logs."""

    causes: tuple[Hit, ...] = ()
    consequences: tuple[Hit, ...] = ()
    errors: tuple[Hit, ...] = ()
    """Errors that nobody knows, of which nobody can say whether they mattered."""
    remarks: tuple[Hit, ...] = ()

    @property
    def first(self) -> Hit | None:
        """The line to begin with: the first cause over all logs, unless a node had failed well before it.

        Of that nobody says why; an error that nobody knows is then better than nothing, and so is the failure itself.
        """
        failed = self.consequences[0] if self.consequences else None
        if self.causes and (failed is None or _at(failed) > _at(self.causes[0]) - _TOGETHER_S):
            return self.causes[0]
        before = [hit for hit in self.errors if failed is None or _at(hit) <= _at(failed)]
        return next(iter((*before, failed or (self.errors or (None,))[0])), None)


def _at(hit: Hit) -> float:
    return hit.when or 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How and when (seconds since 1970) a process ended that nobody had asked to."""

    log: str
    at: float
    how: str
    """"killed by SIGKILL", "exit code 1"."""


def diagnose(scans: Sequence[Scan], clock: Clock, ends: Sequence[Ended] = ()) -> Diagnosis:
    """Order what was found in the logs of all nodes. `ends` tell of those whose logs do not say why they ended."""
    zones = [scan.zone_s for scan in scans if scan.zone_s is not None]
    usual = Clock(clock.now, zones[0]) if zones else clock  # those of one cluster are set alike, most likely
    clocks = [usual if scan.zone_s is None else Clock(clock.now, scan.zone_s) for scan in scans]
    turns = {
        scan.log: [(own.when(stamp), stops) for stamp, stops in scan.turns]
        for scan, own in zip(scans, clocks, strict=True)
    }
    hits: list[tuple[Hit, Found]] = []
    for scan, own in zip(scans, clocks, strict=True):
        others = [turns[log] for log in turns if log != scan.log]
        for found in scan.found:
            when = own.when(found.stamp) if found.stamp is not None else None
            if not _is_of_a_stop(found.meaning, when, others):
                hits.append((Hit(found.log, found.number, when, found.text, found.meaning, found.times), found))
    hits += _untold(ends, [hit for hit, _ in hits])
    hits.sort(key=lambda pair: (_at(pair[0]), pair[0].log, pair[0].number))
    return Diagnosis(
        _first_failure_first(_of(hits, CAUSES, grave=True)),
        _of(hits, CONSEQUENCES, grave=True),
        _of(hits, CAUSES, grave=False),
        _of(hits, REMARKS, grave=True),
    )


def _is_of_a_stop(meaning: Meaning, when: float | None, others: Sequence[Sequence[tuple[float, bool]]]) -> bool:
    """What a process says of another one that was asked to stop is no failure: mooncake_master misses the heartbeats of
    a node that takes its time to go.
    """
    if meaning.kind not in CONSEQUENCES or meaning.root == "self" or when is None:
        return False
    before = ([stops for at, stops in turns if at <= when] for turns in others)
    return any(stops[-1] for stops in before if stops)


def _untold(ends: Sequence[Ended], hits: Sequence[Hit]) -> Iterator[tuple[Hit, Found]]:
    """Ends for which no line of the same log gives a cause."""
    for end in ends:
        told = (hit for hit in hits if hit.log == end.log and hit.meaning.kind in CAUSES)
        if not any(-_TOGETHER_S <= end.at - _at(hit) <= _TOLD_WITHIN_S for hit in told):
            meaning = explained(end.how) or Meaning("ended", "symptom", "self", "The process ended by itself", _READ_ON)
            text = f"ended: {end.how}"
            yield Hit(end.log, 0, end.at, text, meaning), Found(end.log, 0, None, text, meaning)


def _of(hits: list[tuple[Hit, Found]], kinds: frozenset[Kind], *, grave: bool) -> tuple[Hit, ...]:
    return tuple(hit for hit, found in hits if hit.meaning.kind in kinds and found.is_grave is grave)


def _how_vague(hit: Hit) -> tuple[bool, bool, bool, int]:
    """A text that the catalogue knows says the most, an errno or an unknown error the least."""
    meaning = hit.meaning
    return not isinstance(meaning, Symptom), meaning is UNKNOWN, meaning.id.startswith("errno-"), hit.number


def _first_failure_first(causes: tuple[Hit, ...]) -> tuple[Hit, ...]:
    """The earliest event wins. Of what its node says at that time a known cause is more telling than an unknown one."""
    if not causes:
        return ()
    first = causes[0]
    together = [hit for hit in causes if hit.log == first.log and _at(hit) - _at(first) <= _TOGETHER_S]
    told = min(together, key=_how_vague)
    return (told, *(hit for hit in causes if hit is not told))
