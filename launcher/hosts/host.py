"""What a run wants of the host that its children live on. `local/` is the one of this machine."""

import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ..plan.config import LaunchConfig
from ..plan.facts import Gpu, HostFacts
from ..plan.plan import Plan, Process
from ..plan.seats import Port


class Running(Protocol):
    """A child that was started, and all that it has started itself."""

    spec: Process
    died_at: float | None
    """When it ended by itself, in seconds since 1970."""

    @property
    def pid(self) -> int: ...

    @property
    def exit_code(self) -> int | None:
        """Negative: the number of the signal that ended it. None while it runs."""

    @property
    def is_gone(self) -> bool:
        """All of its tree has ended; by now the number may be another's."""

    async def ended(self) -> int:
        """Its exit code, once its first process has ended."""

    async def stop(self, timeout_s: float) -> None:
        """Ask it to end; after `timeout_s` end it, and all of its tree."""

    async def stop_what_is_left(self, timeout_s: float) -> None:
        """... of a tree whose first process has died."""

    def kill(self) -> None: ...


class Hold(Protocol):
    """Ports of a child that will bind them soon, kept from others until then."""

    def release(self) -> None: ...


class Reservation(Protocol):
    """Ports and GPUs that no other launcher plans with, until they are given back."""

    def take(self, ports: Iterable[Port], gpus: Iterable[str] = ()) -> None:
        """All of them or none. Raises PortBusyError."""

    def give_back(self, ports: Iterable[Port], gpus: Iterable[str] = ()) -> None: ...

    def close(self) -> None:
        """Give all of it back."""


class Host(Protocol):
    """A machine that children of a run live on."""

    def facts(self, config: LaunchConfig, further: Sequence[Port] = (), *, engine: bool = True) -> HostFacts:
        """What it is like now; `further`: ports to look at beside those of the ranges."""

    def reservation(self) -> Reservation: ...

    def hold(self, ports: Iterable[Port]) -> Hold:
        """Raises PortBusyError for a port that somebody has."""

    def holder_of(self, ports: Iterable[Port]) -> str:
        """Which of these single ports is taken, and by whom, in words; empty when none is."""

    def prepare(self, plan: Plan) -> None:
        """The run's folders and files. Raises LauncherError."""

    def remove_temporary(self, plan: Plan) -> None: ...

    async def start(self, spec: Process, run_id: str, folder: Path) -> Running:
        """Raises LauncherError."""

    def shared_memory(self, sessions: Iterable[int]) -> set[Path]:
        """What the trees of these processes have in shared memory now; one that is killed leaves it behind."""

    def remove_shared_memory(self, files: Iterable[Path]) -> None:
        """Those that nobody uses any more."""

    def kill_rest(self, run_id: str, sessions: Iterable[int]) -> list[str]:
        """End whatever of a run still lives. Returns what that was, in words."""


def gpus_named(devices: Iterable[str], gpus: Sequence[Gpu]) -> list[str]:
    """What to keep of these devices: their UUIDs, or, where nobody knows them, their names."""
    known: Mapping[str, str] = {gpu.id: gpu.uuid for gpu in gpus}
    return list(dict.fromkeys(known.get(device) or device for device in devices))


def exit_in_words(code: int) -> str:
    """Of a process: negative codes are signals."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # one that has only a number
        return f"killed by signal {-code}"
