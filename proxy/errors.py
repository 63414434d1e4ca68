"""What can go wrong in an exchange. Turned into an HTTP answer in `app.py`, and nowhere else.

ProxyError
├── BadRequestError      400  the client's body cannot be a request
├── NoNodeError          503  no usable node of a role
└── NodeError            502  a node failed us
    ├── NodeTimeoutError 504  ... by silence
    └── NodeBrokeOffError 502 ... after its answer had begun
"""

from typing import Any


class ProxyError(Exception):
    """`message` says what happened and where, `hint` how to mend it. `kind` is the `type` of OpenAI's error body."""

    status = 500
    kind = "InternalServerError"

    def __init__(self, message: str, hint: str = "", param: str | None = None) -> None:
        super().__init__(f"{message}. {hint}" if hint else message)
        self.param = param


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


class NoNodeError(ProxyError):
    status = 503
    kind = "ServiceUnavailableError"


class NodeError(ProxyError):
    status = 502
    kind = "BadGatewayError"


class NodeTimeoutError(NodeError):
    status = 504
    kind = "GatewayTimeoutError"


class NodeBrokeOffError(NodeError):
    """Its answer had begun: whoever reads it must learn that it is not whole."""
