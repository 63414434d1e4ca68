"""What a run writes down for others: its state for the commands, its topology for the proxy."""

from collections.abc import Callable
from pathlib import Path

from . import private
from .runs import RunFolder, RunState


class Record:
    """Of one run. A disk without room ends nothing: it is said once, and tried again with every state."""

    def __init__(self, folder: RunFolder, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._is_writable = True
        self._unwritten: tuple[Path, str] | None = None

    def state(self, state: RunState) -> None:
        """... and the topology there was no room for."""
        self._written(lambda: self._folder.write(state))
        self._write_topology()

    def topology(self, file: Path, text: str) -> None:
        """Whole or not at all: the proxy may read it at any moment."""
        self._unwritten = (file, text)
        self._write_topology()

    def _write_topology(self) -> None:
        if self._unwritten is not None:
            file, text = self._unwritten
            if self._written(lambda: private.write(file, text)):
                self._unwritten = None

    def _written(self, write: Callable[[], None]) -> bool:
        was_writable = self._is_writable
        try:
            write()
            self._is_writable = True
        except OSError as exc:
            self._is_writable = False
            if was_writable:
                self._say(
                    f"cannot write to {self._folder.path}: {exc.strerror}. The run goes on; logs are lost meanwhile."
                )
        else:
            if not was_writable:
                self._say(f"{self._folder.path} can be written to again.")
        return self._is_writable
