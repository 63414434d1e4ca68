"""A run on a host that is made up: no process takes part."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from launcher.errors import PortBusyError
from launcher.events.events import Event, Events
from launcher.plan.config import LaunchConfig, load
from launcher.plan.facts import HostFacts
from launcher.plan.plan import Plan, Process
from launcher.plan.planner import make_plan
from launcher.plan.seats import Port
from launcher.run.changes import Changes
from launcher.run.fleet import Fleet
from launcher.run.keeper import Keeper
from launcher.run.restarts import RestartPolicy
from tests.machines import machine

AT_ONCE = RestartPolicy(first_pause_s=0, longest_pause_s=0, most_failures=3)


class Made:
    """A child that runs until the test ends it."""

    died_at: float | None = None
    exit_code: int | None = None
    is_gone = False
    pid = 4711

    def __init__(self, spec: Process) -> None:
        self.spec = spec
        self._end = asyncio.Event()

    def end(self, code: int = 1) -> None:
        self.exit_code, self.died_at = code, 1.0
        self._end.set()

    async def ended(self) -> int:
        await self._end.wait()
        return self.exit_code or 0

    async def stop(self, timeout_s: float) -> None:
        del timeout_s
        await asyncio.sleep(0)  # it takes a moment
        self.end(-15)
        self.is_gone = True

    async def stop_what_is_left(self, timeout_s: float) -> None:
        await self.stop(timeout_s)

    def kill(self) -> None:
        self.end(-9)


class Place:
    """A host without a machine. `busy`: why a port cannot be had, as long as it is set."""

    def __init__(self) -> None:
        self.busy = ""
        self.started: list[Made] = []

    def facts(self, config: LaunchConfig, further: Iterable[Port] = (), *, engine: bool = True) -> HostFacts:
        del config, further, engine
        return machine()

    def reservation(self) -> "Place":
        return self

    def take(self, ports: Iterable[Port], gpus: Iterable[str] = ()) -> None:
        pass

    def give_back(self, ports: Iterable[Port], gpus: Iterable[str] = ()) -> None:
        pass

    def close(self) -> None:
        pass

    def hold(self, ports: Iterable[Port]) -> "Place":
        del ports
        if self.busy:
            raise PortBusyError(self.busy)
        return self

    def release(self) -> None:
        pass

    def holder_of(self, ports: Iterable[Port]) -> str:
        del ports
        return ""

    def prepare(self, plan: Plan) -> None:
        pass

    def remove_temporary(self, plan: Plan) -> None:
        pass

    async def start(self, spec: Process, run_id: str, folder: Path) -> Made:
        del run_id, folder
        self.started.append(Made(spec))
        return self.started[-1]

    def shared_memory(self, sessions: Iterable[int]) -> set[Path]:
        del sessions
        return set()

    def remove_shared_memory(self, files: Iterable[Path]) -> None:
        pass

    def kill_rest(self, run_id: str, sessions: Iterable[int]) -> list[str]:
        del run_id, sessions
        return []

    def latest(self, name: str) -> Made:
        return [child for child in self.started if child.spec.name == name][-1]


class Stage:
    """A fleet that runs, its keeper, and what was told."""

    def __init__(self, folder: Path, flags: dict[str, Any], policy: RestartPolicy = AT_ONCE) -> None:
        self.policy = policy
        self.config = load({"model": "tiny", "engine": "sim", "run_dir": str(folder), **flags})
        self.place = Place()
        self.told: list[Event] = []
        self.changes = 0
        self.topologies: list[list[str]] = []
        """Names of the nodes, each time the proxy was told."""
        events = Events(self.told.append)
        plan = make_plan(self.config, machine())
        self.fleet = Fleet(self.config, plan, machine(), self.place, self.place, events, "a run")
        self.keeper = Keeper(self.fleet, events, self._changed, policy)
        self.asked = Changes(self.fleet, self.keeper, events, self._changed)

    def _changed(self) -> None:
        self.changes += 1
        self.topologies.append([node.name for node in self.fleet.told_plan.nodes])

    async def ask(self, **command: Any) -> None:
        """As over the control socket."""
        await self.asked(command, lambda _: None)

    async def begin(self) -> None:
        await self.fleet.start_nodes(self.fleet.plan.nodes)
        for life in self.fleet.lives.values():
            self.keeper.keep(life)

    async def until(self, text: str) -> None:
        while text not in "\n".join(event.text for event in self.told):
            await asyncio.sleep(0)

    def states(self) -> dict[str, str]:
        return {name: life.state for name, life in self.fleet.lives.items()}


Story = Callable[[Stage], Coroutine[Any, Any, None]]
Play = Callable[..., None]
