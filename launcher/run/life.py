"""A child of a run through its deaths: the same name, each life with a start in the log and ports of its own."""

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import LauncherError
from ..hosts.host import Hold, Host, Running, exit_in_words
from ..inspect.runs import ChildState, Death, State
from ..plan.plan import NodeProcess, Process

_DEATHS_KEPT = 20


@dataclass(eq=False, slots=True)
class Life:
    """What is planned under a name, and what lives of it now."""

    spec: Process
    host: Host
    child: Running | None = None
    state: State = "starting"
    since: float = 0.0
    ready_at: float | None = None
    """When this life of it became ready, on the monotonic clock."""
    restarts: int = 0
    log_begins: int = 0
    """Where in its log this life begins."""
    deaths: list[Death] = field(default_factory=list)
    finding: str = ""
    """Why it ended when it last did, and what the logs say of it."""
    _shared_memory: set[Path] = field(default_factory=set)
    _hold: Hold | None = None

    @property
    def role(self) -> str:
        return self.spec.role.value if isinstance(self.spec, NodeProcess) else self.spec.kind

    @property
    def running(self) -> Running:
        if self.child is None:
            raise LauncherError(f"{self.spec.name} has not been started")
        return self.child

    async def begin(self, spec: Process, run_id: str, folder: Path) -> None:
        """The first life or a new one, in `folder`. Raises PortBusyError when a port of its is taken, LauncherError."""
        if spec is not self.spec:
            self.release_ports()
        self.spec, self.state, self.since = spec, "starting", time.time()  # noqa: TID251  for people, and the next launcher
        self.ready_at = None
        self.log_begins = spec.log.stat().st_size if spec.log.exists() else 0
        if self._hold is None:
            self._hold = self.host.hold(spec.ports)
        self.child = await self.host.start(spec, run_id, folder)

    def is_ready(self) -> None:
        """It has bound its ports by now."""
        self.state, self.ready_at = "ready", time.monotonic()
        self.release_ports()

    def hold_ports(self) -> None:
        """Keep them while nothing listens there. Somebody may have been quicker: the next start will tell."""
        if self._hold is None:
            with suppress(LauncherError):
                self._hold = self.host.hold(self.spec.ports)

    def release_ports(self) -> None:
        if self._hold is not None:
            self._hold.release()
            self._hold = None

    @property
    def shared_memory(self) -> set[Path]:
        """What it has mapped, as far as was noted: a node that is killed leaves it behind."""
        return self._shared_memory

    def note_shared_memory(self) -> None:
        """While it lives: once it is dead nobody can tell whose a file was."""
        if self.child is not None and not self.child.is_gone:
            self._shared_memory |= self.host.shared_memory([self.child.pid])

    async def stop(self, timeout_s: float) -> None:
        """Ask it to end, end it after a while, and clear away what is left of it."""
        if self.child is not None:
            self.note_shared_memory()
            await self.child.stop(timeout_s)
        await self.clear_away(timeout_s)
        self.state = "stopped"

    async def clear_away(self, timeout_s: float) -> None:
        """What is left of a life holds ports and memory."""
        self.release_ports()
        if self.child is not None:
            self.note_shared_memory()
            await self.child.stop_what_is_left(timeout_s)
        self.host.remove_shared_memory(self._shared_memory)
        self._shared_memory.clear()

    def note_death(self) -> None:
        """Of this life of it, once."""
        child = self.child
        if child is not None and child.died_at is not None and child.exit_code is not None:
            death = Death(at=child.died_at, how=exit_in_words(child.exit_code))
            if death not in self.deaths:
                self.deaths = [*self.deaths, death][-_DEATHS_KEPT:]

    def described(self, *, draining: bool) -> ChildState:
        self.note_death()
        return ChildState(
            name=self.spec.name,
            role=self.role,
            state="draining" if draining and self.state == "ready" else self.state,
            pid=self.child.pid if self.child and not self.child.is_gone else None,  # by now it may be another's
            since=self.since,
            restarts=self.restarts,
            url=self.spec.url if isinstance(self.spec, NodeProcess) else None,
            ports=tuple(f"{port.purpose} {port}" for port in self.spec.ports),
            log=self.spec.log,
            shared_memory=tuple(sorted(self._shared_memory)),
            deaths=tuple(self.deaths),
        )
