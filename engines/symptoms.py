"""Known lines of engines' and Mooncake's logs: what they mean, whose fault they are, and what mends it.

The catalogue is `symptoms.json`, one entry a text, each with an example line and the source it is known from.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

Kind = Literal["root", "hang", "symptom", "config", "warn", "conditional", "stateful", "noise", "fact", "stop", "start"]

CAUSES: frozenset[Kind] = frozenset({"root", "hang"})
"""Kinds that say why something failed; the others say that it did, or nothing."""
CONSEQUENCES: frozenset[Kind] = frozenset({"symptom"})
REMARKS: frozenset[Kind] = frozenset({"config", "warn"})
"""Worth a word, though a node with such a line may be well."""


@dataclass(frozen=True, slots=True)
class Symptom:
    """One known text."""

    id: str
    kind: Kind
    priority: int
    """Of several entries that match a line, the highest is meant."""
    root: str
    """Where the cause is: self (the node that says it), prefill, decode, master, config, network, install ..."""
    pattern: re.Pattern[str]
    contains: str
    """A part of every line that the pattern matches: looking for it first is what makes long logs quick to read."""
    cause: str
    fix: str
    example: str
    example_origin: str
    source: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line of one log. `when` orders lines of different logs: (month, day, seconds), () before the first known."""

    log: str
    number: int
    when: tuple[float, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Hit:
    """A line that is known. `times`: how often its log has it."""

    line: Line
    symptom: Symptom
    times: int = 1


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What several logs say together. The first cause comes first; empty for healthy logs."""

    causes: tuple[Hit, ...]
    consequences: tuple[Hit, ...]
    remarks: tuple[Hit, ...]

    @property
    def first(self) -> Hit | None:
        """The line to begin with: the earliest cause over all logs, or else the earliest consequence."""
        return (self.causes or self.consequences or (None,))[0]


@cache
def catalogue() -> tuple[Symptom, ...]:
    """Every known text, the most telling first."""
    entries = json.loads(files(__package__).joinpath("symptoms.json").read_text())
    symptoms = (Symptom(**entry | {"pattern": re.compile(entry["pattern"])}) for entry in entries)
    return tuple(sorted(symptoms, key=lambda symptom: -symptom.priority))


def recognised(text: str) -> Symptom | None:
    """What a line means."""
    return next((known for known in catalogue() if known.contains in text and known.pattern.search(text)), None)


def diagnose(lines: Iterable[Line]) -> Diagnosis:
    """Order what is known in the logs of all nodes: a failure's cause is often in another node's log than its end."""
    hits = sorted(_hits(lines), key=lambda hit: (hit.line.when, hit.line.log, hit.line.number))
    return Diagnosis(
        *(tuple(hit for hit in hits if hit.symptom.kind in kinds) for kinds in (CAUSES, CONSEQUENCES, REMARKS))
    )


def _hits(lines: Iterable[Line]) -> Iterator[Hit]:
    """The first line of each kind in each log, with how often it was there.

    A node that was asked to stop says many a frightening thing until it is gone, and means none of them.
    """
    found: dict[tuple[str, str], tuple[Line, Symptom, int]] = {}
    stopping: set[str] = set()
    for line in lines:
        symptom = recognised(line.text)
        if symptom is None:
            continue
        if symptom.kind == "stop":
            stopping.add(line.log)
        elif symptom.kind == "start":
            stopping.discard(line.log)
        if line.log not in stopping:
            first, _, times = found.get((line.log, symptom.id), (line, symptom, 0))
            found[line.log, symptom.id] = first, symptom, times + 1
    return (Hit(line, symptom, times) for line, symptom, times in found.values())


_TIMES = (
    re.compile(r"^\d{4}-(?P<month>\d\d)-(?P<day>\d\d)[T ](?P<h>\d\d):(?P<m>\d\d):(?P<s>\d\d(?:[.,]\d+)?)"),
    re.compile(r"\b[A-Z]+ (?P<month>\d\d)-(?P<day>\d\d) (?P<h>\d\d):(?P<m>\d\d):(?P<s>\d\d) "),
    re.compile(r"^[IWEF](?:\d{4})?(?P<month>\d\d)(?P<day>\d\d) (?P<h>\d\d):(?P<m>\d\d):(?P<s>\d\d\.\d+) "),
)
"""The proxy's, vLLM's, and Mooncake's (glog)."""


def when(text: str) -> tuple[float, ...] | None:
    """The time a line gives, if it gives one."""
    for form in _TIMES:
        if match := form.search(text[:120]):
            return _ordered(match.groupdict())
    return None


def _ordered(parts: Mapping[str, str]) -> tuple[float, ...]:
    seconds = float(parts["s"].replace(",", ".")) + 60 * int(parts["m"]) + 3600 * int(parts["h"])
    return int(parts["month"]), int(parts["day"]), seconds
