"""The last lines of a log while something else writes it."""

from collections.abc import Callable
from pathlib import Path

_TAIL_BYTES = 8192


def tail(file: Path, lines: int, begin: int = 0) -> list[str]:
    """The last lines behind the byte `begin`, without empty ones, and without what a progress bar has overwritten."""
    try:
        with file.open("rb") as log:
            log.seek(max(min(begin, log.seek(0, 2)), log.tell() - _TAIL_BYTES * max(1, lines // 20)))
            text = log.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [kept for line in text.split("\n") if (kept := line.rstrip("\r").rsplit("\r", 1)[-1].rstrip())][-lines:]


def last_line(file: Path) -> Callable[[], str]:
    """A `detail` for a step that writes this log."""
    return lambda: (tail(file, 1) or [""])[0]
