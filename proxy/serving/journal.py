"""What the worker processes of one proxy tell each other at once, one after the other, and not as a state now and then.

Each appends to a ring of its own in the board's file, and all read all. No locks: a record has a checksum, and the
ring's head is written after it. A reader that was away for so long that the writer has gone round has missed some, and
is told so; so it is when another process has taken the ring over.
"""

import mmap
import struct
import zlib
from array import array
from collections.abc import Iterator
from typing import Any

import orjson

RING_BYTES = 1 << 20
_HEAD = struct.Struct("<Q")
"""How many bytes were ever written to the ring."""
_ROOM = RING_BYTES - _HEAD.size
_RECORD = struct.Struct("<III")
"""CRC of the rest, bytes of JSON, number of keys."""

Record = tuple[Any, tuple[int, ...]]
"""JSON data, and 64-bit keys."""
MISSED = None
"""In the place of a record: some of this writer's were missed, or it is another process now."""


class Journal:
    """The rings as one worker sees them."""

    def __init__(self, memory: mmap.mmap, start: int, rings: int, own: int) -> None:
        """`start`: where the first ring lies; `own`: the number of this worker's."""
        self._memory = memory
        self._start = start
        self._own = own
        self._written = self._head(own)
        self._read = {ring: self._head(ring) for ring in range(rings) if ring != own}
        self._append(b"")

    def write(self, data: Any, keys: tuple[int, ...] = ()) -> None:
        """Tell the others. What does not fit in a ring is not told."""
        text = orjson.dumps(data)
        rest = _RECORD.pack(0, len(text), len(keys))[4:] + text + array("q", keys).tobytes()
        if len(rest) < _ROOM // 2:
            self._append(zlib.crc32(rest).to_bytes(4, "little") + rest)

    def read(self) -> Iterator[tuple[int, Record | None]]:
        """What the others have told since: (ring, record or MISSED)."""
        for ring, read in self._read.items():
            head = self._head(ring)
            if head != read:
                self._read[ring] = head
                yield from ((ring, record) for record in self._records(ring, read, head))

    def _append(self, record: bytes) -> None:
        """A record of no length says that this process is new."""
        raw = len(record).to_bytes(4, "little") + record
        self._written += len(raw)
        for run in self._runs(self._own, self._written - len(raw), len(raw)):
            self._memory[run] = raw[: run.stop - run.start]
            raw = raw[run.stop - run.start :]
        place = self._start + self._own * RING_BYTES
        self._memory[place : place + _HEAD.size] = _HEAD.pack(self._written)

    def _records(self, ring: int, read: int, head: int) -> Iterator[Record | None]:
        if not 0 < head - read <= _ROOM:
            yield MISSED
            return
        raw = b"".join(self._memory[run] for run in self._runs(ring, read, head - read))
        at = 0
        while at < len(raw):
            length = int.from_bytes(raw[at : at + 4], "little")
            record = raw[at + 4 : at + 4 + length]
            at += 4 + length
            if not length:
                yield MISSED
                continue
            if len(record) != length or int.from_bytes(record[:4], "little") != zlib.crc32(record[4:]):
                yield MISSED  # it was overwritten while it was read
                return
            yield _parsed(record)

    def _head(self, ring: int) -> int:
        place = self._start + ring * RING_BYTES
        return int(_HEAD.unpack(self._memory[place : place + _HEAD.size])[0])

    def _runs(self, ring: int, at: int, size: int) -> list[slice]:
        """Where so many bytes from there lie: one piece, or two around the ring's end."""
        first = self._start + ring * RING_BYTES + _HEAD.size
        begin = at % _ROOM
        end = begin + size
        if end <= _ROOM:
            return [slice(first + begin, first + end)]
        return [slice(first + begin, first + _ROOM), slice(first, first + end - _ROOM)]


def _parsed(record: bytes) -> Record:
    _, text, count = _RECORD.unpack_from(record)
    keys = array("q")
    keys.frombytes(record[_RECORD.size + text :][: count * keys.itemsize])
    return orjson.loads(record[_RECORD.size : _RECORD.size + text]), tuple(keys)
