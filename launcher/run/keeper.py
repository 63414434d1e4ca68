"""Keeps children running: starts again what ends or hangs, with growing pauses, and gives up what does not stay."""

import asyncio
import logging
import time
from collections.abc import Callable

import httpx

from engines.base import Gauges, Role
from engines.vllm import metrics

from ..errors import LauncherError
from ..events.events import Events
from ..plan.plan import NodeProcess
from . import readiness
from .explain import cause, explained
from .fleet import Fleet
from .life import Life
from .liveness import Liveness
from .restarts import RestartPolicy

_LONGEST_BETWEEN_LOOKS_S = 5.0

logger = logging.getLogger("pd_launch")


class Keeper:
    """Of one run. A run that cannot go on without a child fails: `failed` then raises LauncherError."""

    def __init__(self, fleet: Fleet, events: Events, nodes_changed: Callable[[], None], policy: RestartPolicy) -> None:
        """`nodes_changed`: a node has come back, perhaps at another address."""
        self._fleet = fleet
        self._events = events
        self._nodes_changed = nodes_changed
        self._policy = policy
        self._kept: dict[str, asyncio.Task[None]] = {}
        self._explaining: set[asyncio.Task[None]] = set()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def keep(self, life: Life, error: LauncherError | None = None) -> None:
        """From now on. `error`: why it is down, when it is."""
        task = asyncio.create_task(self._keep(life, error))
        self._kept[life.spec.name] = task
        task.add_done_callback(self._ended)

    async def leave_alone(self, life: Life) -> None:
        """Until it is kept again: somebody is about to stop it."""
        task = self._kept.pop(life.spec.name, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        tasks = [*self._kept.values(), *self._explaining]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.failed.done():
            if not isinstance(error, LauncherError):
                logger.error("the launcher itself failed", exc_info=error)
                error = LauncherError(f"the launcher itself failed: {error!r}", "launcher.log tells where")
            self.failed.set_exception(error)

    # -- one child

    async def _keep(self, life: Life, error: LauncherError | None) -> None:
        """Returns when it is given up for good, and the run goes on without it. Raises LauncherError when it cannot.

        The proxy finds out by itself: a node gets no requests while it is down, and its new identity is asked for
        before it gets one.
        """
        ends = failed_starts = 0
        while True:
            if error is None:
                error = await self._until_down(life)
                if life.ready_at is not None and time.monotonic() - life.ready_at > self._policy.steady_s:
                    ends = failed_starts = 0
                ends += 1
            else:
                failed_starts += 1
            pause_s = self._policy.pause_s(ends + failed_starts)
            if pause_s is None or not self._may_restart(life):
                await self._go_on_without(life, error, ends, failed_starts)
                return
            name = life.spec.name
            self._events.say(f"{error}\n{error.hint}\nStarting {name} again in {pause_s:g} s.", "error", name)
            self._explain(life, error)
            await life.clear_away(self._fleet.config.stop_timeout_s)
            life.hold_ports()
            life.state = "restarting"
            self._fleet.changed()
            await asyncio.sleep(pause_s)
            error = await self._start_again(life)

    async def _start_again(self, life: Life) -> LauncherError | None:
        """What has gone wrong, if it did not become ready."""
        name = life.spec.name
        try:
            await self._fleet.start_again(life)
        except LauncherError as exc:
            return LauncherError(f"{name} could not be started: {exc}", exc.hint)
        except OSError as exc:  # no more files, no more processes: it may pass
            return LauncherError(f"{name} could not be started: {exc.strerror}")
        self._nodes_changed()
        self._events.say(f"{name} is ready again.", node=name)
        return None

    async def _until_down(self, life: Life) -> LauncherError:
        """It ended, or is hung and may be restarted for it; in words."""
        ended = asyncio.create_task(life.running.ended())
        hung = asyncio.create_task(self._until_hung(life))
        try:
            await asyncio.wait((ended, hung), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                life.note_death()
                return readiness.died(life.running, life.log_begins)
            problem = hung.result()
            await life.stop(self._fleet.stop_timeout_s(life.spec))
            return LauncherError(f"{life.spec.name} is hung: {problem}", f"Its log is {life.spec.log}")
        finally:
            for task in (ended, hung):
                task.cancel()
            await asyncio.gather(ended, hung, return_exceptions=True)

    async def _until_hung(self, life: Life) -> str:
        """Why it must be stopped. That it is hung is said in any case, once, and so is its recovery."""
        if not isinstance(life.spec, NodeProcess):
            await asyncio.Event().wait()
        config, name = self._fleet.config, life.spec.name
        liveness = Liveness(config.hung_after_s)
        pause_s = min(_LONGEST_BETWEEN_LOOKS_S, config.hung_after_s / 2)
        async with httpx.AsyncClient(trust_env=False, timeout=pause_s) as client:
            while True:
                await asyncio.sleep(pause_s)
                problem = liveness.problem(await _gauges(client, life), time.monotonic())
                if problem and config.restart and config.restart_hung:
                    return problem
                if problem and life.state == "ready":
                    life.state = "hung"
                    self._events.say(f"{name} is hung: {problem}. `pd-launch restart {name}`", "warning", name)
                    self._fleet.changed()
                elif not problem and life.state == "hung":
                    life.state = "ready"
                    self._events.say(f"{name} works again.", node=name)
                    self._fleet.changed()

    def _may_restart(self, life: Life) -> bool:
        """A service keeps what the nodes share: they would go on with nothing in it, and each must be told anew."""
        return self._fleet.config.restart and life.role != "service"

    async def _go_on_without(self, life: Life, error: LauncherError, ends: int, failed_starts: int) -> None:
        """While a node of each role and the proxy are left. Raises LauncherError else."""
        await life.clear_away(self._fleet.config.stop_timeout_s)
        life.hold_ports()
        life.state = "given up"
        self._fleet.changed()
        often = [f"It has ended {ends} times."] if ends > 1 else []
        often += [f"It could not be started {failed_starts} times."] if failed_starts > 1 else []
        told = "\n".join((str(error), *often))
        left = [other.spec for other in self._fleet.lives.values() if other.state != "given up"]
        nodes = [spec for spec in left if isinstance(spec, NodeProcess)]
        pairs = ((p, d) for p in nodes for d in nodes if p is not d)
        can_hand_over = any(p.role.does(Role.PREFILL) and d.role.does(Role.DECODE) for p, d in pairs)
        if not isinstance(life.spec, NodeProcess) or not can_hand_over:
            raise await explained(LauncherError(told, error.hint), self._fleet.lives.values())
        self._events.say(f"{told}\n{error.hint}\nGoing on without it.", "error", life.spec.name)
        self._explain(life, error)

    def _explain(self, life: Life, error: LauncherError) -> None:
        """What the logs say of it, when it is known: logs are long, and the restart does not wait for it."""
        life.finding = f"{time.strftime('%H:%M:%S')} {str(error).partition(chr(10))[0]}"
        self._nodes_changed()
        task = asyncio.create_task(self._explained(life))
        self._explaining.add(task)
        task.add_done_callback(self._explaining.discard)

    async def _explained(self, life: Life) -> None:
        name, words = life.spec.name, await cause(tuple(self._fleet.lives.values()))
        if words:
            self._events.say(f"{name}: what the logs say of it\n{words}", node=name)
            life.finding = f"{life.finding}\n{words}"
            self._nodes_changed()


async def _gauges(client: httpx.AsyncClient, life: Life) -> Gauges | None:
    assert isinstance(life.spec, NodeProcess)  # noqa: S101  only nodes are asked
    try:
        return metrics.gauges((await client.get(f"{life.spec.url}/metrics")).text)
    except (httpx.HTTPError, ValueError):
        return None
