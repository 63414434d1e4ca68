"""The nodes' logs: read as one time line, followed while they grow, kept from growing for ever.

Children write their logs themselves, so that not a line is lost whatever becomes of the launcher.
"""

import asyncio
import heapq
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from engines.symptoms import Line, when

from .errors import ConfigError

OF_THE_LAUNCHER = "launcher.log"
"""The screen of a launcher that was started with `up -d`."""
_LOOK_EVERY_S = 0.25
_MOST_BYTES = 64 * 2**20
_KEPT = 3


def files_of(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """The logs of a run, of all nodes or of those named. Raises ConfigError for a name that has none."""
    found = {file.stem: file for file in sorted(folder.glob("*.log"))}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ConfigError(f"no log of {', '.join(unknown)} in {folder}", f"There are: {', '.join(found) or 'none'}")
    return [found[name] for name in names or found]


def lines(file: Path, offset: int = 0) -> Iterator[Line]:
    """What a log holds from a byte on. A line that gives no time has that of the line before it."""
    last: tuple[float, ...] = ()
    with file.open("rb") as log:
        log.seek(offset)
        for number, raw in enumerate(log, 1):
            text = _text(raw)
            last = when(text) or last
            yield Line(file.stem, number, last, text)


def time_line(files: Iterable[Path], offsets: Mapping[str, int] | None = None) -> Iterator[Line]:
    """The lines of all logs, ordered by their times; those turned over come first.

    `offsets`: a log's name to the byte to begin at, of which nothing before is read.
    """
    read = (lines(file, offsets[file.stem]) if offsets is not None else _all_lines(file) for file in files)
    return heapq.merge(*read, key=lambda line: line.when)


def _all_lines(file: Path) -> Iterator[Line]:
    older = (file.with_name(f"{file.name}.{number}") for number in range(_KEPT, 0, -1))
    for part in (*older, file):
        if part.exists():
            yield from (replace(line, log=file.stem) for line in lines(part))


def ends(files: Iterable[Path]) -> dict[Path, int]:
    """How long the logs are now."""
    return {file: file.stat().st_size for file in files}


async def follow(files: Sequence[Path], places: dict[Path, int]) -> AsyncIterator[Line]:
    """What is written behind these places, for ever."""
    numbers = dict.fromkeys(files, 0)
    while True:
        for file in files:
            for raw in _new_lines(file, places):
                numbers[file] += 1
                yield Line(file.stem, numbers[file], (), _text(raw))
        await asyncio.sleep(_LOOK_EVERY_S)


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
    return whole.splitlines()


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
        shutil.copyfile(file, kept[0])
    except OSError:  # no room for a copy: the less there is to keep, the more the disk is full
        kept[0].unlink(missing_ok=True)
    with file.open("r+b") as log:
        log.truncate()
    return True


def _text(raw: bytes) -> str:
    """As a terminal would show it: what a progress bar has overwritten is gone."""
    return raw.decode("utf-8", "replace").rstrip("\r\n").rsplit("\r", 1)[-1]


def coloured(names: Iterable[str]) -> dict[str, str]:
    """A prefix for each log, all of one width."""
    names = sorted(names)
    width = max(map(len, names), default=0)
    colours = ("cyan", "green", "yellow", "magenta", "blue", "red")
    return {name: f"[{colours[place % len(colours)]}]{name:<{width}} |[/] " for place, name in enumerate(names)}
