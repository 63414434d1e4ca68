"""A request's head. httptools parses it; what it does not check is checked here, and where it ends is found here.

RFC 9112; what two readers could understand differently is an error.
"""

from typing import Final
from urllib.parse import unquote

import httptools

from .framing import Body, ChunkedBody, LengthBody

MOST_HEAD_BYTES: Final = 64 * 1024
MOST_HEADERS: Final = 128
_END: Final = b"\r\n\r\n"
_ONCE: Final = frozenset({b"host", b"content-length", b"transfer-encoding"})
"""Twice, they mean two things."""
_MOST_LENGTH_DIGITS: Final = 18

Headers = list[tuple[bytes, bytes]]


class HeadError(Exception):
    """No request can be read from here on. `status` and `kind` are those of the answer."""

    def __init__(self, message: str, status: int = 400, kind: str = "BadRequestError") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class Head:
    """Fed until it is whole. An offer of another protocol (Upgrade) is passed over, as RFC 9110 section 7.8 allows."""

    __slots__ = (
        "_is_complete",
        "_parser",
        "_size",
        "_tail",
        "first",
        "headers",
        "is_1_0",
        "keeps_alive",
        "method",
        "target",
    )

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._is_complete = False
        self._size = 0
        self._tail = b""
        """The last bytes so far, in which the end may have begun."""
        self.headers: Headers = []
        self.first: dict[bytes, bytes] = {}
        """The first value of each header, by its name in lower case."""
        self.target = b""
        self.method = b""
        self.is_1_0 = False
        self.keeps_alive = True
        """The client does not want the answer to be the connection's last."""

    def feed(self, data: bytes) -> int:
        """Where the head ends in these bytes; -1 when it goes on after them. Raises HeadError."""
        joined = self._tail + data if self._tail else data
        found = joined.find(_END)
        end = found + len(_END) - len(self._tail) if found >= 0 else -1
        self._size += len(data) if end < 0 else end
        if self._size > MOST_HEAD_BYTES:
            raise _too_large()
        self._tail = joined[-3:]
        try:
            self._parser.feed_data(data if end < 0 or end == len(data) else data[:end])
        except httptools.HttpParserUpgrade:
            pass
        except httptools.HttpParserError as exc:
            raise _no_request() from exc
        if self._is_complete != (end >= 0):
            raise _no_request()
        if end >= 0:
            self._check()
        return end

    def body(self) -> Body | None:
        """How the request's body comes; None when it has none. Raises HeadError."""
        coding, length = self.first.get(b"transfer-encoding"), self.first.get(b"content-length")
        if coding is not None:
            if self.is_1_0 or length is not None or coding.lower() != b"chunked":
                raise HeadError("the request's body is in no coding that is read here")
            return ChunkedBody()
        if length is None:
            return None
        if not length.isdigit() or len(length) > _MOST_LENGTH_DIGITS:
            raise HeadError("the request's Content-Length is no number")
        return LengthBody(int(length)) if int(length) else None

    def path(self) -> tuple[str, bytes, bytes]:
        """The target's path, decoded; as it came; and its query."""
        target = self.target
        if not target.startswith(b"/"):
            target = self._origin_form(target)
        raw, _, query = target.partition(b"?")
        if len(raw) > 1 and raw.endswith(b"/"):  # the same route: a redirect would name us as we are behind a front
            raw = raw.rstrip(b"/") or b"/"
        path = raw.decode("latin-1")
        return unquote(path) if "%" in path else path, raw, query

    # -- what httptools calls

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._is_complete = True

    # -- inside

    def _check(self) -> None:
        """RFC 9112 section 3.2: one Host, which HTTP/1.0 may leave away."""
        if len(self.headers) > MOST_HEADERS:
            raise _too_large()
        first = self.first
        for name, value in self.headers:
            if name not in first:
                first[name] = value
            elif name in _ONCE:
                raise _no_request()
        self.method = self._parser.get_method()
        version = self._parser.get_http_version()
        self.is_1_0 = version == "1.0"
        if (not self.is_1_0 and (version != "1.1" or b"host" not in first)) or self.method == b"CONNECT":
            raise _no_request()
        if self.is_1_0 or b"connection" in first:
            self.keeps_alive = self._wants_to_stay()

    def _wants_to_stay(self) -> bool:
        said = b",".join(value.lower() for name, value in self.headers if name == b"connection")
        tokens = [token.strip() for token in said.split(b",")]
        return b"close" not in tokens and (not self.is_1_0 or b"keep-alive" in tokens)

    @staticmethod
    def _origin_form(target: bytes) -> bytes:
        """Of the absolute form, which a client may send to any server (RFC 9112 section 3.2.2)."""
        try:
            url = httptools.parse_url(target)
        except httptools.HttpParserInvalidURLError as exc:
            if target == b"*":
                return target
            raise _no_request() from exc
        return (url.path or b"/") + (b"?" + url.query if url.query else b"")


def _no_request() -> HeadError:
    return HeadError("this is not a valid HTTP request")


def _too_large() -> HeadError:
    limits = f"{MOST_HEAD_BYTES} bytes and {MOST_HEADERS} headers"
    return HeadError(f"a request's head has at most {limits}", 431, "RequestHeaderFieldsTooLargeError")
