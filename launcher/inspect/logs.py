"""The nodes' logs: read as one time line, followed while they grow, kept from growing for ever.

Children write their logs themselves, so that not a line is lost whatever becomes of the launcher.
"""

import asyncio
import heapq
import math
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from engines.symptoms.lines import Clock, read, shown

from ..errors import ConfigError

OF_THE_LAUNCHER = "launcher.log"
"""The screen of a launcher that was started with `up -d`."""
_LOOK_EVERY_S = 0.25
_MOST_BYTES = 64 * 2**20
_KEPT = 3
_PART_BYTES = 4 * 2**20
_TAIL_BYTES = 64 * 1024
_STAMP_CHARACTERS = 200
"""A line's time stands near its beginning."""
_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_NO_LOGS = re.compile(r"\..*|.*\.(json|ya?ml|toml|py|sh|log\.\d+)")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of one log. `when` orders lines of different logs: seconds since 1970, -inf before the first known."""

    log: str
    number: int
    when: float
    text: str


def clock() -> Clock:
    """Of this host: logs give no zone, and mostly no year."""
    offset = datetime.now().astimezone().utcoffset()
    return Clock(time.time(), offset.total_seconds() if offset is not None else 0.0)  # noqa: TID251  of what others wrote


def files_of(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """The logs of a run, of all nodes or of those named. Raises ConfigError for a name that has none."""
    found = {file.stem: file for file in sorted(folder.glob("*.log"))}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ConfigError(f"no log of {', '.join(unknown)} in {folder}", f"There are: {', '.join(found) or 'none'}")
    return [found[name] for name in names or found]


def files_in(folder: Path) -> list[Path]:
    """What may be a log in a folder of any kind: `*.log` where there are some, else every file that is not data."""
    found = sorted(folder.glob("*.log"))
    return found or sorted(file for file in folder.iterdir() if file.is_file() and not _NO_LOGS.fullmatch(file.name))


def lines(file: Path) -> Iterator[Line]:
    """What a log holds. A line that gives no time has that of the line before it."""
    with file.open("rb") as log:
        yield from _dated(file, log, clock())


def time_line(files: Iterable[Path], until: Mapping[Path, int] | None = None) -> Iterator[Line]:
    """The lines of all logs, ordered by their times; those turned over come first. `until`: up to these places."""
    own, places = clock(), until or {}
    lines = (_dated(file, _raw_lines(file, places.get(file)), own) for file in files)
    return heapq.merge(*lines, key=lambda line: line.when)


def last_lines(files: Iterable[Path], count: int, until: Mapping[Path, int] | None = None) -> list[Line]:
    """The last lines of all logs together; only the ends of the logs are read."""
    own, places = clock(), until or {}
    ends = (_dated(file, _end(_turned_over(file), count, places.get(file)), own) for file in files)
    return list(heapq.merge(*ends, key=lambda line: line.when))[-count:] if count else []


def parts(file: Path, offset: int | None = None) -> Iterator[bytes]:
    """A log in large parts, each of whole lines; from a byte on, or else all of it with what was turned over."""
    for piece in [file] if offset is not None else _turned_over(file):
        rest = b""
        with piece.open("rb") as log:
            log.seek(offset or 0)
            while data := log.read(_PART_BYTES):
                data = rest + data
                end = data.rfind(b"\n") + 1
                rest = data[end:]
                yield data[:end]
        yield rest


def _dated(file: Path, raw: Iterable[bytes], own: Clock) -> Iterator[Line]:
    last = -math.inf
    for number, data in enumerate(raw, 1):
        text = shown(data)
        stamps = read(text[:_STAMP_CHARACTERS]).stamps
        last = own.when(stamps[0]) if stamps else last
        yield Line(file.stem, number, last, text)


def _raw_lines(file: Path, until: int | None) -> Iterator[bytes]:
    for piece in _turned_over(file):
        with piece.open("rb") as log:
            left = until if piece == file and until is not None else math.inf
            for line in log:
                left -= len(line)
                if left < 0:
                    break
                yield line


def _turned_over(file: Path) -> list[Path]:
    """The log's older parts, the oldest first, and the log."""
    older = (file.with_name(f"{file.name}.{number}") for number in range(_KEPT, 0, -1))
    return [part for part in (*older, file) if part.exists()]


def _end(parts: Sequence[Path], count: int, until: int | None) -> list[bytes]:
    """So many lines at least, if there are so many, and one before them with a time if there is one near. `parts` are
    a log's, the oldest first, and `until` is a place in the last one.
    """
    *older, file = parts
    with file.open("rb") as log:
        size = begin = until if until is not None else log.seek(0, 2)
        found: list[bytes] = []
        while begin > 0 and len(found) <= count + 1:
            begin = max(0, size - _TAIL_BYTES if begin == size else begin - 2 * (size - begin))
            log.seek(begin)
            found = _split(log.read(size - begin))
    if begin > 0:
        return found[1:]
    return [*_end(older, count - len(found), None), *found] if older and len(found) < count else found


def _split(data: bytes) -> list[bytes]:
    """Into lines; a progress bar's carriage returns end none."""
    lines = data.split(b"\n")
    return lines[:-1] if not lines[-1] else lines


def ends(files: Iterable[Path]) -> dict[Path, int]:
    """Where the logs' last whole lines end now."""
    return {file: _last_line_end(file) for file in files}


def _last_line_end(file: Path) -> int:
    with file.open("rb") as log:
        size = log.seek(0, 2)
        begin = max(0, size - _TAIL_BYTES)
        log.seek(begin)
        data = log.read(size - begin)
    return begin + data.rfind(b"\n") + 1 if b"\n" in data else (0 if begin == 0 else size)


async def follow(files: Callable[[], Sequence[Path]], places: dict[Path, int]) -> AsyncIterator[Line]:
    """What is written behind these places, for ever; logs that come later from their beginning."""
    numbers: dict[Path, int] = {}
    while True:
        for line in added(files(), places, numbers):
            yield line
        await asyncio.sleep(_LOOK_EVERY_S)


def added(files: Iterable[Path], places: dict[Path, int], numbers: dict[Path, int]) -> Iterator[Line]:
    """What stands behind these places now, which are moved; `numbers` counts the lines."""
    for file in files:
        places.setdefault(file, 0)
        for raw in _new_lines(file, places):
            numbers[file] = numbers.get(file, 0) + 1
            yield Line(file.stem, numbers[file], -math.inf, shown(raw))


def wanted(lines: Iterable[Line], since: float, pattern: re.Pattern[str] | None) -> Iterator[Line]:
    """Those from a time on (seconds since 1970) that have the pattern in them."""
    return (line for line in lines if line.when >= since and (pattern is None or pattern.search(line.text)))


def moment(text: str) -> float:
    """Seconds since 1970 of `10m` ago (s, m, h, d), `14:03` today, or a date and time. Raises ConfigError."""
    if match := _AGO.fullmatch(text):
        return time.time() - float(match[1]) * _SECONDS[match[2]]  # noqa: TID251  of what others wrote
    now = datetime.now().astimezone()
    try:
        when = datetime.fromisoformat(f"{now:%Y-%m-%d} {text}" if ":" in text and "-" not in text else text)
    except ValueError:
        raise ConfigError(f"--since {text}: no time", "Write 10m, 14:03, or 2026-01-31 14:03:22") from None
    return when.timestamp()


def _new_lines(file: Path, places: dict[Path, int]) -> list[bytes]:
    """Whole lines only: the rest of one that is being written comes the next time."""
    try:
        with file.open("rb") as log:
            if log.seek(0, 2) < places[file]:  # it was turned over
                places[file] = 0
            log.seek(places[file])
            data = log.read()
    except OSError:
        return []
    whole = data[: data.rfind(b"\n") + 1]
    places[file] += len(whole)
    return _split(whole)


def turn_over(file: Path, most_bytes: int = _MOST_BYTES) -> bool:
    """When a log is too long, keep it under another name and begin it again; the oldest goes. Whether it was.

    Copied and emptied, since its writer has it open (for appending: it goes on at the new beginning).
    """
    if not file.exists() or file.stat().st_size <= most_bytes:
        return False
    kept = [file.with_name(f"{file.name}.{number}") for number in range(1, _KEPT + 1)]
    for older, old in zip(kept[:0:-1], kept[-2::-1], strict=True):
        if old.exists():
            old.replace(older)
    try:
        kept[0].touch(mode=0o600)
        shutil.copyfile(file, kept[0])
    except OSError:  # no room for a copy: the less there is to keep, the more the disk is full
        kept[0].unlink(missing_ok=True)
    with file.open("r+b") as log:
        log.truncate()
    return True


def coloured(names: Iterable[str]) -> dict[str, str]:
    """A prefix for each log, all of one width."""
    names = sorted(names)
    width = max(map(len, names), default=0)
    colours = ("cyan", "green", "yellow", "magenta", "blue", "red")
    return {name: f"[{colours[place % len(colours)]}]{name:<{width}} |[/] " for place, name in enumerate(names)}
