"""All children of a run: started side by side, moved to other ports when somebody takes theirs, ended in order."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from engines.base import NodeRole, Role

from ..errors import LauncherError, NodeDiedError, PortBusyError
from ..events.events import Events
from ..events.tail import last_line
from ..hosts.host import Host, Reservation, Running, gpus_named
from ..plan.config import LaunchConfig
from ..plan.facts import HostFacts
from ..plan.plan import NodeProcess, Plan, Process
from ..plan.planner import another_node, moved_node
from . import readiness
from .life import Life

_MOST_MOVES = 3


class Fleet:
    """Owns every child, from the first to the last. `changed` is called whenever what is known of them changes."""

    def __init__(  # noqa: PLR0913, PLR0917  what a run is made of
        self,
        config: LaunchConfig,
        plan: Plan,
        facts: HostFacts,
        host: Host,
        reservation: Reservation,
        events: Events,
        run_id: str,
    ) -> None:
        self.config = config
        self.plan = plan
        """As it is carried out: nodes may have come, gone, or moved to other ports."""
        self.host = host
        self.run_id = run_id
        self.lives: dict[str, Life] = {}
        self.draining: set[str] = set()
        self.joining: set[str] = set()
        """Nodes that are started for a run that serves, and not ready yet: nobody is told of them."""
        self.changed: Callable[[], None] = lambda: None
        self._gpus = facts.gpus
        self._reservation = reservation
        self._events = events
        self._starting_on: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    # -- start

    async def start_services(self) -> None:
        """Raises LauncherError."""
        for service in self.plan.services:
            life = await self.spawn(service)
            with self._events.step(
                f"{service.name} on port {service.ports[0]}", last_line(service.log), node=service.name
            ):
                await readiness.service_ready(life.running, self.config.ready_timeout_s)
            self.is_ready(life)

    async def start_nodes(self, nodes: Sequence[NodeProcess]) -> None:
        """Side by side. Raises LauncherError when one of them ends, or is not ready in time."""
        all_ready = asyncio.Event()
        starting = {node.name for node in nodes}
        waits = [asyncio.create_task(self._node_ready(node, starting, all_ready)) for node in nodes]
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _node_ready(self, node: NodeProcess, starting: set[str], all_ready: asyncio.Event) -> None:
        """One that is ready waits for the others: none of them may end meanwhile."""
        life = await self.bring_up(node)
        starting.discard(node.name)
        if not starting:
            all_ready.set()
        await readiness.before_it_ends(life.running, all_ready.wait(), None, begin=life.log_begins)

    async def bring_up(self, node: NodeProcess) -> Life:
        """A node that is ready; on other ports, should somebody have taken one of its own meanwhile.

        Raises LauncherError; what is left of it then has been cleared away.
        """
        detail = last_line(self.plan.run_dir / f"{node.name}.log")
        with self._events.step(f"{node.name} on {node.url}", detail, node=node.name):
            for moves in range(_MOST_MOVES + 1):
                try:
                    return await self._started(node)
                except (NodeDiedError, PortBusyError) as exc:
                    await self.lives[node.name].clear_away(self.config.stop_timeout_s)
                    thief = self.host.holder_of(node.ports)
                    if not thief or moves == _MOST_MOVES:
                        raise
                    node = self._moved(node, thief, exc)
        raise AssertionError

    async def _started(self, node: NodeProcess) -> Life:
        """Alone on its GPUs while it starts: vLLM measures their memory, and another's start spoils that."""
        async with self._alone_on(node.devices):
            life = await self.spawn(node)
            await readiness.node_ready(life.running, node, self.config.ready_timeout_s, begin=life.log_begins)
            self.is_ready(life)
        return life

    @asynccontextmanager
    async def _alone_on(self, devices: Sequence[str]) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for device in sorted(set(devices)):
                await stack.enter_async_context(self._starting_on[device])
            yield

    async def start_proxy(self) -> None:
        """Raises LauncherError; NodeDiedError when a node ends meanwhile."""
        life = await self.spawn(self.plan.proxy)
        with self._events.step(f"proxy on {self.plan.proxy_url}", last_line(self.plan.proxy.log), node="proxy"):
            await self.unless_a_node_dies(readiness.proxy_ready(life.running, self.plan, self.config.ready_timeout_s))
        self.is_ready(life)

    async def start_again(self, life: Life) -> None:
        """A child that has ended. Raises LauncherError when it does not become ready; then it is down."""
        life.restarts += 1
        try:
            if isinstance(life.spec, NodeProcess):
                await self.bring_up(life.spec)
            else:
                await self.spawn(life.spec)
                await readiness.proxy_listens(life.running, self.plan, self.config.ready_timeout_s)
                self.is_ready(life)
        except LauncherError:
            await life.stop(0)
            self.changed()
            raise

    async def unless_a_node_dies(self, work: Coroutine[Any, Any, None]) -> None:
        """`work`, which waits for something that no longer comes when a node ends. Raises NodeDiedError then."""
        working = asyncio.create_task(work)
        ends = {asyncio.create_task(life.running.ended()): life for life in self.lives.values()}
        try:
            done, _ = await asyncio.wait({working, *ends}, return_when=asyncio.FIRST_COMPLETED)
            for end, life in ends.items():
                if end in done:
                    raise readiness.died(life.running, life.log_begins)
            working.result()
        finally:
            for task in (working, *ends):
                task.cancel()
            await asyncio.gather(working, *ends, return_exceptions=True)

    async def spawn(self, spec: Process) -> Life:
        """Start a child, in its first life or a new one. Raises PortBusyError when a port of its is taken."""
        life = self.lives.setdefault(spec.name, Life(spec, self.host))
        await life.begin(spec, self.run_id, self.plan.temporary / spec.name)  # in a folder that is this user's only
        self.changed()
        return life

    def is_ready(self, life: Life) -> None:
        life.is_ready()
        self.changed()

    # -- change

    def lives_of(self, role: NodeRole) -> list[Life]:
        return [self.lives[node.name] for node in self.plan.of_kind(role) if node.name in self.lives]

    def plan_another(self, role: NodeRole, facts: HostFacts) -> NodeProcess:
        """A further node, its ports and GPUs kept. Raises LauncherError."""
        node = another_node(self.plan, self.config, facts, role)
        self._reservation.take(node.ports, self._gpus_of(node))
        self.joining.add(node.name)
        self.plan = self.plan.with_node(node)
        return node

    @property
    def told_plan(self) -> Plan:
        """The plan without the nodes that have not joined yet."""
        joined = tuple(node for node in self.plan.nodes if node.name not in self.joining)
        return self.plan.model_copy(update={"nodes": joined})

    async def forget(self, name: str) -> None:
        """A node that is no longer of this run: ended, if it still runs, and everything of its given back."""
        life = self.lives.get(name)
        node = next(node for node in self.plan.nodes if node.name == name)
        if life is not None:
            await life.stop(0)
            del self.lives[name]
        self.draining.discard(name)
        self.joining.discard(name)
        self.plan = self.plan.without(name)
        still_used = {uuid for other in self.plan.nodes for uuid in self._gpus_of(other)}
        self._reservation.give_back(node.ports, [uuid for uuid in self._gpus_of(node) if uuid not in still_used])
        self.changed()

    def _moved(self, node: NodeProcess, thief: str, error: LauncherError) -> NodeProcess:
        try:
            facts = self.host.facts(self.config, engine=False)
            new = moved_node(self.plan, self.config, facts, node)
            self._reservation.take(new.ports)
        except LauncherError:
            raise error from None  # there is nowhere to go
        self._reservation.give_back(node.ports)
        self.plan = self.plan.with_node(new)
        self._events.say(f"{node.name}: {thief}; going on with {new.url}", "warning", node.name)
        self.changed()
        return new

    def _gpus_of(self, node: NodeProcess) -> list[str]:
        return gpus_named(node.devices, self._gpus)

    # -- stop

    async def stop_all(self) -> None:
        """Proxy, decode, prefill: nobody is asked for work by something that has already gone."""
        lives = list(self.lives.values())
        alive = [life.child for life in lives if life.child is not None and not life.child.is_gone]
        sessions = {child.pid for child in alive}
        files = self.host.shared_memory(sessions).union(*(life.shared_memory for life in lives))
        for group in self._stop_order():
            await asyncio.gather(*(child.stop(self.stop_timeout_s(child.spec)) for child in group))
        left = self.host.kill_rest(self.run_id, sessions)
        if left:
            self._events.say(f"Killed what was left of the run: {', '.join(left)}", "warning")
        self.host.remove_shared_memory(files)
        self.host.remove_temporary(self.plan)
        for life in lives:
            life.state = "stopped"
            life.release_ports()

    def kill(self) -> None:
        """All children, at once."""
        for life in self.lives.values():
            if life.child is not None:
                life.child.kill()

    def stop_timeout_s(self, spec: Process) -> float:
        return max(self.config.stop_timeout_s, spec.stops_within_s)

    def _stop_order(self) -> Iterator[list[Running]]:
        yield self._named([self.plan.proxy])
        decodes = self.plan.of(Role.DECODE)
        yield self._named(decodes)
        yield self._named([node for node in self.plan.nodes if node not in decodes])
        yield self._named(self.plan.services)

    def _named(self, specs: Sequence[Process]) -> list[Running]:
        lives = [self.lives[spec.name] for spec in specs if spec.name in self.lives]
        return [life.child for life in lives if life.child is not None]
