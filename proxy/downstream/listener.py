"""The event loop of the proxy: uvloop, but for how it takes new connections."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from ssl import SSLContext
from typing import Any

import uvloop

_MOST_A_TURN = 32
"""Running streams go on between two crowds."""
_TLS_CLOSE_S = 3600.0
"""What is written when a connection closes may take as long as its client goes on taking it: the protocol watches."""


class Loop(uvloop.Loop):
    """Takes a crowd of connections in one turn of the loop, as asyncio's own does; libuv takes one.

    A turn of a busy proxy lasts some 10 ms, so that of 300 clients who come at once the last would be heard after
    seconds, while those who are in are served again and again.
    """

    async def create_server(  # type: ignore[override]
        self, protocol_factory: Callable[[], asyncio.BaseProtocol], *args: Any, ssl: SSLContext | None = None, **kw: Any
    ) -> asyncio.AbstractServer:
        """As asyncio's. Raises what that raises."""
        tls: dict[str, Any] = {} if ssl is None else {"ssl": ssl, "ssl_shutdown_timeout": _TLS_CLOSE_S}
        acceptor = _Acceptor(self, protocol_factory, tls)
        server: asyncio.AbstractServer = await super().create_server(acceptor.made, *args, **(kw | tls))
        acceptor.server = server
        return server


class _Acceptor:
    """Whenever uvloop has taken one connection, others that wait are taken too."""

    def __init__(self, loop: Loop, factory: Callable[[], asyncio.BaseProtocol], tls: dict[str, Any]) -> None:
        self._loop, self._factory, self._tls = loop, factory, tls
        self._is_due = False
        self._beginning: set[asyncio.Task[Any]] = set()
        self.server: Any = None  # before it is made, nobody comes

    def made(self) -> asyncio.BaseProtocol:
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._accept_waiting)
        return self._factory()

    def _accept_waiting(self) -> None:
        self._is_due = False
        if not self.server.is_serving():
            return
        for listening in self.server.sockets:
            for client in _waiting(listening):
                task = self._loop.create_task(self._begin(client))
                self._beginning.add(task)
                task.add_done_callback(self._beginning.discard)

    async def _begin(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):  # gone again, or no TLS
            begun: Any = await self._loop.connect_accepted_socket(self._factory, client, **self._tls)
            if not self.server.is_serving():  # whoever closed it has not seen this one
                begun[0].close()


def _waiting(listening: socket.socket) -> Iterator[socket.socket]:
    """Connections that nobody has taken yet."""
    own = socket.socket(listening.family, listening.type, listening.proto, fileno=listening.fileno())
    try:
        for _ in range(_MOST_A_TURN):
            yield own.accept()[0]
    except OSError:  # there are no more; if it is that there are no descriptors, libuv knows what to do
        return
    finally:
        own.detach()
