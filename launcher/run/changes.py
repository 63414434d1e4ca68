"""What a run is asked to change while it serves: start a child again, have more or fewer nodes."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import httpx

from engines.base import NodeRole
from engines.vllm import metrics

from ..check import gpus, machine
from ..check.findings import Checked, refuse_errors
from ..errors import ConfigError, LauncherError
from ..events.events import Event, Events, Say
from ..plan.plan import NodeProcess
from .explain import explained
from .fleet import Fleet
from .keeper import Keeper
from .life import Life


class Changes:
    """Carried out one after the other; each is told to whoever has asked for it, too."""

    def __init__(self, fleet: Fleet, keeper: Keeper, events: Events, nodes_changed: Callable[[], None]) -> None:
        self._fleet = fleet
        self._keeper = keeper
        self._events = events
        self._nodes_changed = nodes_changed

    async def __call__(self, command: dict[str, Any], say: Say) -> None:
        """What comes over the control socket. Raises LauncherError."""

        def hear(event: Event) -> None:
            say(event.in_words())

        with self._events.also(hear):
            match command:
                case {"do": "restart", "node": str(name)}:
                    await self._restart(name)
                case {"do": "scale", **numbers} if _are_sizes(numbers):
                    await self._scale({NodeRole(role): number for role, number in numbers.items()})
                case _:
                    raise ConfigError(f"unknown command {command!r}")

    async def _restart(self, name: str) -> None:
        life = self._fleet.lives.get(name)
        if life is None or life.role == "service":
            names = ", ".join(name for name, life in self._fleet.lives.items() if life.role != "service")
            raise ConfigError(f"no node {name!r} to start again", f"There are: {names}")
        await self._drained(life)
        await self._keeper.leave_alone(life)
        error: LauncherError | None = LauncherError(f"{name} was stopped, and not started again yet")
        try:
            await _to_its_end(self._stopped(life))
            life.hold_ports()
            life.state = "restarting"
            await self._fleet.start_again(life)
            error = None
        except LauncherError as exc:
            error = exc
        finally:
            self._fleet.draining.discard(name)
            self._nodes_changed()
            self._keeper.keep(life, error)  # which tries on, if that makes sense
        if error is not None:
            raise LauncherError(f"{name} did not start again; trying on: {error}", f"Its log is {life.spec.log}")
        self._events.say(f"{name} is ready again.", node=name)

    async def _scale(self, wanted: dict[NodeRole, int | None]) -> None:
        numbers = {role: number for role, number in wanted.items() if number is not None}
        for role, number in numbers.items():
            if not self._fleet.lives_of(role):
                raise ConfigError(f"this run was started without {role} nodes")
            if number < 1:
                raise ConfigError(f"a run needs at least one {role} node")
        for role in numbers:
            for life in self._fleet.lives_of(role):
                if life.state == "given up":
                    await self._remove(life)
        have = {role: self._fleet.lives_of(role) for role in numbers}
        await self._add({role: number - len(have[role]) for role, number in numbers.items()})
        for role, number in numbers.items():
            for life in have[role][number:]:
                await self._remove(life)
            if len(have[role]) == number:
                self._events.say(f"{number} {role} nodes: nothing to do.")

    async def _add(self, more: dict[NodeRole, int]) -> None:
        """Side by side, and all of them or none. Raises LauncherError."""
        new: list[NodeProcess] = []
        try:
            for role, number in more.items():
                for _ in range(number):
                    new.append(await self._planned(role))
                    self._events.say(f"Starting {new[-1].name} on {new[-1].url}.", node=new[-1].name)
            if new:
                await self._fleet.start_nodes(new)
        except BaseException as exc:
            if isinstance(exc, LauncherError) and any(node.name in self._fleet.lives for node in new):
                exc = await explained(exc, tuple(self._fleet.lives.values()))
            await _to_its_end(self._forgotten(new))
            raise exc from None
        self._fleet.joining.difference_update(node.name for node in new)
        self._nodes_changed()
        for node in new:
            self._keeper.keep(self._fleet.lives[node.name])
            self._events.say(f"{node.name} is ready.", node=node.name)

    async def _forgotten(self, nodes: list[NodeProcess]) -> None:
        await asyncio.gather(*(self._fleet.forget(node.name) for node in nodes))
        self._nodes_changed()

    async def _planned(self, role: NodeRole) -> NodeProcess:
        """One more node, checked as `up` checks all. Raises LauncherError."""
        fleet = self._fleet
        facts = fleet.host.facts(fleet.config, engine=False)
        node = fleet.plan_another(role, facts)
        alone = fleet.plan.model_copy(update={"nodes": (node,)})
        checked = [
            Checked(theme, said[0], tuple(said[1]))
            for theme, said in (
                ("GPUs", gpus.check(fleet.config, alone, facts)),
                ("machine", machine.check(fleet.config, alone, facts)),
            )
            if said is not None
        ]
        try:
            refuse_errors(checked)
        except LauncherError:
            await fleet.forget(node.name)
            raise
        return node

    async def _remove(self, life: Life) -> None:
        await self._drained(life)
        await self._keeper.leave_alone(life)
        await _to_its_end(self._removed(life))

    async def _removed(self, life: Life) -> None:
        await self._stopped(life)
        await self._fleet.forget(life.spec.name)
        self._nodes_changed()
        self._events.say(f"{life.spec.name} was removed.", node=life.spec.name)

    async def _stopped(self, life: Life) -> None:
        self._events.say(f"Stopping {life.spec.name}.", node=life.spec.name)
        await life.stop(self._fleet.stop_timeout_s(life.spec))
        self._fleet.changed()

    async def _drained(self, life: Life) -> None:
        """Nobody waits for the node any more, or the time for that is over. Broken off meanwhile, it goes on as before:
        until here it is kept as ever.
        """
        if not isinstance(life.spec, NodeProcess) or life.state != "ready":
            return
        try:
            await self._drain(life.spec)
        except BaseException:
            self._fleet.draining.discard(life.spec.name)
            self._nodes_changed()
            raise

    async def _drain(self, node: NodeProcess) -> None:
        limit_s = self._fleet.config.drain_timeout_s
        self._events.say(f"Draining {node.name}: it gets no new requests.", node=node.name)
        self._fleet.draining.add(node.name)
        self._nodes_changed()
        try:
            async with asyncio.timeout(limit_s):
                await self._until_idle(node)
        except TimeoutError:
            self._events.say(f"{node.name} still has requests after {limit_s:g} s.", "warning", node.name)

    async def _until_idle(self, node: NodeProcess) -> None:
        """Nothing of the proxy's on it, nothing running, and no KV that a decode node will come for."""
        async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
            while True:
                with suppress(httpx.HTTPError, KeyError, ValueError):
                    health = (await client.get(f"{self._fleet.plan.proxy_url}/health")).json()
                    mine = [entry for entry in health["nodes"] if entry["name"] == node.name]
                    gauges = metrics.gauges((await client.get(f"{node.url}/metrics")).text)
                    told = bool(mine) and not mine[0]["usable"] and not mine[0]["in_flight"]
                    if told and not (gauges.running or gauges.waiting or gauges.kv_usage):
                        return
                await asyncio.sleep(0.2)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """What must not be left half done, whoever breaks it off."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


def _are_sizes(numbers: dict[str, Any]) -> bool:
    are_numbers = all(value is None or type(value) is int for value in numbers.values())
    return are_numbers and numbers.keys() <= {role.value for role in NodeRole}
