"""A child of a run through its deaths: the same name, each life with a start in the log and ports of its own."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from . import process
from .errors import LauncherError
from .plan import NodeProcess, Process
from .ports import Hold
from .process import Child, exit_in_words
from .runs import ChildState, Death

_DEATHS_KEPT = 20


@dataclass(eq=False, slots=True)
class Life:
    """What is planned under a name, and what lives of it now."""

    spec: Process
    child: Child | None = None
    state: Literal["starting", "ready", "ended", "given up"] = "starting"
    since: float = 0.0
    restarts: int = 0
    log_begins: int = 0
    """Where in its log this life begins."""
    deaths: list[Death] = field(default_factory=list)
    kept: "asyncio.Task[None] | None" = None
    _shared_memory: set[Path] = field(default_factory=set)
    _hold: Hold | None = None

    @property
    def role(self) -> str:
        if isinstance(self.spec, NodeProcess):
            return self.spec.role.value
        return "proxy" if self.spec.name == "proxy" else "service"

    @property
    def running(self) -> Child:
        if self.child is None:
            raise LauncherError(f"{self.spec.name} has not been started")
        return self.child

    async def begin(self, spec: Process, run_id: str, folder: Path) -> None:
        """The first life or a new one, in `folder`. Raises PortBusyError when a port of its is taken, LauncherError."""
        self.spec, self.state, self.since = spec, "starting", time.time()  # noqa: TID251  for people, and the next launcher
        self.log_begins = spec.log.stat().st_size if spec.log.exists() else 0
        self._hold = Hold(spec.ports)
        self.child = await Child.start(spec, run_id, folder)

    def is_ready(self) -> None:
        self.state = "ready"
        self.let_go()

    def let_go(self) -> None:
        """Of its ports: it has bound them by now, or will not."""
        if self._hold is not None:
            self._hold.let_go()

    @property
    def shared_memory(self) -> set[Path]:
        """What it has mapped, as far as was noted: a node that is killed leaves it behind."""
        return self._shared_memory

    def note_shared_memory(self) -> None:
        """While it lives: once it is dead nobody can tell whose a file was."""
        if self.child is not None and not self.child.is_gone:
            self._shared_memory |= process.shared_memory(process.of_session(self.child.pid))

    async def end(self) -> None:
        """At once, and nothing of it is left."""
        if self.child is not None:
            self.note_shared_memory()
            await self.child.stop(0)
        await self.clear_away(0)
        self.state = "ended"

    async def clear_away(self, timeout_s: float) -> None:
        """What is left of a life holds ports and memory."""
        self.let_go()
        if self.child is not None:
            self.note_shared_memory()
            await self.child.stop_what_is_left(timeout_s)
        process.remove_unmapped(self._shared_memory)
        self._shared_memory.clear()

    def _note_death(self) -> None:
        """Of this life of it, once."""
        child = self.child
        if child is not None and child.died_at is not None and child.exit_code is not None:
            death = Death(at=child.died_at, how=exit_in_words(child.exit_code))
            if death not in self.deaths:
                self.deaths = [*self.deaths, death][-_DEATHS_KEPT:]

    def described(self, *, draining: bool) -> ChildState:
        self._note_death()
        return ChildState(
            name=self.spec.name,
            role=self.role,
            state="draining" if draining else self.state,
            pid=self.child.pid if self.child else None,
            since=self.since,
            restarts=self.restarts,
            url=self.spec.url if isinstance(self.spec, NodeProcess) else None,
            ports=tuple(f"{port.purpose} {port}" for port in self.spec.ports),
            log=self.spec.log,
            shared_memory=tuple(sorted(self._shared_memory)),
            deaths=tuple(self.deaths),
        )
