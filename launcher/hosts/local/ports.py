"""Which ports are free on the address that will be bound, who holds the others, and keeping ours until they are used.

Three things can take a port between the check and the child's own bind. Another launcher: kept off by a lock, a name
in the kernel's abstract namespace that is gone with its process. A program that lets the kernel choose, or that does
not share addresses: kept off by a socket that is bound and does not listen, beside which the child can bind. A program
that shares the address and listens: seen afterwards, and answered with the next port of the range.
"""

import errno
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import psutil

from ...errors import LauncherError, PortBusyError
from ...plan.seats import Port
from ...plan.secrets import without_secrets
from .locks import locked_spans


@dataclass(frozen=True, slots=True)
class Busy:
    """A port of the plan that something else has."""

    port: int
    bind: str
    holder: str
    """In words: pid, user, command; or that it cannot be seen."""


def busy_ports(port: Port) -> list[Busy]:
    """Those of a planned port's numbers that cannot be bound now. Raises LauncherError for an address not ours."""
    numbers = [number for number in range(port.first, port.last + 1) if not _can_bind(port, number)]
    holders = _holders() if numbers else {}
    return [Busy(number, port.bind, holders.get(number, _unseen(number))) for number in numbers]


def taken(ranges: Iterable[Port]) -> tuple[dict[int, str], dict[str, str]]:
    """Number -> holder, of all that cannot be had in these ranges: bound by somebody, or kept by another launcher.

    And the addresses among theirs that nothing here can bind -> why not.
    """
    found: dict[int, str] = {}
    unusable: dict[str, str] = {}
    kept = locked_spans()
    for port in ranges:
        try:
            found |= {busy.port: busy.holder for busy in busy_ports(port)}
        except LauncherError as exc:
            unusable[port.bind] = str(exc)
        for first, last in kept:
            for number in range(max(first, port.first), min(last, port.last) + 1):
                found.setdefault(number, "another pd-launch")
    return found, unusable


class Hold:
    """Single ports of a child that will bind them soon; kept from everybody who does not share addresses."""

    def __init__(self, ports: Iterable[Port]) -> None:
        """Raises PortBusyError, LauncherError."""
        self._sockets: list[socket.socket] = []
        for port in ports:
            if port.first != port.last:
                continue  # a transfer engine looks for a port that nobody has bound at all
            try:
                self._hold(port)
            except OSError as exc:
                self.release()
                if exc.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise LauncherError(f"cannot keep port {port.first} on {port.bind}: {exc.strerror}") from exc
                holder = _holders().get(port.first, _unseen(port.first))
                raise PortBusyError(f"{port.purpose} port {port.first} on {port.bind} is taken by {holder}") from exc

    def _hold(self, port: Port) -> None:
        held = socket.socket(_family(port.bind), socket.SOCK_STREAM)
        self._sockets.append(held)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((port.bind, port.first))

    def release(self) -> None:
        for held in self._sockets:
            held.close()
        self._sockets.clear()


def holder_of(ports: Iterable[Port]) -> str:
    """Which of these single ports is taken, and by whom; empty when none is."""
    for port in ports:
        busy = busy_ports(port) if port.first == port.last else []
        if busy:
            return f"port {busy[0].port} was taken by {busy[0].holder}"
    return ""


def _can_bind(port: Port, number: int) -> bool:
    # The transfer engine binds without SO_REUSEADDR (so TIME_WAIT counts for it); every other server sets it.
    if port.purpose != "transfer":
        return _is_free(port.bind, number, reuse=True)
    return _is_free("0.0.0.0", number, reuse=False) and _is_free("::", number, reuse=False)  # noqa: S104  it needs both


def _is_free(address: str, port: int, *, reuse: bool) -> bool:
    try:
        with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
            if reuse:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            probe.listen(1)  # a socket that only reserves the port lets bind pass; listen then fails
    except OSError as exc:
        if exc.errno in (errno.EADDRINUSE, errno.EACCES):
            return False
        if address == "::" and exc.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # no IPv6 here: nobody has it
            return True
        raise LauncherError(f"cannot use address {address}: {exc.strerror}", "Is it one of this host's?") from exc
    return True


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _holders() -> Mapping[int, str]:
    """Port -> who listens on it. TIME_WAIT has no process any more."""
    holders: dict[int, str] = {}
    for connection in psutil.net_connections(kind="tcp"):
        port = connection.laddr.port if connection.laddr else 0
        if connection.status == psutil.CONN_LISTEN:
            holders[port] = _describe(connection.pid)
        elif connection.status == psutil.CONN_TIME_WAIT:
            holders.setdefault(port, "a connection closed less than a minute ago (TIME_WAIT); wait, or use other ports")
    return holders


def _describe(pid: int | None) -> str:
    if pid is None:
        return "a process of another user"
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            command = " ".join(without_secrets(process.cmdline())) or process.name()
            return f"pid {pid} of user {process.username()}: {command[:120]}"
    except psutil.Error:
        return f"pid {pid}, which has just ended"


def _unseen(port: int) -> str:
    if port < 1024 and os.geteuid() != 0:
        return "the kernel, which gives ports below 1024 to root only"
    return "a process that reserves it without listening, or of another user or network namespace"
