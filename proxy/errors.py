"""What can go wrong in an exchange. Turned into an HTTP answer in `serving/endpoint.py`, and nowhere else.

ProxyError
├── BadRequestError          400  the client's body cannot be a request
├── NotServedError           404  no node serves the route
├── ClientStalledError       408  the client stopped reading; nobody hears this, the log and the metrics tell it
├── BodyTooLargeError        413  refused while it is being read: no more than the limit is ever held
├── UnsupportedEncodingError 415  a compressed body
├── OverloadedError          429  no room, now
├── NodeRefusedError         4xx  a node refused the request, inside a stream
├── NoNodeError              503  no usable node of a role
├── ShuttingDownError        503  the proxy ends, and the grace time is over
├── LateError                504  the request's own time is over
└── NodeError                502  a node failed us: another one may not
    ├── NodeUnreachableError 502  ... it takes no connection: it has not got the request
    ├── NodeTimeoutError     504  ... by silence
    ├── NodeAnsweredError    5xx  ... by an answer that says so, or 429; its words stay here: they may tell of paths
    ├── NodeFullError        503  ... by a first event that says so
    ├── NodeRejectsKeyError  502  ... it does not take the proxy's key
    └── NodeBrokeOffError    502  ... after its answer had begun

An error knows from birth whose fault it is (`source`), whether the node may have received the request
(`maybe_received`), and whether another node may do better (`may_be_retried`).
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

_KINDS = {
    429: "TooManyRequestsError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}

Source = Literal["client", "node", "proxy"]


class ProxyError(Exception):
    """`message` says what happened and where, `hint` how to fix it. `kind` is the `type` of OpenAI's error body."""

    status = 500
    kind = "InternalServerError"
    source: Source = "proxy"
    retry_after_s: float | None = None
    """When to come back; None when that would not help."""

    def __init__(self, message: str, hint: str = "", param: str | None = None) -> None:
        super().__init__(f"{message}. {hint}" if hint else message)
        self.param = param

    @property
    def for_the_log(self) -> str:
        """The same without a word that a client or a node chose."""
        return str(self)


class ClientGoneError(Exception):
    """The client closed its connection before its answer was complete."""


class BadRequestError(ProxyError):
    status = 400
    kind = "BadRequestError"
    source: Source = "client"

    @property
    def for_the_log(self) -> str:
        return "the client's request is invalid"


class NotServedError(ProxyError):
    status = 404
    kind = "NotFoundError"
    source: Source = "client"


class ClientStalledError(ProxyError):
    status = 408
    kind = "RequestTimeoutError"
    source: Source = "client"


class BodyTooLargeError(ProxyError):
    status = 413
    kind = "RequestEntityTooLargeError"
    source: Source = "client"


class UnsupportedEncodingError(ProxyError):
    status = 415
    kind = "UnsupportedMediaTypeError"
    source: Source = "client"


class NodeRefusedError(ProxyError):
    """Passed on as the node put it: status, type, message, param."""

    source: Source = "client"

    def __init__(self, node: str, status: int, error: dict[str, Any]) -> None:
        super().__init__(str(error.get("message", "refused")), param=error.get("param"))
        self.status = status
        self.kind = str(error.get("type", "BadRequestError"))
        self._node = node

    @property
    def for_the_log(self) -> str:
        return f"node {self._node} refused the request: {self.status}"


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


class NodeError(ProxyError):
    status = 502
    kind = "BadGatewayError"
    source: Source = "node"
    maybe_received = True
    """The request may have reached the node, or part of it."""
    may_be_retried = True
    """On another node, as long as the client has seen nothing."""
    reason = "broke-off"
    """In one word, for the metrics."""


class NodeUnreachableError(NodeError):
    maybe_received = False
    reason = "unreachable"


class NodeTimeoutError(NodeError):
    """`may_be_retried`: not where another node would need as long."""

    status = 504
    kind = "GatewayTimeoutError"
    reason = "late"

    def __init__(self, message: str, *, may_be_retried: bool = True) -> None:
        super().__init__(message)
        self.may_be_retried = may_be_retried


class NodeRejectsKeyError(NodeError):
    may_be_retried = False
    reason = "key"

    def __init__(self, node: str) -> None:
        super().__init__(f"node {node} does not take the proxy's key", "Set PD_NODE_API_KEY to the nodes' own")


class NodeAnsweredError(NodeError):
    """A 5xx or a 429: its status is what the client gets when no other node does better."""

    def __init__(self, node: str, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        super().__init__(f"node {node} answered {status}", "Its own log tells why")
        self.status = status
        self.kind = _KINDS.get(status, "InternalServerError")
        self.reason = str(status)
        self.body = body
        self.retry_after_s = _retry_after_s(headers)

    @property
    def is_the_nodes_own(self) -> bool:
        """502 and 504 are of something in between: of what the node itself did they say nothing."""
        return self.status not in (502, 504)


class NodeFullError(NodeError):
    """Said as the first event of a stream: its engine has not got the request."""

    status = 503
    kind = "ServiceUnavailableError"
    reason = "503"

    def __init__(self, node: str) -> None:
        super().__init__(f"node {node} has no room for the request", "Its own log tells why")


class NodeBrokeOffError(NodeError):
    """Its answer had begun: whoever reads it must learn that it is not whole."""


def _retry_after_s(headers: Sequence[tuple[bytes, bytes]]) -> float | None:
    """From an answer's Retry-After, a number of seconds or a date; None when there is none that can be read."""
    given = next((value.decode("latin-1") for name, value in headers if name == b"retry-after"), "")
    if given.strip().isdigit():
        return float(given)
    try:
        return max(0.0, (parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
