"""Is a port free on the address that will be bound, and if not, who holds it."""

import errno
import os
import socket
from dataclasses import dataclass

import psutil

from .errors import LauncherError
from .plan import Port


@dataclass(frozen=True, slots=True)
class Busy:
    """A port of the plan that something else has."""

    port: int
    bind: str
    holder: str
    """In words: pid, user, command; or that it cannot be seen."""


def busy_ports(port: Port) -> list[Busy]:
    """Those of a planned port's numbers that cannot be bound now."""
    # The transfer engine binds without SO_REUSEADDR (so TIME_WAIT counts for it); every other server sets it.
    reuse = port.purpose != "transfer"
    taken = [number for number in range(port.first, port.last + 1) if not _can_bind(port.bind, number, reuse=reuse)]
    if not taken:
        return []
    holders = _holders()
    return [Busy(number, port.bind, holders.get(number, _unseen(number))) for number in taken]


def _can_bind(address: str, port: int, *, reuse: bool) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if reuse:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)  # a socket that only reserves the port lets bind pass; listen then fails
        except OSError as exc:
            if exc.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise LauncherError(f"cannot use address {address}: {exc.strerror}", "Is it one of this host's?") from exc
    return True


def _holders() -> dict[int, str]:
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
