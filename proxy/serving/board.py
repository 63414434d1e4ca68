"""What the worker processes of one proxy tell each other: each writes its own row of a shared file, all read all.

No locks and no server: a row has room for two writings, made in turn, each between two copies of its number. A reader
takes the newer one whose numbers are equal, so that a worker killed while it writes leaves what it wrote before. The
rows are a tenth of a second old, and that is enough: a worker knows its own load exactly, and its part of the others'
only guides the choice between nodes, and adds up to one `/health` and one `/metrics` whichever worker is asked.
"""

import fcntl
import mmap
import os
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson

_WRITING_BYTES = 128 * 1024
_ROW_BYTES = 2 * _WRITING_BYTES
_HEAD = struct.Struct("<QdI")
"""Number of the writing, time of it (monotonic, the same for all processes of a machine), length of the data."""
_STALE_S = 3.0
"""A row that old is a dead worker's, and no longer counts."""


class Board:
    """The board as one worker sees it. With a single process there is no file, and nobody else."""

    def __init__(self, file: Path | None = None) -> None:
        """Join the board in `file`: take a row that no living process holds. Raises OSError when there is none."""
        self._row = -1
        self._rows = 0
        self._written = 0
        self._read: dict[int, tuple[int, float, dict[str, Any]]] = {}
        self._memory: mmap.mmap | None = None
        self.inherited: dict[str, Any] | None = None
        """What the row's last owner, a worker that died, had written: its counts go on, or they would fall."""
        if file is not None:
            self._file = file.open("r+b")  # open as long as we live: the lock on our row goes with it
            self._rows = os.fstat(self._file.fileno()).st_size // _ROW_BYTES
            self._memory = mmap.mmap(self._file.fileno(), self._rows * _ROW_BYTES)
            self._row = self._free_row()
            self.look()
            self._written, _, self.inherited = self._read.pop(self._row, (0, 0.0, None))

    def others(self, *, alive: bool = True) -> list[dict[str, Any]]:
        """The rows of the other workers as of the last look; those of dead ones too unless they must be `alive`."""
        oldest = time.monotonic() - _STALE_S if alive else -1
        return [data for row, (_, at, data) in self._read.items() if at > oldest and row != self._row]

    @property
    def is_shared(self) -> bool:
        return self._memory is not None

    def write(self, data: dict[str, Any]) -> None:
        """Write our row. Raises ValueError when it does not fit, which bounded series never let happen."""
        assert self._memory is not None  # noqa: S101  asked by whoever calls
        raw = orjson.dumps(data)
        if len(raw) > _WRITING_BYTES - 2 * _HEAD.size:
            raise ValueError(f"a row of {len(raw)} bytes does not fit on the board")
        self._written += 1
        head = _HEAD.pack(self._written, time.monotonic(), len(raw))
        start, end = self._place(self._row, self._written)
        self._memory[start : start + _HEAD.size] = head
        self._memory[start + _HEAD.size : start + _HEAD.size + len(raw)] = raw
        self._memory[end : end + _HEAD.size] = head

    def look(self) -> None:
        """Read of each row the newer of its writings that are whole."""
        for row in range(self._rows):
            number, at, raw = max(self._writing(row, 0), self._writing(row, 1))
            if number > self._read.get(row, (0,))[0]:
                self._read[row] = number, at, orjson.loads(raw)

    def _writing(self, row: int, which: int) -> tuple[int, float, bytes]:
        """Its number, time and data; the number is 0 when there is none, or it is being written just now."""
        assert self._memory is not None  # noqa: S101
        start, end = self._place(row, which)
        after = self._memory[end : end + _HEAD.size]
        number, at, length = _HEAD.unpack(after)
        raw = self._memory[start + _HEAD.size : start + _HEAD.size + length]
        return (number, at, raw) if self._memory[start : start + _HEAD.size] == after else (0, 0.0, b"")

    def close(self) -> None:
        """Leave the row to whoever comes next."""
        if self._memory is not None:
            self._memory.close()
            self._file.close()

    @staticmethod
    def _place(row: int, number: int) -> tuple[int, int]:
        """Where the first and the last number of a row's writing stand."""
        start = row * _ROW_BYTES + number % 2 * _WRITING_BYTES
        return start, start + _WRITING_BYTES - _HEAD.size

    def _free_row(self) -> int:
        for row in range(self._rows):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, row * _ROW_BYTES)
            except OSError:
                continue
            return row
        raise OSError(f"all {self._rows} rows of the board are taken")


def make_file(rows: int) -> Path:
    """An empty board of so many rows, in shared memory where there is some."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108  shared memory is what it is for
    handle, name = tempfile.mkstemp(prefix="pd-proxy-board-", dir=folder)
    os.truncate(handle, rows * _ROW_BYTES)
    os.close(handle)
    return Path(name)
