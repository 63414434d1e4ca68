"""A run: start the nodes side by side, then the proxy; prove that KV moves; watch; stop in order."""

import asyncio
import shutil
import signal
import uuid
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engines.base import Role

from . import process, proof, readiness
from .errors import InterruptedStart, LauncherError
from .plan import NodeProcess, Plan, Process
from .process import Child
from .progress import Progress, last_line

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_MOST_DEATHS = 4
_DEATHS_COUNT_FOR_S = 600.0
_NOTE_EVERY_S = 5.0


class Supervisor:
    """Owns every child of a run, from the first to the last."""

    def __init__(
        self, plan: Plan, progress: Progress, *, ready_timeout_s: float, stop_timeout_s: float, restart: bool
    ) -> None:
        self._plan = plan
        self._progress = progress
        self._ready_timeout_s = ready_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._restart = restart
        self._run_id = uuid.uuid4().hex
        self._children: dict[str, Child] = {}
        self._lost: set[str] = set()
        self._shared: dict[str, set[Path]] = {}
        self._stop_asked = asyncio.Event()
        self._stopping = False

    async def run(self) -> None:
        """Everything up, until a signal or the end of a needed child. Raises LauncherError; all is down afterwards."""
        with self._signals():
            try:
                await self._or_interrupted(self._start())
                await self._watch()
            finally:
                self._stopping = True
                await self._stop_all()

    # -- start

    async def _start(self) -> None:
        async with self._progress.shown():
            self._write_files()
            await self._start_services()
            await self._start_nodes()
            self._write_topology()
            await self._start_proxy()
        await self._prove()
        self._greet()

    def _write_files(self) -> None:
        for name, text in self._plan.files.items():
            (self._plan.run_dir / name).write_text(text)

    async def _start_services(self) -> None:
        for service in self._plan.services:
            child = await self._spawn(service)
            with self._progress.step(f"{service.name} on port {service.ports[0]}", last_line(service.log)):
                await readiness.service_ready(child, self._ready_timeout_s)

    async def _start_nodes(self) -> None:
        for node in self._plan.nodes:
            await self._spawn(node)
        waits = [asyncio.create_task(self._node_ready(node)) for node in self._plan.nodes]
        try:
            await self._unless_a_node_dies(_all_of(waits))
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _node_ready(self, node: NodeProcess) -> None:
        with self._progress.step(f"{node.name} on {node.url}", last_line(node.log)):
            await readiness.node_ready(self._children[node.name], node, self._ready_timeout_s)

    async def _start_proxy(self) -> None:
        child = await self._spawn(self._plan.proxy)
        with self._progress.step(f"proxy on {self._plan.proxy_url}", last_line(self._plan.proxy.log)):
            await self._unless_a_node_dies(readiness.proxy_ready(child, self._plan, self._ready_timeout_s))

    async def _unless_a_node_dies(self, work: Coroutine[Any, Any, None]) -> None:
        """`work`, which waits for something that no longer comes when a node ends. Raises NodeDiedError then."""
        working = asyncio.create_task(work)
        ends = {asyncio.create_task(child.ended()): child for child in self._children.values()}
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

    async def _spawn(self, spec: Process) -> Child:
        folder = self._plan.temporary / spec.name
        folder.mkdir(parents=True, exist_ok=True)
        child = await Child.start(spec, self._run_id, folder)
        self._children[spec.name] = child
        return child

    def _write_topology(self) -> None:
        """Whole or not at all: the proxy may read it at any moment."""
        file = self._plan.topology_file
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(self._plan.topology().model_dump_json(indent=2) + "\n")
        unfinished.rename(file)

    async def _prove(self) -> None:
        console = self._progress.console
        console.print()
        console.print(f"[bold]asked[/]     {proof.QUESTION.format(1)}", highlight=False, soft_wrap=True)
        console.print("[bold]answered[/]  ", end="")
        try:
            result = await proof.prove(self._plan, lambda text: console.out(text, end="", highlight=False))
        finally:
            console.print()
        console.print(
            f"[bold]KV moved[/]  {result.transferred} of {result.prompt_tokens} prompt tokens went from prefill to "
            "decode (counted by the decode node)",
            highlight=False,
            soft_wrap=True,
        )

    def _greet(self) -> None:
        plan = self._plan
        self._progress.say(
            f"\nReady: {plan.proxy_url}/v1  model {plan.served_model_name}\n"
            f"Logs:  {plan.run_dir}\n"
            "Stop with Ctrl-C. Try:\n"
            f"  curl {plan.proxy_url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
            f'    -d \'{{"model": "{plan.served_model_name}", "max_tokens": 32, "stream": true, '
            '"messages": [{"role": "user", "content": "Hello"}]}\''
        )

    # -- watch

    async def _watch(self) -> None:
        """Until a signal, or until the run cannot serve any more; then raises LauncherError."""
        asked = asyncio.create_task(self._stop_asked.wait())
        kept = {asyncio.create_task(self._keep(child.spec)) for child in self._children.values()}
        kept.add(asyncio.create_task(self._note_shared_memory_for_ever()))
        try:
            while not asked.done():
                done, _ = await asyncio.wait({asked, *kept}, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {asked}:
                    kept.discard(task)
                    task.result()
        finally:
            for task in (asked, *kept):
                task.cancel()
            await asyncio.gather(asked, *kept, return_exceptions=True)

    async def _keep(self, spec: Process) -> None:
        """Start a child again whenever it ends, as long as that makes sense. Returns when it is given up for good.

        The proxy finds out by itself: a node gets no requests while it is down, and its new identity is asked for
        before it gets one. Raises LauncherError when the run cannot go on without it.
        """
        deaths: list[float] = []
        failed_starts = 0
        while True:
            await self._children[spec.name].ended()
            error = readiness.died(self._children[spec.name])
            now = asyncio.get_running_loop().time()
            deaths = [*(death for death in deaths if now - death < _DEATHS_COUNT_FOR_S), now]
            too_often = len(deaths) > _MOST_DEATHS or failed_starts >= _MOST_DEATHS
            if not self._may_restart(spec) or too_often:
                self._go_on_without(spec, error, max(len(deaths), failed_starts + 1))
                return
            pause_s = min(_FIRST_PAUSE_S * 2 ** max(len(deaths) - 1, failed_starts), _LONGEST_PAUSE_S)
            self._progress.say(f"{error}\n{error.hint}\nStarting {spec.name} again in {pause_s:g} s.")
            self._note_shared_memory(self._children[spec.name])
            await self._children[spec.name].stop_what_is_left(self._stop_timeout_s)  # it holds ports and memory
            process.remove_unmapped(self._shared.get(spec.name, ()))
            await asyncio.sleep(pause_s)
            failed_starts = 0 if await self._start_again(spec) else failed_starts + 1

    async def _note_shared_memory_for_ever(self) -> None:
        while True:
            for child in tuple(self._children.values()):
                self._note_shared_memory(child)
            await asyncio.sleep(_NOTE_EVERY_S)

    def _note_shared_memory(self, child: Child) -> None:
        """A node that is killed leaves its shared memory behind, and then nobody can tell whose it was."""
        found = process.shared_memory(process.of_session(child.pid))
        self._shared.setdefault(child.spec.name, set()).update(found)

    def _may_restart(self, spec: Process) -> bool:
        """A service keeps what the nodes share: they would go on with nothing in it, and each must be told anew."""
        return self._restart and spec not in self._plan.services

    async def _start_again(self, spec: Process) -> bool:
        """Whether it became ready. One that did not has ended."""
        child = await self._spawn(spec)
        try:
            if isinstance(spec, NodeProcess):
                await readiness.node_ready(child, spec, self._ready_timeout_s)
            else:
                await readiness.proxy_listens(child, self._plan, self._ready_timeout_s)
        except LauncherError as exc:
            self._progress.say(f"{exc}\n{exc.hint}")
            await child.stop(0)
            return False
        self._progress.say(f"{spec.name} is ready again.")
        return True

    def _go_on_without(self, spec: Process, error: LauncherError, deaths: int) -> None:
        """While a node of each role and the proxy are left. Raises LauncherError else."""
        self._lost.add(spec.name)
        how_often = f"\nIt has ended {deaths} times." if deaths > 1 else ""
        roles = {node.role for node in self._plan.nodes if node.name not in self._lost}
        if not isinstance(spec, NodeProcess) or roles != set(Role):
            raise LauncherError(f"{error}{how_often}", error.hint)
        self._progress.say(f"{error}{how_often}\n{error.hint}\nGoing on without it.")

    # -- stop

    async def _stop_all(self) -> None:
        """Proxy, decode, prefill: nobody is asked for work by something that has already gone."""
        self._progress.say("Stopping: proxy, decode nodes, prefill nodes. Ctrl-C again kills them at once.")
        sessions = {child.pid for child in self._children.values()}
        files = process.shared_memory(process.members(self._run_id, sessions)).union(*self._shared.values())
        for group in self._stop_order():
            await asyncio.gather(*(child.stop(self._stop_timeout_s) for child in group))
        left = process.kill(process.members(self._run_id, sessions))
        if left:
            self._progress.say(f"Killed what was left of the run: {', '.join(left)}")
        process.remove_unmapped(files)
        shutil.rmtree(self._plan.temporary, ignore_errors=True)
        self._progress.say(f"All stopped. Logs: {self._plan.run_dir}")

    def _stop_order(self) -> Iterator[list[Child]]:
        yield self._named([self._plan.proxy])
        for role in (Role.DECODE, Role.PREFILL):
            yield self._named([node for node in self._plan.nodes if node.role is role])
        yield self._named(self._plan.services)

    def _named(self, specs: Sequence[Process]) -> list[Child]:
        return [self._children[spec.name] for spec in specs if spec.name in self._children]

    # -- signals

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._stopping:
            for child in self._children.values():
                child.kill()
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


async def _all_of(waits: Sequence["asyncio.Task[None]"]) -> None:
    await asyncio.gather(*waits)


def clear_run_dir(folder: Path) -> None:
    """Logs of an earlier run in the same folder would be taken for this one's."""
    for log in folder.glob("*.log"):
        log.unlink()
