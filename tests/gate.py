"""A TCP relay in front of a node that can be shut: a fault made while it is shut strikes at that very stage."""

import socket
import threading
from contextlib import suppress
from typing import Literal
from urllib.parse import urlsplit

What = Literal["request", "answer"]


class Gate:
    """Relays for one node at `url`; `shut` keeps back what comes next for one route, `open` and `drop` end that."""

    def __init__(self, node_url: str) -> None:
        parts = urlsplit(node_url)
        self._node = (parts.hostname or "", parts.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._what: What | None = None
        self._route = b""
        self._is_open = threading.Event()
        self._drops = False
        self.holds = threading.Event()
        """Something is kept back now."""
        threading.Thread(target=self._accept, daemon=True).start()

    def shut(self, what: What, route: str) -> None:
        self.holds.clear()
        self._is_open.clear()
        self._drops = False
        self._what, self._route = what, f"POST {route} ".encode()

    def open(self) -> None:
        self._what = None
        self._is_open.set()

    def drop(self) -> None:
        """Open again, but what was kept back is lost, and its connection with it."""
        self._drops = True
        self.open()

    def close(self) -> None:
        self.drop()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        try:
            node = socket.create_connection(self._node)
        except OSError:
            client.close()
            return
        asked = bytearray()
        back = threading.Thread(target=self._pass_on, args=(node, client, "answer", asked), daemon=True)
        back.start()
        self._pass_on(client, node, "request", asked)
        back.join()
        client.close()
        node.close()

    def _pass_on(self, source: socket.socket, to: socket.socket, what: What, asked: bytearray) -> None:
        """Until one side closes. `asked`: how the connection's latest request begins; both directions know it."""
        with suppress(OSError):
            while data := source.recv(2**16):
                if what == "request" and data.startswith((b"POST ", b"GET ")):
                    asked[:] = data[:64]
                if self._what == what and asked.startswith(self._route):
                    self.holds.set()
                    self._is_open.wait()
                    if self._drops:
                        break
                to.sendall(data)
        for end in (source, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
