"""A run: start the nodes side by side, then the proxy; prove that KV moves; watch; stop in order."""

import asyncio
import os
import secrets
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import httpx

from engines.known import ENGINES

from ..errors import InterruptedStart, LauncherError, NodeDiedError
from ..events.events import Events
from ..hosts.host import Host
from ..hosts.reserve import Reserved
from ..inspect import logs
from ..inspect.runs import RunFolder, RunState, page_url, this_machine
from ..plan.config import TINY_MODEL, LaunchConfig
from ..plan.plan import Plan
from ..setup import install
from . import control, proof, signals
from .changes import Changes
from .download import download
from .explain import explained
from .fleet import Fleet
from .keeper import Keeper
from .record import Record
from .restarts import RestartPolicy

ADMIN_KEY = "PD_PROXY_ADMIN_KEY"
_KEY_BYTES = 18
_NOTE_EVERY_S = 5.0
_STOPS_WITHIN_S = 60.0
"""... beside the time that every group of nodes is given."""

Phase = Literal["starting", "ready", "stopping", "stopped"]


class Supervisor:
    """One run, from its first child to its last."""

    def __init__(  # noqa: PLR0913, PLR0917  what a run is made of
        self,
        config: LaunchConfig,
        reserved: Reserved,
        host: Host,
        folder: RunFolder,
        events: Events,
        policy: RestartPolicy | None = None,
        *,
        has_terminal: bool = True,
    ) -> None:
        """`has_terminal`: there may be somebody who presses Ctrl-C."""
        self._config = config
        self._facts = reserved.facts
        self._events = events
        self._policy = policy or RestartPolicy()
        self._has_terminal = has_terminal
        self._record = Record(folder, config, reserved.facts.engine.versions)
        self._record.say = lambda text: events.say(text, "warning")
        plan, self._admin_key = _with_admin_key(reserved.plan)
        self._fleet = Fleet(config, plan, reserved.facts, host, reserved.reservation, events, run_id=uuid.uuid4().hex)
        self._fleet.changed = self._write_state
        self._host = host
        self._machine, self._host_name = this_machine(), socket.gethostname()
        self._began = time.time()  # noqa: TID251  for people, and the next launcher
        self._phase: Phase = "starting"
        self._proven: str | None = None
        self._stop_asked = asyncio.Event()

    @property
    def plan(self) -> Plan:
        """As it is carried out: nodes may have moved to other ports."""
        return self._fleet.plan

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
        notes = asyncio.create_task(self._note_for_ever())
        with signals.heard(self._on_signal):
            try:
                yield
            finally:
                try:
                    self._say_stopping()
                    await self._fleet.stop_all()
                finally:
                    notes.cancel()
                    await asyncio.gather(notes, return_exceptions=True)
                    self._enter("stopped")
                self._events.say(f"All stopped. Logs: {self.plan.run_dir}")

    # -- start

    async def _start(self) -> None:
        await self.start()
        self._greet()

    async def start(self) -> None:
        """All of it, until it is proven that KV moves. Raises LauncherError, with what the logs say of it."""
        await self.start_nodes()
        await self.start_proxy()
        await self._prove()
        self._enter("ready")

    async def while_all_live(self, work: Coroutine[Any, Any, None]) -> None:
        """`work`, until a node ends. Raises NodeDiedError then, with what the logs say of it."""
        async with self._explaining():
            await self._fleet.unless_a_node_dies(work)

    async def start_nodes(self) -> None:
        """The model, services, then all nodes side by side. Raises LauncherError, with what the logs say of it."""
        await self._make_tiny_model()
        await download(self.plan, self._facts, self._host, self._fleet.run_id, self._events)
        async with self._explaining(), self._events.shown():
            self._record.lock(self.plan)
            self._host.prepare(self.plan)
            await self._fleet.start_services()
            await self._fleet.start_nodes(self.plan.nodes)
            self._nodes_changed()

    async def _make_tiny_model(self) -> None:
        if self._config.model == TINY_MODEL and not ENGINES[self._config.engine].is_simulated:
            async with self._events.shown():
                await install.make_tiny_model(self._events, Path(self.plan.engine_python))

    async def start_proxy(self) -> None:
        """Raises LauncherError."""
        async with self._explaining(), self._events.shown():
            await self._fleet.start_proxy()

    @asynccontextmanager
    async def _explaining(self) -> AsyncIterator[None]:
        try:
            yield
        except LauncherError as exc:
            raise await explained(exc, tuple(self._fleet.lives.values())) from None

    async def _prove(self) -> None:
        """Raises LauncherError; with --keep what is not proven is said, and the run goes on."""
        try:
            async with self._explaining():
                await self._fleet.unless_a_node_dies(self._ask_for_proof())
        except LauncherError as exc:
            if not self._config.keep or isinstance(exc, NodeDiedError):
                raise
            self._events.say(f"{exc}\n{exc.hint}\nThe nodes stay up, as --keep says.", "error")

    async def _ask_for_proof(self) -> None:
        try:
            await self._compare()
            await self._prove_that_kv_moves()
        except httpx.HTTPError as exc:
            raise LauncherError(f"the first request broke off: {exc!r}", f"Logs: {self.plan.run_dir}") from exc

    async def _compare(self) -> None:
        compared = await proof.compare(self.plan)
        if compared is None:
            return
        if compared.same:
            pairs = "the pair answers as its" if compared.same == 1 else f"{compared.same} pairs answer as their"
            self._events.say(f"compared  {pairs} decode node does alone", "text")
        for pair in compared.not_judged:
            self._events.say(f"not compared with the decode node's own answer: {pair}", "warning")

    async def _prove_that_kv_moves(self) -> None:
        answer: list[str] = []
        self._events.say(f"\nasked     {proof.QUESTION.format(1)}", "text")
        try:
            if self.plan.connector == "none":
                await proof.answer(self.plan, answer.append)
                return
            result = await proof.prove(self.plan, answer.append)
        finally:
            if answer:
                self._events.say(f"answered  {' '.join(''.join(answer).split())}", "text")
        self._proven = f"{result.transferred} of {result.prompt_tokens} prompt tokens"
        self._events.say(f"KV moved  {self._proven}, counted by the decode node", "text")

    def _greet(self) -> None:
        plan = self.plan
        url = plan.proxy_url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
        key = " -H 'Authorization: Bearer YOUR_KEY'" if self._is_keyed else ""
        self._events.say(
            f"\nReady: {url}/v1  model {', '.join(plan.served_names)}\n"
            f"Page:  {page_url(plan.admin_url, self._admin_key)}\n"
            f"Logs:  {plan.run_dir}\n"
            f"Stop with {'Ctrl-C, or from anywhere with ' if self._has_terminal else ''}`pd-launch stop`. Try:\n"
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
            f'    -d \'{{"model": "{plan.served_model_name}", "max_tokens": 32, "stream": true, '
            '"messages": [{"role": "user", "content": "Hello"}]}\'',
            "ready",
            url=f"{url}/v1", page=plan.admin_url, model=plan.served_model_name, run_dir=str(plan.run_dir),
            proven=self._proven,
        )  # fmt: skip

    # -- watch

    async def _watch(self) -> None:
        """Until a signal, or until the run cannot serve any more; then raises LauncherError."""
        keeper = Keeper(self._fleet, self._events, self._nodes_changed, self._policy)
        changes = Changes(self._fleet, keeper, self._events, self._nodes_changed)
        asked: asyncio.Future[Any] = asyncio.create_task(self._stop_asked.wait())
        for life in tuple(self._fleet.lives.values()):
            keeper.keep(life)
        try:
            async with control.listening(self._control, changes):
                ends: set[asyncio.Future[Any]] = {asked, keeper.failed}
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if keeper.failed.done():
                keeper.failed.result()
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            await keeper.close()

    async def _note_for_ever(self) -> None:
        """Housekeeping: what fails in it is said, and tried again."""
        said = ""
        while True:
            try:
                self._note()
            except Exception as exc:  # noqa: BLE001  it ends no run
                if repr(exc) != said:
                    said = repr(exc)
                    self._events.say(f"the launcher's own housekeeping failed: {said}", "warning")
            await asyncio.sleep(_NOTE_EVERY_S)

    def _note(self) -> None:
        for life in tuple(self._fleet.lives.values()):
            life.note_shared_memory()
            with suppress(OSError):
                if logs.turn_over(life.spec.log):
                    life.log_begins = 0
        with suppress(OSError):
            logs.turn_over(self.plan.run_dir / logs.OF_THE_LAUNCHER)
        self._write_state()

    # -- what is written down

    def _nodes_changed(self) -> None:
        """For the proxy, and for whoever repeats the run."""
        told, fleet = self._fleet.told_plan, self._fleet
        findings = {life.spec.name: life.finding for life in tuple(fleet.lives.values())}
        self._record.topology(told.topology_file, lambda drained: told.topology({*fleet.draining, *drained}, findings))
        self._record.lock(told)

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._write_state()

    def _write_state(self) -> None:
        plan, fleet = self.plan, self._fleet
        children = tuple(
            life.described(draining=life.spec.name in fleet.draining) for life in tuple(fleet.lives.values())
        )
        state = RunState(
            id=fleet.run_id, launcher=os.getpid(), phase=self._phase, engine=plan.engine, connector=plan.connector,
            model=plan.served_model_name, proxy_url=plan.proxy_url, admin_url=plan.admin_url, admin_key=self._admin_key,
            temporary=plan.temporary, control=self._control, machine=self._machine, host=self._host_name,
            stops_within_s=self._stops_within_s,
            keyed=self._is_keyed, began=self._began, written=time.time(), proven=self._proven, children=children,  # noqa: TID251  for people, and the next launcher
        )  # fmt: skip
        self._record.state(state)

    @property
    def _is_keyed(self) -> bool:
        return bool(self.plan.proxy.inherited.get("PD_PROXY_API_KEYS"))

    @property
    def _stops_within_s(self) -> float:
        """All of it: a group after the other."""
        return 3 * self._config.stop_timeout_s + self.plan.proxy.stops_within_s + _STOPS_WITHIN_S

    @property
    def _control(self) -> Path:
        return self.plan.temporary / "control"

    # -- stop

    def _say_stopping(self) -> None:
        """Once, as soon as it is asked for. What cannot be written down or said keeps nothing from being stopped."""
        if self._phase != "stopping":
            again = " Ctrl-C again kills them at once." if self._has_terminal else ""
            self._events.say(f"Stopping: proxy, decode nodes, prefill nodes.{again}")
            with suppress(OSError):
                self._enter("stopping")

    def _on_signal(self) -> None:
        if self._phase == "stopping":
            self._fleet.kill()
        self._stop_asked.set()
        self._say_stopping()

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


def _with_admin_key(plan: Plan) -> tuple[Plan, str]:
    """The user's own, or one of this run: other users of this machine reach its page's port, too."""
    given = plan.proxy.inherited.get(ADMIN_KEY)
    if given:
        return plan, given
    key = secrets.token_urlsafe(_KEY_BYTES)
    proxy = plan.proxy.model_copy(update={"environment": plan.proxy.environment | {ADMIN_KEY: key}})
    return plan.model_copy(update={"proxy": proxy}), key
