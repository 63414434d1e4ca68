"""Where a request's body ends. No I/O: bytes in, content out, and what lies behind the body is left alone.

Strict (RFC 9112 section 7.1): what two readers could understand differently is an error. Trailers are dropped
(section 7.1.2 allows it): they would beat any front that filters headers.
"""

from typing import Protocol

_MOST_LINE_BYTES = 256
"""Of a chunk's size, extensions included, or of a trailer."""
_MOST_TRAILER_BYTES = 8 * 1024
_FREE_CHUNKS = 4096
_LEAST_CHUNK_BYTES = 64
"""On average, of more chunks than the free ones: each costs as much as a long one."""
_HEX = frozenset(b"0123456789abcdefABCDEF")


class FramingError(ValueError):
    """The body is not in the coding that its head promised."""


class Body(Protocol):
    """One request's body on its way in."""

    @property
    def is_complete(self) -> bool: ...

    @property
    def length(self) -> int | None:
        """All of it, in bytes; None when nobody knows before its end."""

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """(content of the body, what lies behind it). Raises FramingError."""


class LengthBody:
    """As long as Content-Length says."""

    __slots__ = ("_left", "is_complete", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self._left = length
        self.is_complete = length == 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        content, behind = (data, b"") if len(data) <= self._left else (data[: self._left], data[self._left :])
        self._left -= len(content)
        self.is_complete = self._left == 0
        return content, behind


class ChunkedBody:
    """Chunked coding."""

    length = None
    __slots__ = ("_chunks", "_held", "_in_trailers", "_left", "_size", "_trailer_bytes", "is_complete")

    def __init__(self) -> None:
        self.is_complete = False
        self._held = b""
        """The beginning of a line whose end has not come."""
        self._left = 0
        """Of the chunk that is coming: its content and the line end behind it."""
        self._in_trailers = False
        self._trailer_bytes = 0
        self._chunks = 0
        self._size = 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        if self._held:
            data, self._held = self._held + data, b""
        content: list[bytes] = []
        at = 0
        while at < len(data) and not self.is_complete:
            at = self._chunk(data, at, content) if self._left else self._line(data, at)
        return b"".join(content), data[at:] if self.is_complete else b""

    def _chunk(self, data: bytes, at: int, content: list[bytes]) -> int:
        """Some of a chunk's content and its line end; returns where it goes on."""
        piece = data[at : at + self._left]
        if len(piece) < self._left:
            if self._left - len(piece) < 2:  # its CR is here, its LF is not
                if not piece.endswith(b"\r"):
                    raise FramingError("a chunk is longer than its size")
                content.append(piece[:-1])
                self._left, self._held = 2, b"\r"
                return len(data)
            content.append(piece)
            self._left -= len(piece)
            return len(data)
        if not piece.endswith(b"\r\n"):
            raise FramingError("a chunk is longer than its size")
        content.append(piece[:-2])
        self._left = 0
        return at + len(piece)

    def _line(self, data: bytes, at: int) -> int:
        """A chunk's size, or a trailer; returns where it goes on."""
        end = data.find(b"\r\n", at, at + _MOST_LINE_BYTES)
        if end < 0:
            if len(data) - at >= _MOST_LINE_BYTES or b"\n" in data[at:]:
                raise FramingError("a chunk's size is no line")
            self._held = data[at:]
            return len(data)
        line = data[at:end]
        if self._in_trailers:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > _MOST_TRAILER_BYTES:
                raise FramingError("too many trailers")
            self.is_complete = not line
        else:
            self._begin_chunk(line)
        return end + 2

    def _begin_chunk(self, line: bytes) -> None:
        digits = line.partition(b";")[0].rstrip(b" \t")
        if not 0 < len(digits) <= 15 or not _HEX.issuperset(digits) or b"\r" in line or b"\n" in line:
            raise FramingError("a chunk's size is no number")
        size = int(digits, 16)
        self._chunks += 1
        self._size += size
        if self._chunks > _FREE_CHUNKS and self._size < self._chunks * _LEAST_CHUNK_BYTES:
            raise FramingError("the chunks are too small")
        if size == 0:
            self._in_trailers = True
        else:
            self._left = size + 2
