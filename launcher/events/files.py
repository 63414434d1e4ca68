"""Events kept: in the run's own log, always, and as lines of JSON for whoever asks for them."""

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from .events import Event

STAMP_FORMAT = "%Y-%m-%d %H:%M:%S "


class InLog:
    """A sink: a line with its time each; further lines of one event are indented below it."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self, event: Event) -> None:
        """Opened each time, for this user only: the log may have been turned over. No link is followed."""
        lines = event.in_words().strip("\n").splitlines() or [""]
        stamp = time.strftime(STAMP_FORMAT, time.localtime(event.at))
        text = "".join((f"{stamp}{lines[0]}\n", *(f"    {line}\n" for line in lines[1:])))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        with os.fdopen(os.open(self._file, flags, 0o600), "a", encoding="utf-8", errors="replace") as log:
            log.write(text)


class AsJson:
    """A sink: an object a line, at once."""

    def __init__(self, output: TextIO) -> None:
        self._output = output

    def __call__(self, event: Event) -> None:
        told = {
            "time": datetime.fromtimestamp(event.at, UTC).isoformat(timespec="milliseconds"),
            "kind": event.kind,
            "node": event.node or None,
            "text": event.text.strip("\n"),
            "seconds": None if event.seconds is None else round(event.seconds, 3),
        }
        self._output.write(json.dumps(told | event.data) + "\n")
        self._output.flush()
