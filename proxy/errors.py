"""What can go wrong in an exchange. Turned into an HTTP answer in `app.py`, and nowhere else.

ProxyError
├── BadRequestError          400  the client's body cannot be a request
├── NotServedError           404  no node serves the route
├── NodeRefusedError         4xx  a node refused the request, inside a stream
├── OverloadedError          429  no room, now
├── NoNodeError              503  no usable node of a role
├── ShuttingDownError        503  the proxy ends, and the grace time is over
├── LateError                504  the request's own time is over
├── ClientStalledError       408  the client stopped reading; nobody hears this, the log and the metrics tell it
└── NodeError                502  a node failed us: another one may not
    ├── NodeUnreachableError 502  ... it takes no connection
    ├── NodeTimeoutError     504  ... by silence
    ├── NodeAnsweredError    5xx  ... by an answer that says so, or 429; its words stay here: they may tell of paths
    └── NodeBrokeOffError    502  ... after its answer had begun
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

_KINDS = {
    429: "TooManyRequestsError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


class ProxyError(Exception):
    """`message` says what happened and where, `hint` how to mend it. `kind` is the `type` of OpenAI's error body."""

    status = 500
    kind = "InternalServerError"

    def __init__(self, message: str, hint: str = "", param: str | None = None) -> None:
        super().__init__(f"{message}. {hint}" if hint else message)
        self.param = param


class ClientGoneError(Exception):
    """The client closed its connection before its answer was complete."""


class BadRequestError(ProxyError):
    status = 400
    kind = "BadRequestError"


class NotServedError(ProxyError):
    status = 404
    kind = "NotFoundError"


class NodeRefusedError(ProxyError):
    """Passed on as the node put it: status, type, message, param."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(str(error.get("message", "refused")), param=error.get("param"))
        self.status = status
        self.kind = str(error.get("type", "BadRequestError"))


class OverloadedError(ProxyError):
    status = 429
    kind = "TooManyRequestsError"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message, f"Try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class NoNodeError(ProxyError):
    status = 503
    kind = "ServiceUnavailableError"
    retry_after_s = 2


class ShuttingDownError(ProxyError):
    status = 503
    kind = "ServiceUnavailableError"


class LateError(ProxyError):
    status = 504
    kind = "GatewayTimeoutError"


class ClientStalledError(ProxyError):
    status = 408
    kind = "RequestTimeoutError"


class NodeError(ProxyError):
    status = 502
    kind = "BadGatewayError"
    may_be_retried = True
    """On another node, as long as the client has seen nothing."""


class NodeUnreachableError(NodeError):
    """No connection: nothing was asked of it."""


class NodeTimeoutError(NodeError):
    status = 504
    kind = "GatewayTimeoutError"


class NodeAnsweredError(NodeError):
    """A 5xx or a 429: its status is what the client gets when no other node does better."""

    def __init__(self, node: str, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        super().__init__(f"node {node} answered {status}", "Its own log tells why")
        self.status = status
        self.kind = _KINDS.get(status, "InternalServerError")
        self.headers = headers
        self.body = body

    @property
    def retry_after_s(self) -> float | None:
        """From the answer's Retry-After, a number of seconds or a date; None when there is none that can be read."""
        given = next((value.decode("latin-1") for name, value in self.headers if name == b"retry-after"), "")
        if given.strip().isdigit():
            return float(given)
        try:
            return max(0.0, (parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds())
        except (TypeError, ValueError):
            return None


class NodeBrokeOffError(NodeError):
    """Its answer had begun: whoever reads it must learn that it is not whole."""
