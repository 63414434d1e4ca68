"""What systemd is told, where it wants to be (`Type=notify`): ready, stopping, and in a line what goes on."""

import os
import socket
from collections.abc import Mapping

from .events import Event

_VARIABLE = "NOTIFY_SOCKET"
_STOPPING = "Stopping:"


class ToSystemd:
    """A sink; see sd_notify(3)."""

    def __init__(self, address: str) -> None:
        self._address = address

    @classmethod
    def wanted(cls, environment: Mapping[str, str] = os.environ) -> "ToSystemd | None":
        address = environment.get(_VARIABLE)
        return cls("\0" + address[1:] if address.startswith("@") else address) if address else None

    def __call__(self, event: Event) -> None:
        lines = [f"STATUS={event.in_words().strip().splitlines()[0]}"]
        if event.kind == "ready":
            lines.append("READY=1")
        elif event.text.startswith(_STOPPING):
            lines.append("STOPPING=1")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, self._address)
