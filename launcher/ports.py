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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from .errors import LauncherError, PortBusyError
from .seats import Port

_LOCK = "pd-launch/ports/"


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


def taken(ranges: Iterable[Port]) -> dict[int, str]:
    """Number -> holder, of all that cannot be had in these ranges: bound by somebody, or kept by another launcher."""
    found: dict[int, str] = {}
    kept = _locked()
    for port in ranges:
        with suppress(LauncherError):  # an address that is not this host's: said by the checks
            found |= {busy.port: busy.holder for busy in busy_ports(port)}
        for first, last in kept:
            for number in range(max(first, port.first), min(last, port.last) + 1):
                found.setdefault(number, "another pd-launch")
    return found


class Locks:
    """Ports that no other launcher in this network namespace plans with, until they are given back."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, int], socket.socket] = {}

    def take(self, ports: Iterable[Port]) -> None:
        """All of them or none. Raises PortBusyError."""
        mine: list[tuple[int, int]] = []
        try:
            for port in ports:
                span = (port.first, port.last)
                self._names[span] = _bound_name(span)
                mine.append(span)
            others = _locked() - self._names.keys()
            for first, last in mine:
                if any(first <= other[1] and other[0] <= last for other in others):
                    raise _kept(first, last)
        except PortBusyError:
            self._give_back(mine)
            raise

    def give_back(self, ports: Iterable[Port]) -> None:
        self._give_back((port.first, port.last) for port in ports)

    def _give_back(self, spans: Iterable[tuple[int, int]]) -> None:
        for span in spans:
            self._names.pop(span).close()


class Hold:
    """Single ports of a child that will bind them soon; kept from everybody who does not share addresses."""

    def __init__(self, ports: Iterable[Port]) -> None:
        """Raises PortBusyError."""
        self._sockets: list[socket.socket] = []
        for port in ports:
            if port.first != port.last:
                continue  # a transfer engine looks for a port that nobody has bound at all
            held = socket.socket(_family(port.bind), socket.SOCK_STREAM)
            self._sockets.append(held)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                held.bind((port.bind, port.first))
            except OSError as exc:
                self.let_go()
                holder = _holders().get(port.first, _unseen(port.first))
                raise PortBusyError(f"{port.purpose} port {port.first} on {port.bind} is taken by {holder}") from exc

    def let_go(self) -> None:
        for held in self._sockets:
            held.close()
        self._sockets.clear()


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


def _bound_name(span: tuple[int, int]) -> socket.socket:
    name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        name.bind(f"\0{_LOCK}{span[0]}-{span[1]}")
    except OSError as exc:
        name.close()
        raise _kept(*span) from exc
    return name


def _kept(first: int, last: int) -> PortBusyError:
    ports = f"port {first}" if first == last else f"ports {first}-{last}"
    listener = _holders().get(first)
    who = f" ({listener})" if listener else ""
    return PortBusyError(f"{ports}: kept by another pd-launch{who}", "Stop that one, or choose other ports")


def _locked() -> set[tuple[int, int]]:
    """What launchers keep in this network namespace, this one included."""
    spans = set()
    for line in Path("/proc/net/unix").read_text(errors="replace").splitlines():
        _, mark, span = line.partition(f"@{_LOCK}")
        first, dash, last = span.partition("-")
        if mark and dash and first.isdigit() and last.isdigit():
            spans.add((int(first), int(last)))
    return spans


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
            command = " ".join(process.cmdline()) or process.name()
            return f"pid {pid} of user {process.username()}: {command[:120]}"
    except psutil.Error:
        return f"pid {pid}, which has just ended"


def _unseen(port: int) -> str:
    if port < 1024 and os.geteuid() != 0:
        return "the kernel, which gives ports below 1024 to root only"
    return "a process that reserves it without listening, or of another user or network namespace"
