"""What the worker processes of one proxy tell each other: each writes its own row of a shared file, all read all.

No locks and no server: a row has room for two writings, made in turn, each with a checksum in its head. A reader takes
the newer one that is whole, so that a worker killed while it writes leaves what it wrote before; that holds on machines
that write to memory in another order, too. One more row is the prober's: it is written by the one worker that probes
the nodes for all. The rows are a tenth of a second old, and that is enough: a worker knows its own load exactly, and
its part of the others' only guides the choice between nodes, and adds up to one `/health` and one `/metrics` whichever
worker is asked.
"""

import fcntl
import mmap
import os
import struct
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import orjson

from .journal import RING_BYTES, Journal

_WRITING_BYTES = 128 * 1024
_ROW_BYTES = 2 * _WRITING_BYTES
_FINDINGS_BYTES = 4 * 2**20
"""Of one writing of the prober's: every node's model cards are in it, some 500 bytes for each LoRA adapter."""
_HEAD = struct.Struct("<QdII")
"""Number of the writing, time of it (monotonic, the same for all processes of a machine), length of the data, and the
CRC of all of these."""
_STALE_S = 3.0
"""A row that old is a dead worker's, and no longer counts."""


class Board:
    """The board as one worker sees it. With a single process there is no file, and nobody else."""

    def __init__(self, file: Path | None = None) -> None:
        """Join the board in `file`: take a row that no living process holds. Raises OSError when there is none."""
        self._row = -1
        self._rows = 0
        self._written = 0
        self._findings_written = 0
        self._read: dict[int, tuple[int, float, dict[str, Any]]] = {}
        self._memory: mmap.mmap | None = None
        self.journal: Journal | None = None
        """What is told at once; None with a single process."""
        self.ended: Journal | None = None
        """The requests that have ended, likewise."""
        self.inherited: dict[str, Any] | None = None
        """What the row's last owner, a worker that died, had written: its counts go on, or they would fall."""
        if file is not None:
            self._file = file.open("r+b")  # open as long as we live: the lock on our row goes with it
            size = os.fstat(self._file.fileno()).st_size
            self._rows = (size - 2 * _FINDINGS_BYTES) // (_ROW_BYTES + 2 * RING_BYTES)
            self._memory = mmap.mmap(self._file.fileno(), size)
            self._row = self._free_row()
            self.read()
            self._written, _, self.inherited = self._read.pop(self._row, (0, 0.0, None))
            rings = self._rows * _ROW_BYTES + 2 * _FINDINGS_BYTES
            self.journal = Journal(self._memory, rings, self._rows, self._row)
            self.ended = Journal(self._memory, rings + self._rows * RING_BYTES, self._rows, self._row)

    def others(self, *, alive: bool = True) -> list[dict[str, Any]]:
        """The rows of the other workers as of the last read; those of dead ones too unless they must be `alive`."""
        oldest = time.monotonic() - _STALE_S if alive else -1
        return [data for row, (_, at, data) in self._read.items() if at > oldest and row not in (self._row, self._rows)]

    @property
    def is_shared(self) -> bool:
        return self._memory is not None

    def lead(self) -> bool:
        """Become the worker that probes for all; False while another one is, which it stays for as long as it lives."""
        return self._memory is None or self._take(self._rows)

    def write(self, data: dict[str, Any]) -> None:
        """Write our row. Raises ValueError when it does not fit, which bounded series never let happen."""
        self._written += 1
        self._write(self._row, self._written, data)

    def write_findings(self, data: dict[str, Any]) -> None:
        """Write what the probes found; only the worker that leads may. Raises ValueError when it does not fit."""
        self._findings_written = max(self._findings_written, self._read.get(self._rows, (0,))[0]) + 1
        self._write(self._rows, self._findings_written, data)

    def findings(self) -> tuple[float, dict[str, Any]] | None:
        """What the probes found, as of the last read, and when that was written; None when nothing was yet."""
        number, at, data = self._read.get(self._rows, (0, 0.0, {}))
        return (at, data) if number else None

    def read(self) -> None:
        """Read of each row the newer of its writings that are whole. What cannot be read stays as it was."""
        for row in range(self._rows + 1):
            known = self._read.get(row, (0,))[0]
            number, at, raw = max(self._writing(row, 0, known), self._writing(row, 1, known))
            if number:
                self._read[row] = number, at, orjson.loads(raw)

    def _write(self, row: int, number: int, data: dict[str, Any]) -> None:
        assert self._memory is not None  # noqa: S101  asked by whoever calls
        raw = orjson.dumps(data)
        if len(raw) > self._bytes_of(row) - _HEAD.size:
            raise ValueError(f"a row of {len(raw)} bytes does not fit on the board")
        start = self._place(row, number)
        self._memory[start + _HEAD.size : start + _HEAD.size + len(raw)] = raw
        now = time.monotonic()
        self._memory[start : start + _HEAD.size] = _HEAD.pack(number, now, len(raw), _crc(number, now, raw))

    def _writing(self, row: int, which: int, known: int) -> tuple[int, float, bytes]:
        """Its number, time and data; the number is 0 when it is not after `known`, or is being written just now."""
        assert self._memory is not None  # noqa: S101
        start = self._place(row, which)
        number, at, length, crc = _HEAD.unpack(self._memory[start : start + _HEAD.size])
        if number <= known:
            return 0, 0.0, b""
        raw = self._memory[start + _HEAD.size : start + _HEAD.size + length]
        return (number, at, raw) if _crc(number, at, raw) == crc else (0, 0.0, b"")

    def close(self) -> None:
        """Leave the row to whoever comes next."""
        if self._memory is not None:
            self._memory.close()
            self._file.close()

    def _bytes_of(self, row: int) -> int:
        """Of one of its two writings."""
        return _FINDINGS_BYTES if row == self._rows else _WRITING_BYTES

    def _place(self, row: int, number: int) -> int:
        """Where a row's writing begins."""
        return row * _ROW_BYTES + number % 2 * self._bytes_of(row)

    def _free_row(self) -> int:
        for row in range(self._rows):
            if self._take(row):
                return row
        raise OSError(f"all {self._rows} rows of the board are taken")

    def _take(self, row: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, row * _ROW_BYTES)
        except OSError:
            return False
        return True


def _crc(number: int, at: float, raw: bytes) -> int:
    """Of the head as well: a new number before the data of the writing before would pass old data off as the newest."""
    return zlib.crc32(raw, zlib.crc32(_HEAD.pack(number, at, len(raw), 0)))


def make_file(rows: int) -> Path:
    """An empty board of so many rows, in shared memory where there is some."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108  shared memory is what it is for
    handle, name = tempfile.mkstemp(prefix="pd-proxy-board-", dir=folder)
    os.truncate(handle, rows * (_ROW_BYTES + 2 * RING_BYTES) + 2 * _FINDINGS_BYTES)
    os.close(handle)
    return Path(name)
