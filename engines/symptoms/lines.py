"""One line of a log, whoever collected it: its time, whose it is, and what it says.

Read through: time stamps of docker, kubectl and compose (RFC 3339), compose's and kubectl's names, journald, `srun
--label`, and what vLLM's processes, uvicorn, pd-proxy and glog (Mooncake) put before a message.
"""

import calendar
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Final

_QUARTER_S: Final = 900
_LARGEST_ZONE_S: Final = 14 * 3600
_DAY_S: Final = 86400
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_COLLECTORS = (
    re.compile(  # kubectl --timestamps, docker -t, pd-proxy
        r"\[?(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)[T ](?P<h>\d\d):(?P<m>\d\d):(?P<s>\d\d(?:[.,]\d+)?)"
        r"(?P<zone>Z|[+-]\d\d:?\d\d)?\]?\s+"
    ),
    re.compile(r"\[pod/(?P<pod>[\w.-]+)/(?P<container>[\w.-]+)\] ?"),  # kubectl --prefix
    re.compile(r"(?P<service>[A-Za-z][\w.-]*) +\| "),  # docker compose
    re.compile(  # journald
        r"(?P<month_name>[A-Z][a-z]{2}) +(?P<day>\d{1,2}) (?P<h>\d\d):(?P<m>\d\d):(?P<s>\d\d(?:\.\d+)?) "
        r"(?P<host>[\w.-]+) (?P<unit>[\w./@:-]+?)(?:\[\d+\])?: "
    ),
    re.compile(r"(?P<task>\d{1,5}): (?=\S)"),  # srun --label
)
_PROCESS = re.compile(r"\((?P<process>[A-Z]\w+) pid=\d+\) ?")
_WRITERS = (
    re.compile(  # vLLM
        r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) (?P<month>\d\d)-(?P<day>\d\d) "
        r"(?P<h>\d\d):(?P<m>\d\d):(?P<s>\d\d(?:\.\d+)?) (?P<at>\[[\w./-]+:\d+\] |[\w./-]+:\d+\] )?"
    ),
    re.compile(  # glog
        r"(?P<glog>[IWEF])(?P<year>\d{4})?(?P<month>\d\d)(?P<day>\d\d) (?P<h>\d\d):(?P<m>\d\d):(?P<s>\d\d\.\d+) +\d+ "
        r"(?P<at>[\w./-]+:\d+\] )"
    ),
    re.compile(r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL): +"),  # uvicorn
    re.compile(r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) (?P<at>[a-z][\w.]*: )"),  # pd-proxy, behind its time
)
_GLOG_LEVELS: Final = {"I": "INFO", "W": "WARNING", "E": "ERROR", "F": "FATAL"}


@dataclass(frozen=True, slots=True)
class Stamp:
    """A time as it is written: without a year, a zone or both, mostly."""

    year: int | None
    month: int
    day: int
    seconds: float
    """Since midnight."""
    zone_s: float | None
    """East of UTC."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A line taken apart."""

    source: str
    """Which node of a log that holds several; empty when the line does not say."""
    stamps: tuple[Stamp, ...]
    """The outermost first: whoever collected the line comes before whoever wrote it."""
    process: str
    """vLLM's process within the node (`EngineCore_DP0`); empty for the others."""
    level: str
    """DEBUG, INFO, WARNING, ERROR, CRITICAL, FATAL; empty when the line does not say."""
    text: str
    """Without the prefixes of collectors."""
    bare: str
    """Without those of the writer as well."""


def shown(raw: bytes) -> str:
    """As a terminal would show it: what a progress bar has overwritten is gone."""
    return raw.decode("utf-8", "replace").rstrip("\r\n").rsplit("\r", 1)[-1]


def read(line: str) -> Reading:
    """Take a line apart. Anything is a line."""
    if "\x1b" in line:
        line = _COLOUR.sub("", line)
    source, stamps, text = "", [], line
    for _ in _COLLECTORS:
        match = next((found for form in _COLLECTORS if (found := form.match(text))), None)
        if match is None:
            break
        parts = match.groupdict()
        source = _source(parts) or source
        if "h" in parts:
            stamps.append(_stamp(parts))
        text = text[match.end() :]
    process, level, bare = "", "", text
    if match := _PROCESS.match(bare):
        process, bare = match["process"], bare[match.end() :]
    match = next((found for form in _WRITERS if (found := form.match(bare))), None)
    if match is not None:
        parts = match.groupdict()
        level = parts.get("level") or _GLOG_LEVELS[parts["glog"]]
        if "h" in parts:
            stamps.append(_stamp(parts))
        bare = bare[match.end() :]
    return Reading(source, tuple(stamps), process, level, text, bare)


def _source(parts: dict[str, str | None]) -> str:
    if parts.get("unit"):
        return f"{parts['host']} {parts['unit']}"
    if parts.get("task"):
        return f"task {parts['task']}"
    return parts.get("pod") or parts.get("service") or ""


def _stamp(parts: dict[str, str | None]) -> Stamp:
    name = parts.get("month_name")
    month = (_MONTHS.index(name) + 1 if name in _MONTHS else 1) if name else int(parts["month"] or 1)
    seconds = 3600 * int(parts["h"] or 0) + 60 * int(parts["m"] or 0) + float((parts["s"] or "0").replace(",", "."))
    year = parts.get("year")
    return Stamp(int(year) if year else None, month, int(parts["day"] or 1), seconds, _zone_s(parts.get("zone")))


def _zone_s(zone: str | None) -> float | None:
    if zone is None:
        return None
    if zone == "Z":
        return 0.0
    digits = zone[1:].replace(":", "")
    seconds = 3600.0 * int(digits[:2]) + 60 * int(digits[2:])
    return -seconds if zone.startswith("-") else seconds


@dataclass(frozen=True, slots=True)
class Clock:
    """Makes times of stamps, in seconds since 1970. What a stamp lacks is taken from here."""

    now: float
    """Seconds since 1970: a stamp without a year is of the last twelve months."""
    zone_s: float = 0.0
    """Of stamps that give none, in seconds east of UTC."""

    def when(self, stamp: Stamp) -> float:
        zone_s = self.zone_s if stamp.zone_s is None else stamp.zone_s
        if stamp.year is not None:
            return _midnight(stamp.year, stamp.month, stamp.day) + stamp.seconds - zone_s
        year = datetime.fromtimestamp(self.now, UTC).year
        at = _midnight(year, stamp.month, stamp.day) + stamp.seconds - zone_s
        return at if at <= self.now + _DAY_S else _midnight(year - 1, stamp.month, stamp.day) + stamp.seconds - zone_s


def zone_of(stamps: Iterable[Stamp]) -> float | None:
    """The zone of the stamps without one, from a line that has both kinds; None when there is nothing to compare."""
    known = [stamp for stamp in stamps if stamp.zone_s is not None]
    unknown = [stamp for stamp in stamps if stamp.zone_s is None]
    if not known or not unknown:
        return None
    outer, inner = known[0], unknown[0]
    year = outer.year or 2000
    utc = _midnight(year, outer.month, outer.day) + outer.seconds - (outer.zone_s or 0.0)
    differences = (
        _midnight(guess, inner.month, inner.day) + inner.seconds - utc for guess in (year - 1, year, year + 1)
    )
    nearest = min(differences, key=abs)
    zone_s = round(nearest / _QUARTER_S) * float(_QUARTER_S)
    return zone_s if abs(zone_s) <= _LARGEST_ZONE_S else None


@cache
def _midnight(year: int, month: int, day: int) -> float:
    """Of a day, as if in UTC. Days that no calendar has are counted on."""
    return float(calendar.timegm((year, min(max(month, 1), 12), 1, 0, 0, 0)) + (day - 1) * _DAY_S)
