"""What the worker processes of one proxy tell each other: each writes its own row of a shared file, all read all.

No locks and no server: a row is written whole between two copies of its number, and a reader that finds them unequal
keeps what it read before. The rows are some tenths of a second old, and that is enough: a worker knows its own load
exactly, and its part of the others' only guides the choice between nodes, and adds up to one `/health` and one
`/metrics` whichever worker is asked.
"""

import asyncio
import fcntl
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

_ROW_BYTES = 256 * 1024
_HEAD = struct.Struct("<QdI")
"""Number of the writing, time of it (monotonic, the same for all processes of a machine), length of the data."""
_EVERY_S = 0.1
_STALE_S = 3.0
"""A row that old is a dead worker's, and no longer counts."""


class Board:
    """The board as one worker sees it. With a single process there is no file, and nobody else."""

    def __init__(self, file: Path | None = None) -> None:
        """Join the board in `file`: take a row that no living process holds. Raises OSError when there is none."""
        self._row = -1
        self._rows = 0
        self._written = 0
        self._read: dict[int, tuple[float, dict[str, Any]]] = {}
        self._memory: mmap.mmap | None = None
        self.inherited: dict[str, Any] | None = None
        """What the row's last owner, a worker that died, had written: its counts go on, or they would fall."""
        if file is not None:
            self._file = file.open("r+b")  # open as long as we live: the lock on our row goes with it
            self._rows = os.fstat(self._file.fileno()).st_size // _ROW_BYTES
            self._memory = mmap.mmap(self._file.fileno(), self._rows * _ROW_BYTES)
            self._row = self._free_row()
            self.look()
            self.inherited = self._read.pop(self._row, (0, None))[1]
            self._written = _HEAD.unpack_from(self._memory, self._row * _ROW_BYTES)[0]

    def others(self, *, alive: bool = True) -> list[dict[str, Any]]:
        """The rows of the other workers as of the last look; those of dead ones too unless they must be `alive`."""
        oldest = time.monotonic() - _STALE_S if alive else -1
        return [data for row, (at, data) in self._read.items() if at > oldest and row != self._row]

    @property
    def is_shared(self) -> bool:
        return self._memory is not None

    async def run(self, own: Callable[[], dict[str, Any]], seen: Callable[[], object]) -> None:
        """Write this worker's row, read the others' and say that it was done, for ever."""
        while True:
            self.write(own())
            self.look()
            seen()
            await asyncio.sleep(_EVERY_S)

    def write(self, data: dict[str, Any]) -> None:
        """Raises ValueError when it does not fit, which bounded series never let happen."""
        assert self._memory is not None  # noqa: S101  asked in `run`
        raw = orjson.dumps(data)
        if len(raw) > _ROW_BYTES - 2 * _HEAD.size:
            raise ValueError(f"a row of {len(raw)} bytes does not fit on the board")
        self._written += 1
        head = _HEAD.pack(self._written, time.monotonic(), len(raw))
        start = self._row * _ROW_BYTES
        end = start + _ROW_BYTES - _HEAD.size
        self._memory[start : start + _HEAD.size] = head
        self._memory[start + _HEAD.size : start + _HEAD.size + len(raw)] = raw
        self._memory[end : end + _HEAD.size] = head

    def look(self) -> None:
        """Read the other rows; one that is being written just now stays as it was."""
        assert self._memory is not None  # noqa: S101
        for row in range(self._rows):
            start = row * _ROW_BYTES
            end = start + _ROW_BYTES - _HEAD.size
            after = self._memory[end : end + _HEAD.size]
            number, at, length = _HEAD.unpack(after)
            if number == 0:
                continue
            raw = self._memory[start + _HEAD.size : start + _HEAD.size + length]
            if self._memory[start : start + _HEAD.size] == after:
                self._read[row] = at, orjson.loads(raw)

    def close(self) -> None:
        """Leave the row to whoever comes next."""
        if self._memory is not None:
            self._memory.close()
            self._file.close()

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
