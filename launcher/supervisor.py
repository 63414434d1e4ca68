"""A run: start the nodes side by side, then the proxy; prove that KV moves; watch; change; stop in order."""

import asyncio
import os
import shutil
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import httpx

from engines.base import Role
from engines.vllm import metrics

from . import control, doctor, logs, process, proof, readiness
from .config import LaunchConfig
from .control import Say
from .errors import ConfigError, InterruptedStart, LauncherError, NodeDiedError, PortBusyError
from .life import Life
from .plan import NodeProcess, Plan, Process, another_node, moved_node
from .ports import Locks, busy_ports
from .process import Child
from .progress import Progress, last_line
from .record import Record
from .reserve import survey
from .runs import RunFolder, RunState, this_machine

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_MOST_DEATHS = 4
_DEATHS_COUNT_FOR_S = 600.0
_NOTE_EVERY_S = 5.0
_MOST_MOVES = 3
_DRAIN_S = 30.0
_STOPS_WITHIN_S = 60.0
"""... beside the time that every group of nodes is given."""

Phase = Literal["starting", "ready", "stopping", "stopped"]


class Supervisor:
    """Owns every child of a run, from the first to the last."""

    def __init__(self, config: LaunchConfig, plan: Plan, locks: Locks, folder: RunFolder, progress: Progress) -> None:
        self._config = config
        self._plan = plan
        self._locks = locks
        self._record = Record(folder, progress.say)
        self._progress = progress
        self._run_id = uuid.uuid4().hex
        self._began = time.time()  # noqa: TID251  for people, and the next launcher
        self._phase: Phase = "starting"
        self._lives: dict[str, Life] = {}
        self._draining: set[str] = set()
        self._proven: str | None = None
        self._stop_asked = asyncio.Event()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopping = False

    async def run(self) -> None:
        """Everything up, until a signal or the end of a needed child. Raises LauncherError; all is down afterwards."""
        async with self._all_down_afterwards():
            await self._or_interrupted(self._start())
            await self._watch()

    async def run_through(self, stages: Callable[["Supervisor"], Coroutine[Any, Any, None]]) -> None:
        """As far as `stages` starts things, and then down again."""
        async with self._all_down_afterwards():
            await self._or_interrupted(stages(self))

    @asynccontextmanager
    async def _all_down_afterwards(self) -> AsyncIterator[None]:
        with self._signals():
            try:
                yield
            finally:
                self._stopping = True
                await self._stop_all()

    # -- start

    async def _start(self) -> None:
        await self.start_nodes()
        await self.start_proxy()
        await self._prove()
        self._enter("ready")
        self._greet()

    async def start_nodes(self) -> None:
        """Services, then all nodes side by side. Raises LauncherError, with what the logs say of it."""
        async with self._explaining(), self._progress.shown():
            self._make_temporary()
            self._write_files()
            await self._start_services()
            await self._start_nodes()
            self._write_topology()

    async def start_proxy(self) -> None:
        """Raises LauncherError."""
        async with self._explaining(), self._progress.shown():
            await self._start_proxy()

    @asynccontextmanager
    async def _explaining(self) -> AsyncIterator[None]:
        try:
            yield
        except LauncherError as exc:
            raise await self._explained(exc) from None

    def _make_temporary(self) -> None:
        """Of this user only, and empty: a killed run may have left one. Raises LauncherError."""
        folder = self._plan.temporary
        try:
            if folder.exists() and folder.stat().st_uid == os.getuid() and not folder.is_symlink():
                shutil.rmtree(folder)
            folder.mkdir(mode=0o700)
        except OSError as exc:
            raise LauncherError(f"cannot make the folder {folder}: {exc.strerror}", "Is it somebody else's?") from exc

    def _write_files(self) -> None:
        for name, text in self._plan.files.items():
            try:
                (self._plan.run_dir / name).write_text(text)
            except OSError as exc:
                raise LauncherError(f"cannot write {name} in {self._plan.run_dir}: {exc.strerror}") from exc

    async def _start_services(self) -> None:
        for service in self._plan.services:
            life = await self._spawn(service)
            with self._progress.step(f"{service.name} on port {service.ports[0]}", last_line(service.log)):
                await readiness.service_ready(life.running, self._config.ready_timeout_s)
            self._is_ready(life)

    async def _start_nodes(self) -> None:
        all_ready = asyncio.Event()
        starting = {node.name for node in self._plan.nodes}
        waits = [asyncio.create_task(self._node_ready(node, starting, all_ready)) for node in self._plan.nodes]
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _node_ready(self, node: NodeProcess, starting: set[str], all_ready: asyncio.Event) -> None:
        """One that is ready waits for the others: none of them may end meanwhile."""
        with self._progress.step(f"{node.name} on {node.url}", self._last_line_of(node.name)):
            life = await self._brought_up(node)
        starting.discard(node.name)
        if not starting:
            all_ready.set()
        await readiness.before_it_ends(life.running, all_ready.wait(), None)

    async def _brought_up(self, node: NodeProcess) -> Life:
        """A node that is ready; on other ports, should somebody have taken one of its own meanwhile."""
        for moves in range(_MOST_MOVES + 1):
            try:
                life = await self._spawn(node)
                await readiness.node_ready(life.running, node, self._config.ready_timeout_s)
            except (NodeDiedError, PortBusyError) as exc:
                await self._lives[node.name].clear_away(self._config.stop_timeout_s)
                thief = self._thief(node)
                if thief is None or moves == _MOST_MOVES:
                    raise
                node = self._moved(node, thief, exc)
            else:
                self._is_ready(life)
                return life
        raise AssertionError

    def _thief(self, node: NodeProcess) -> str | None:
        """Who has a port that the node needs, now that it has ended: nobody of this run."""
        single = (port for port in node.ports if port.first == port.last)
        busy = next((busy for port in single for busy in busy_ports(port)), None)
        return f"port {busy.port} was taken by {busy.holder}" if busy else None

    def _moved(self, node: NodeProcess, thief: str, error: LauncherError) -> NodeProcess:
        try:
            new = moved_node(self._plan, self._config, survey(self._config), node)
            self._locks.take(new.ports)
        except LauncherError:
            raise error from None  # there is nowhere to go
        self._locks.give_back(node.ports)
        self._plan = self._plan.with_node(new)
        self._progress.say(f"{node.name}: {thief}; going on with {new.url}")
        return new

    async def _start_proxy(self) -> None:
        life = await self._spawn(self._plan.proxy)
        with self._progress.step(f"proxy on {self._plan.proxy_url}", last_line(self._plan.proxy.log)):
            await self._unless_a_node_dies(
                readiness.proxy_ready(life.running, self._plan, self._config.ready_timeout_s)
            )
        self._is_ready(life)

    async def _unless_a_node_dies(self, work: Coroutine[Any, Any, None]) -> None:
        """`work`, which waits for something that no longer comes when a node ends. Raises NodeDiedError then."""
        working = asyncio.create_task(work)
        ends = {asyncio.create_task(life.running.ended()): life.running for life in self._lives.values()}
        try:
            done, _ = await asyncio.wait({working, *ends}, return_when=asyncio.FIRST_COMPLETED)
            for end, child in ends.items():
                if end in done:
                    raise readiness.died(child)
            working.result()
        finally:
            for task in (working, *ends):
                task.cancel()
            await asyncio.gather(working, *ends, return_exceptions=True)

    async def _spawn(self, spec: Process) -> Life:
        """Start a child, in its first life or a new one. Raises PortBusyError when a port of its is taken."""
        life = self._lives.setdefault(spec.name, Life(spec))
        await life.begin(spec, self._run_id, self._plan.temporary / spec.name)  # in a folder that is this user's only
        self._write_state()
        return life

    def _is_ready(self, life: Life) -> None:
        life.is_ready()
        self._write_state()

    def _write_topology(self) -> None:
        topology = self._plan.topology(self._draining)
        self._record.topology(self._plan.topology_file, topology.model_dump_json(indent=2) + "\n")

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._write_state()

    def _write_state(self) -> None:
        plan = self._plan
        lives = self._lives.values()
        children = tuple(life.described(draining=life.spec.name in self._draining) for life in lives)
        state = RunState(
            id=self._run_id, launcher=os.getpid(), phase=self._phase, engine=plan.engine, connector=plan.connector,
            model=plan.served_model_name, proxy_url=plan.proxy_url, temporary=plan.temporary, control=self._control,
            machine=this_machine(), stops_within_s=self._stops_within_s,
            began=self._began, written=time.time(), proven=self._proven, children=children,  # noqa: TID251  for people, and the next launcher
        )  # fmt: skip
        self._record.state(state)

    @property
    def _stops_within_s(self) -> float:
        """All of it: a group after the other."""
        return 3 * self._config.stop_timeout_s + self._plan.proxy.stops_within_s + _STOPS_WITHIN_S

    @property
    def _control(self) -> Path:
        return self._plan.temporary / "control"

    def _last_line_of(self, name: str) -> Callable[[], str]:
        log = self._plan.run_dir / f"{name}.log"
        return last_line(log)

    @property
    def plan(self) -> Plan:
        """As it is carried out: nodes may have moved to other ports."""
        return self._plan

    async def _ask_for_proof(self) -> None:
        console = self._progress.console
        try:
            result = await proof.prove(self._plan, lambda text: console.out(text, end="", highlight=False))
        except httpx.HTTPError as exc:
            raise LauncherError(f"the first request broke off: {exc!r}", f"Logs: {self._plan.run_dir}") from exc
        self._proven = f"{result.transferred} of {result.prompt_tokens} prompt tokens"

    async def _prove(self) -> None:
        console = self._progress.console
        console.print()
        console.print(f"[bold]asked[/]     {proof.QUESTION.format(1)}", highlight=False, soft_wrap=True)
        console.print("[bold]answered[/]  ", end="")
        try:
            async with self._explaining():
                await self._unless_a_node_dies(self._ask_for_proof())
        finally:
            console.print()
        console.print(
            f"[bold]KV moved[/]  {self._proven} went from prefill to decode (counted by the decode node)",
            highlight=False,
            soft_wrap=True,
        )

    def _greet(self) -> None:
        plan = self._plan
        self._progress.say(
            f"\nReady: {plan.proxy_url}/v1  model {plan.served_model_name}\n"
            f"Logs:  {plan.run_dir}\n"
            "Stop with Ctrl-C, or from anywhere with `pd-launch stop`. Try:\n"
            f"  curl {plan.proxy_url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
            f'    -d \'{{"model": "{plan.served_model_name}", "max_tokens": 32, "stream": true, '
            '"messages": [{"role": "user", "content": "Hello"}]}\''
        )

    # -- watch

    async def _watch(self) -> None:
        """Until a signal, or until the run cannot serve any more; then raises LauncherError."""
        asked = asyncio.create_task(self._stop_asked.wait())
        notes = asyncio.create_task(self._note_for_ever())
        for life in self._lives.values():
            self._keep(life)
        try:
            async with control.listening(self._control, self._command):
                ends: set[asyncio.Future[Any]] = {asked, notes, self._failed}
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for ended in (notes, self._failed):
                if ended.done():
                    ended.result()
        finally:
            kept = [life.kept for life in self._lives.values() if life.kept is not None]
            for task in (asked, notes, *kept):
                task.cancel()
            await asyncio.gather(asked, notes, *kept, return_exceptions=True)

    def _keep(self, life: Life) -> None:
        life.kept = asyncio.create_task(self._kept(life))
        life.kept.add_done_callback(self._keeping_ended)

    def _keeping_ended(self, task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._failed.done():
            self._failed.set_exception(error)

    async def _kept(self, life: Life) -> None:
        """Start a child again whenever it ends, as long as that makes sense. Returns when it is given up for good.

        The proxy finds out by itself: a node gets no requests while it is down, and its new identity is asked for
        before it gets one. Raises LauncherError when the run cannot go on without it.
        """
        deaths: list[float] = []
        failed_starts = 0
        while True:
            await life.running.ended()
            life.state = "ended"
            error = await self._explained(readiness.died(life.running))
            now = asyncio.get_running_loop().time()
            deaths = [*(death for death in deaths if now - death < _DEATHS_COUNT_FOR_S), now]
            too_often = len(deaths) > _MOST_DEATHS or failed_starts >= _MOST_DEATHS
            if not self._may_restart(life) or too_often:
                self._go_on_without(life, error, max(len(deaths), failed_starts + 1))
                return
            pause_s = min(_FIRST_PAUSE_S * 2 ** max(len(deaths) - 1, failed_starts), _LONGEST_PAUSE_S)
            self._progress.say(f"{error}\n{error.hint}\nStarting {life.spec.name} again in {pause_s:g} s.")
            await life.clear_away(self._config.stop_timeout_s)
            self._write_state()
            await asyncio.sleep(pause_s)
            failed_starts = 0 if await self._start_again(life) else failed_starts + 1

    async def _note_for_ever(self) -> None:
        while True:
            for life in tuple(self._lives.values()):
                life.note_shared_memory()
                with suppress(OSError):
                    if logs.turn_over(life.spec.log):
                        life.log_begins = 0
            self._write_state()
            await asyncio.sleep(_NOTE_EVERY_S)

    def _may_restart(self, life: Life) -> bool:
        """A service keeps what the nodes share: they would go on with nothing in it, and each must be told anew."""
        return self._config.restart and life.role != "service"

    async def _start_again(self, life: Life) -> bool:
        """Whether it became ready. One that did not has ended."""
        name = life.spec.name
        life.restarts += 1
        try:
            if isinstance(life.spec, NodeProcess):
                await self._brought_up(life.spec)
                self._write_topology()
            else:
                await self._spawn(life.spec)
                await readiness.proxy_listens(life.running, self._plan, self._config.ready_timeout_s)
                self._is_ready(life)
        except LauncherError as exc:
            self._progress.say(f"{exc}\n{exc.hint}")
            await life.end()
            self._write_state()
            return False
        self._progress.say(f"{name} is ready again.")
        return True

    def _go_on_without(self, life: Life, error: LauncherError, deaths: int) -> None:
        """While a node of each role and the proxy are left. Raises LauncherError else."""
        life.state = "given up"
        self._write_state()
        how_often = f"\nIt has ended {deaths} times." if deaths > 1 else ""
        roles = {other.role for other in self._lives.values() if other.state != "given up"}
        if not isinstance(life.spec, NodeProcess) or not roles >= {role.value for role in Role}:
            raise LauncherError(f"{error}{how_often}", error.hint)
        self._progress.say(f"{error}{how_often}\n{error.hint}\nGoing on without it.")

    async def _explained(self, error: LauncherError) -> LauncherError:
        """The error, with what the logs of all nodes say of it, when they do. Logs are long, and others wait."""
        offsets = {life.spec.name: life.log_begins for life in self._lives.values()}
        files = [life.spec.log for life in self._lives.values() if life.spec.log.exists()]
        diagnosis = await asyncio.to_thread(doctor.examine, files, offsets)
        if diagnosis.first is not None:
            error.hint = f"{doctor.in_words(diagnosis)}\n{error.hint}"
        return error

    # -- change

    async def _command(self, command: dict[str, Any], say: Say) -> None:
        """What comes over the control socket. Raises LauncherError."""
        match command:
            case {"do": "restart", "node": str(name)}:
                await self._restart(name, say)
            case {"do": "scale", "prefill": int() | None as prefill, "decode": int() | None as decode}:
                await self._scale({Role.PREFILL: prefill, Role.DECODE: decode}, say)
            case _:
                raise ConfigError(f"unknown command {command!r}")

    async def _restart(self, name: str, say: Say) -> None:
        life = self._lives.get(name)
        if life is None or life.role == "service":
            names = ", ".join(name for name, life in self._lives.items() if life.role != "service")
            raise ConfigError(f"no node {name!r} to start again", f"There are: {names}")
        await self._retire(life, say)
        is_back = await self._start_again(life)
        self._draining.discard(name)
        self._write_topology()
        self._keep(life)  # which tries on, if that makes sense
        if not is_back:
            raise LauncherError(f"{name} did not start again; trying on", f"Its log is {life.spec.log}")
        say(f"{name} is ready again.")

    async def _scale(self, wanted: dict[Role, int | None], say: Say) -> None:
        numbers = {role: number for role, number in wanted.items() if number is not None}
        for role, number in numbers.items():  # all of it or nothing
            if number < 1:
                raise ConfigError(f"a run needs at least one {role} node")
        for role, number in numbers.items():
            for life in self._lives_of(role):
                if life.state == "given up":
                    await self._remove(life, say)
            nodes = self._lives_of(role)
            for life in nodes[number:]:
                await self._remove(life, say)
            for _ in range(number - len(nodes)):
                await self._add(role, say)
            if len(nodes) == number:
                say(f"{number} {role} nodes: nothing to do.")

    def _lives_of(self, role: Role) -> list[Life]:
        return [self._lives[node.name] for node in self._plan.nodes if node.role is role]

    async def _add(self, role: Role, say: Say) -> None:
        node = another_node(self._plan, self._config, survey(self._config), role)
        self._locks.take(node.ports)
        say(f"Starting {node.name} on {node.url}.")
        self._plan = self._plan.with_node(node)
        try:
            life = await self._brought_up(node)
        except LauncherError as exc:
            explained = await self._explained(exc)
            await self._forget(self._lives[node.name])
            raise explained from exc
        self._write_topology()
        self._keep(life)
        say(f"{node.name} is ready.")

    async def _remove(self, life: Life, say: Say) -> None:
        await self._retire(life, say)
        await self._forget(life)
        self._write_topology()
        say(f"{life.spec.name} has gone.")

    async def _forget(self, life: Life) -> None:
        await life.end()
        del self._lives[life.spec.name]
        self._draining.discard(life.spec.name)
        self._plan = self._plan.without(life.spec.name)
        self._locks.give_back(life.spec.ports)
        self._write_state()

    async def _retire(self, life: Life, say: Say) -> None:
        """Stop a child that is no longer to be kept, once nobody waits for it."""
        if life.kept is not None:
            life.kept.cancel()
            await asyncio.gather(life.kept, return_exceptions=True)
        if isinstance(life.spec, NodeProcess) and life.state == "ready":
            say(f"Draining {life.spec.name}: it gets no new requests.")
            self._draining.add(life.spec.name)
            self._write_topology()
            self._write_state()
            try:
                async with asyncio.timeout(_DRAIN_S):
                    await self._until_idle(life.spec)
            except TimeoutError:
                say(f"{life.spec.name} is still at work after {_DRAIN_S:g} s.")
        say(f"Stopping {life.spec.name}.")
        life.note_shared_memory()
        await life.running.stop(self._stop_timeout_s(life.running))
        await life.clear_away(self._config.stop_timeout_s)
        life.state = "ended"
        self._write_state()

    async def _until_idle(self, node: NodeProcess) -> None:
        """Nothing of the proxy's on it, nothing running, and no KV that a decode node will come for."""
        async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
            while True:
                with suppress(httpx.HTTPError, KeyError, ValueError):
                    health = (await client.get(f"{self._plan.proxy_url}/health")).json()
                    mine = [entry for entry in health["nodes"] if entry["name"] == node.name]
                    gauges = metrics.gauges((await client.get(f"{node.url}/metrics")).text)
                    told = bool(mine) and not mine[0]["usable"] and not mine[0]["in_flight"]
                    if told and not (gauges.running or gauges.waiting or gauges.kv_usage):
                        return
                await asyncio.sleep(0.2)

    # -- stop

    async def _stop_all(self) -> None:
        """Proxy, decode, prefill: nobody is asked for work by something that has already gone."""
        self._progress.say("Stopping: proxy, decode nodes, prefill nodes. Ctrl-C again kills them at once.")
        self._enter("stopping")
        alive = [life.child for life in self._lives.values() if life.child is not None and not life.child.is_gone]
        sessions = {child.pid for child in alive}
        files = process.shared_memory(process.members(self._run_id, sessions))
        files = files.union(*(life.shared_memory for life in self._lives.values()))
        for group in self._stop_order():
            await asyncio.gather(*(child.stop(self._stop_timeout_s(child)) for child in group))
        left = process.kill(process.members(self._run_id, sessions))
        if left:
            self._progress.say(f"Killed what was left of the run: {', '.join(left)}")
        process.remove_unmapped(files)
        shutil.rmtree(self._plan.temporary, ignore_errors=True)
        for life in self._lives.values():
            life.state = "ended"
            life.let_go()
        self._enter("stopped")
        self._progress.say(f"All stopped. Logs: {self._plan.run_dir}")

    def _stop_timeout_s(self, child: Child) -> float:
        return max(self._config.stop_timeout_s, child.spec.stops_within_s)

    def _stop_order(self) -> Iterator[list[Child]]:
        yield self._named([self._plan.proxy])
        for role in (Role.DECODE, Role.PREFILL):
            yield self._named([node for node in self._plan.nodes if node.role is role])
        yield self._named(self._plan.services)

    def _named(self, specs: Sequence[Process]) -> list[Child]:
        lives = [self._lives[spec.name] for spec in specs if spec.name in self._lives]
        return [life.child for life in lives if life.child is not None]

    # -- signals

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
        for number in heard:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in heard:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._stopping:
            for life in self._lives.values():
                if life.child is not None:
                    life.child.kill()
        self._stop_asked.set()

    async def _or_interrupted(self, start: Coroutine[Any, Any, None]) -> None:
        starting, asked = asyncio.create_task(start), asyncio.create_task(self._stop_asked.wait())
        try:
            await asyncio.wait((starting, asked), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                raise InterruptedStart("interrupted before everything was up")
            starting.result()
        finally:
            asked.cancel()
            starting.cancel()
            with suppress(asyncio.CancelledError, LauncherError):
                await starting
