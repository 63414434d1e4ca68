"""Ports and GPUs that one launcher plans with and no other: names in the kernel's abstract namespace of Unix sockets.

They are gone with their process, need no cleaning up, are seen by all users, and are as wide as the network namespace.
"""

import socket
from collections.abc import Iterable
from pathlib import Path

import psutil

from ...errors import PortBusyError
from ...plan.seats import Port

_PORTS = "pd-launch/ports/"
_GPU = "pd-launch/gpu/"
_UNIX_SOCKETS = Path("/proc/net/unix")
Span = tuple[int, int]


class Locks:
    """One launcher's. Implements `hosts.host.Reservation`."""

    def __init__(self) -> None:
        self._names: dict[str, socket.socket] = {}

    def take(self, ports: Iterable[Port], gpus: Iterable[str] = ()) -> None:
        """All of them or none. Raises PortBusyError."""
        mine: list[str] = []
        spans = [(port.first, port.last) for port in ports]
        try:
            for name in (*map(_name, spans), *(f"{_GPU}{gpu}" for gpu in gpus)):
                if name not in self._names:  # two nodes of a run may share a GPU
                    self._names[name] = _bound(name)
                    mine.append(name)
            others = [span for span in locked_spans() if _name(span) not in self._names]
            for span in spans:
                for other in others:
                    if span[0] <= other[1] and other[0] <= span[1]:
                        raise _kept(_name(other))
        except PortBusyError:
            self._give_back(mine)
            raise

    def give_back(self, ports: Iterable[Port], gpus: Iterable[str] = ()) -> None:
        self._give_back([_name((port.first, port.last)) for port in ports] + [f"{_GPU}{gpu}" for gpu in gpus])

    def close(self) -> None:
        self._give_back(list(self._names))

    def _give_back(self, names: Iterable[str]) -> None:
        for name in names:
            if (kept := self._names.pop(name, None)) is not None:
                kept.close()


def locked_spans() -> set[Span]:
    """Ports that launchers keep in this network namespace, this one included."""
    spans = set()
    for rest in _rests(_PORTS):
        first, dash, last = rest.partition("-")
        if dash and first.isdigit() and last.isdigit():
            spans.add((int(first), int(last)))
    return spans


def locked_gpus() -> dict[str, str]:
    """UUID -> who keeps it, in words."""
    return {uuid: keeper(f"{_GPU}{uuid}") for uuid in _rests(_GPU)}


def keeper(name: str) -> str:
    """Whoever keeps a name: a process of ours can be named, another user's only as one."""
    for connection in psutil.net_connections(kind="unix"):
        if name in str(connection.laddr) and str(connection.laddr).endswith(name) and connection.pid:
            return f"another pd-launch, pid {connection.pid}"
    return "another pd-launch, of another user"


def _rests(beginning: str) -> set[str]:
    try:
        lines = _UNIX_SOCKETS.read_text(errors="replace").splitlines()
    except OSError:  # a sandbox with a /proc of its own: its names are kept from others all the same
        return set()
    marks = (line.partition(f"@{beginning}") for line in lines)
    return {rest for _, mark, rest in marks if mark}


def _name(span: Span) -> str:
    return f"{_PORTS}{span[0]}-{span[1]}"


def _bound(name: str) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        found.bind(f"\0{name}")
    except OSError as exc:
        found.close()
        raise _kept(name) from exc
    return found


def _kept(name: str) -> PortBusyError:
    if name.startswith(_GPU):
        return PortBusyError(
            f"GPU {name.removeprefix(_GPU)}: kept by {keeper(name)}", "Stop that one, or use another GPU"
        )
    first, _, last = name.removeprefix(_PORTS).partition("-")
    ports = f"port {first}" if first == last else f"ports {first}-{last}"
    return PortBusyError(f"{ports}: kept by {keeper(name)}", "Stop that one, or choose other ports")
