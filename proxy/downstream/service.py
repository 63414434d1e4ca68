"""What the connections of one listener serve, and share."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .protocol import ClientProtocol
    from .request import ClientRequest

Handler = Callable[["ClientRequest"], Coroutine[Any, Any, None] | None]
"""Answers a request at once, or returns what will."""

_CHECK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Seconds, and how many."""

    head_s: float = 10
    body_s: float = 30
    stall_s: float = 120
    keep_alive_s: float = 75
    connections: int = 16384


@dataclass(eq=False, slots=True)
class Service:
    """One listener's."""

    post: Mapping[str, Handler]
    """The hot path: POST on these paths."""
    other: Handler
    """Everything else."""
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    connections: set["ClientProtocol"] = field(default_factory=set)
    default_headers: object = None
    default_head: bytes = b""
    """These headers of the server's, as they are written."""
    is_closing: bool = False
    """Answers are their connection's last: the process is about to end."""

    async def watch(self) -> None:
        """For ever: end the connections that do not go on."""
        while True:
            await asyncio.sleep(_CHECK_EVERY_S)
            now = time.monotonic()
            for connection in tuple(self.connections):
                connection.check(now)
