"""One log, looked through: the lines that tell of a failure, and what each means.

Logs are long and repeat themselves, so lines are first looked at in bulk, without their digits and hexadecimal letters:
of all lines that then are the same one is looked at, and a line in which no word of any known failure stands is passed
over for good.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Final

from . import families
from .catalogue import Symptom, catalogue, known
from .lines import Reading, Stamp, read, shown, zone_of
from .meaning import Meaning

_BLANKED: Final = bytes.maketrans(b"0123456789abcdefABCDEF", b"0" * 22)
_OFTEN: Final = 100
"""Lines that are the same but for digits, after which they are counted and no longer read."""
_BACK: Final = 400
"""Lines gone back for a time, or for the place an exception was raised at."""
_NO_ERROR: Final = frozenset({"KeyboardInterrupt", "SystemExit", "GeneratorExit", "CancelledError", "StopIteration"})
_EXCEPTION = re.compile(
    r"(?P<name>(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Expired|Failure|Fault|Timeout|Exit|Interrupt))(?:: .*)?$"
)
_ANY_EXCEPTION = re.compile(r"(?P<name>(?:[A-Za-z_]\w*\.)*[A-Z]\w*)(?:: .*)?$")
"""Behind a traceback."""
_TRACEBACK: Final = "Traceback (most recent call last):"
_FRAME = re.compile(r'\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_TELLS_OF_A_FAILURE = re.compile(
    r"(?i)error|fail|fatal|terminate|kill|\boom|fault|abort|cannot|\bwarn\b|not found|denied|no such|illegal|invalid"
    r"|no cuda|xid|exit"
)
_SERIOUS: Final = frozenset({"ERROR", "CRITICAL", "FATAL"})
_QUIET: Final = frozenset({"DEBUG", "INFO", "WARNING"})
_OF_ONE_REQUEST: Final = frozenset({"asgi-exception", "request-failed"})
"""The exception behind such a line is of a request's handler: the process goes on."""
_CHAINED: Final = (b"The above exception was the direct cause", b"During handling of the above exception")
_BACK_TO_CHAIN: Final = 3
_LITERALS: Final = ("Error", "Exception", "Expired", "Failure", "Timeout", "ERROR", "CRITICAL", _TRACEBACK)
_DUMPS: Final = ("with config: model=", "Dumping scheduler output for model execution")
"""VLLM tells its whole configuration when it starts and when it dies: every word of it means only that it is set."""
_GLOG: Final = b"00000 00:00:00."
"""A line of glog of level E or F, blanked; those of level I and W keep their letter."""

UNKNOWN: Final = Meaning(
    "unknown-error",
    "root",
    "self",
    "An error that the catalogue does not know",
    "The lines before it in its log tell more. Look for its text in the issues of the project it comes from",
)


@dataclass(frozen=True, slots=True)
class Found:
    """A line that tells something. `when` is not known before all logs are read (`diagnosis.py`)."""

    log: str
    number: int
    stamp: Stamp | None
    text: str
    meaning: Meaning
    is_grave: bool = True
    """False for an error of which nobody can say whether it mattered."""
    times: int = 1


@dataclass(slots=True)
class Scan:
    """What one log tells."""

    log: str
    found: list[Found] = field(default_factory=list)
    zone_s: float | None = None
    """Of its stamps that give none, when a line shows it."""
    turns: list[tuple[Stamp, bool]] = field(default_factory=list)
    """When it began to stop (True) as it was asked to, and when it began anew (False)."""


def scan(log: str, parts: Iterable[bytes]) -> Scan:
    """Look through a log, given in parts that end with a line's end (the last one may not)."""
    scanner = _Scanner(log)
    for part in parts:
        scanner.take(part)
    return scanner.result()


class _Scanner:
    def __init__(self, log: str) -> None:
        self._log = log
        self._number = 0
        self._passed_over: set[bytes] = set()
        self._seen: dict[bytes, list[int]] = {}
        """How often a line, blanked, was read; then the place of what it last meant."""
        self._places: dict[tuple[str, str], int] = {}
        """Of each source and meaning, where it is in `_found`."""
        self._found: list[Found] = []
        self._stopping: set[str] = set()
        self._turns: list[tuple[Stamp, bool]] = []
        self._in_traceback: set[tuple[str, str]] = set()
        self._in_request: set[tuple[str, str]] = set()
        """Whose traceback is of one request's handler: the process goes on."""
        self._was_in_request: set[tuple[str, str]] = set()
        """... and whose last exception was."""
        self._last: Stamp | None = None
        self._zone_s: float | None = None
        self._said: set[str] = set()
        """What conditional symptoms need, and the log has."""

    def take(self, part: bytes) -> None:
        lines, keys = part.split(b"\n"), part.translate(_BLANKED).split(b"\n")
        if lines[-1] == b"":
            lines.pop()
            keys.pop()
        self._sort_out(keys)
        passed_over = self._passed_over
        for at in [at for at, key in enumerate(keys) if key not in passed_over]:
            self._look(lines, at, keys[at])
        self._number += len(lines)
        self._last = self._stamp_at(lines, len(lines) - 1) or self._last

    def _sort_out(self, keys: list[bytes]) -> None:
        """Which of these lines have no word of a failure in them."""
        new = set(keys).difference(self._passed_over, self._seen)
        text = b"\n".join(new)
        telling = [word for word in _words() if word in text]
        for key in new:
            if not any(word in key for word in telling):
                self._passed_over.add(key)

    def _look(self, lines: list[bytes], at: int, key: bytes) -> None:
        seen = self._seen.setdefault(key, [0, -1])
        seen[0] += 1
        if seen[0] > _OFTEN:
            if seen[1] >= 0:
                self._found[seen[1]] = replace(self._found[seen[1]], times=self._found[seen[1]].times + 1)
            return
        line = read(shown(lines[at]))
        self._said.update(text for text in _needed() if text in line.text)
        if line.stamps and self._zone_s is None:
            self._zone_s = zone_of(line.stamps)
        judged = self._judge(line, lines, at)
        seen[1] = -1 if judged is None else self._note(line, judged, lines, at)

    def _judge(self, line: Reading, lines: list[bytes], at: int) -> tuple[Meaning, str, bool] | None:
        """What it means, its text, and whether it is grave; None when it is of no interest."""
        where = line.source, line.process
        if any(mark in line.text for mark in _DUMPS):
            return None
        if line.bare.startswith(_TRACEBACK):
            self._in_traceback.add(where)
            if where in self._was_in_request and _is_chained(lines, at):
                self._in_request.add(where)
            return None
        meaning = _meaning(line)
        exception = self._exception(line, where)  # asked in any case: a traceback ends with it
        if meaning is not None:
            if meaning.id in _OF_ONE_REQUEST:
                self._in_request.add(where)
            self._turn(meaning, line.source, self._stamp_of(line, lines, at))
            is_quiet = meaning.kind in ("noise", "fact", "stop", "start")
            return None if is_quiet else (meaning, line.text, True)
        if exception is not None:
            is_of_request = where in self._in_request
            is_grave = exception and not is_of_request
            (self._was_in_request.add if is_of_request else self._was_in_request.discard)(where)
            self._in_request.discard(where)
            return UNKNOWN, line.text + _raised_at(lines, at), is_grave
        if line.level == "FATAL":
            return UNKNOWN, line.text, True
        if line.level in _SERIOUS and not _is_part_of_a_traceback(line.bare):
            return UNKNOWN, line.text, False
        return None

    def _turn(self, meaning: Meaning, source: str, stamp: Stamp | None) -> None:
        """A node that was asked to stop says many a frightening thing until it is gone, and means none of them."""
        if meaning.kind == "stop":
            self._stopping.add(source)
        elif meaning.kind == "start":
            self._stopping.discard(source)
        if meaning.kind in ("stop", "start") and stamp is not None:
            self._turns.append((stamp, meaning.kind == "stop"))

    def _exception(self, line: Reading, where: tuple[str, str]) -> bool | None:
        """True where a traceback ends, or an exception is told as an error; False for one that stands alone.

        None for a line that tells no exception.
        """
        form = _ANY_EXCEPTION if where in self._in_traceback else _EXCEPTION
        match = form.match(line.bare)
        if match is None or match["name"].rsplit(".", 1)[-1] in _NO_ERROR or match["name"].endswith("Warning"):
            return None
        is_one = where in self._in_traceback or line.level in _SERIOUS
        self._in_traceback.discard(where)
        return is_one

    def _note(self, line: Reading, judged: tuple[Meaning, str, bool], lines: list[bytes], at: int) -> int:
        """Where it is noted; -1 for what a node says while it stops."""
        meaning, text, is_grave = judged
        if line.source in self._stopping:
            return -1
        name = meaning.id if meaning is not UNKNOWN else f"{meaning.id} {is_grave} {text}"
        place = self._places.setdefault((line.source, name), len(self._found))
        if place < len(self._found):
            self._found[place] = replace(self._found[place], times=self._found[place].times + 1)
        else:
            log = f"{self._log}: {line.source}" if line.source else self._log
            stamp = self._stamp_of(line, lines, at)
            self._found.append(Found(log, self._number + at + 1, stamp, text, meaning, is_grave))
        return place

    def _stamp_of(self, line: Reading, lines: list[bytes], at: int) -> Stamp | None:
        return line.stamps[0] if line.stamps else self._stamp_at(lines, at) or self._last

    def _stamp_at(self, lines: list[bytes], at: int) -> Stamp | None:
        """Of the line, or of the nearest one before it that has a time."""
        for line in reversed(lines[max(0, at - _BACK) : at + 1]):
            if stamps := read(shown(line[:200])).stamps:
                return stamps[0]
        return None

    def result(self) -> Scan:
        kept = (_if_it_counts(found, self._said) for found in self._found)
        return Scan(self._log, [found for found in kept if found is not None], self._zone_s, self._turns)


def _if_it_counts(found: Found, said: set[str]) -> Found | None:
    """A conditional one is a cause when its log has what makes it one."""
    meaning = found.meaning
    if not isinstance(meaning, Symptom) or meaning.kind != "conditional":
        return found
    return replace(found, meaning=replace(meaning, kind="root")) if said.intersection(meaning.needs) else None


def _meaning(line: Reading) -> Meaning | None:
    """By the catalogue; by its family when it says more, or when the catalogue says nothing."""
    by_text = known(line.text) or (known(line.bare) if line.bare != line.text else None)
    if by_text is not None and by_text.kind != "symptom":
        return by_text
    tells = line.level in _SERIOUS or _TELLS_OF_A_FAILURE.search(line.bare) is not None
    if line.level in _QUIET or not tells or _is_code(line.bare):
        return by_text
    by_family = families.explained(line.text)
    if by_text is None or (by_family is not None and by_family.kind == "root"):
        return by_family
    return by_text


def _is_chained(lines: list[bytes], at: int) -> bool:
    """Whether the traceback that begins here is of an exception that came of the one before it."""
    return any(mark in line for line in lines[max(0, at - _BACK_TO_CHAIN) : at] for mark in _CHAINED)


def _is_code(bare: str) -> bool:
    """A line of a traceback that shows where it was."""
    return bare.startswith(("    ", '  File "'))


def _is_part_of_a_traceback(bare: str) -> bool:
    return not bare or bare[0] in " |+\t" or bare.startswith((_TRACEBACK, "The above exception", "During handling of"))


def _raised_at(lines: list[bytes], at: int) -> str:
    """Of an exception: where, and the line of code."""
    code = ""
    for back in range(at - 1, max(-1, at - 40), -1):
        bare = read(shown(lines[back])).bare
        if match := _FRAME.match(bare):
            return f"  (at {match['file'].rsplit('/', 1)[-1]}:{match['line']} in {match['function']}: {code})"
        if bare.strip() and not set(bare.strip()) <= set("^~ "):
            code = bare.strip()
    return ""


@cache
def _words() -> tuple[bytes, ...]:
    """What every line that is of interest has one of, blanked."""
    words = {part for symptom in catalogue() for part in symptom.contains} | {*families.literals(), *_LITERALS}
    return (*(word.encode().translate(_BLANKED) for word in sorted(words | _needed())), _GLOG)


@cache
def _needed() -> frozenset[str]:
    return frozenset(text for symptom in catalogue() for text in symptom.needs)
