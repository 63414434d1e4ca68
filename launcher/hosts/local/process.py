"""One child process of a run: started in its own group with its own log, stopped whole, nothing left behind."""

import asyncio
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from ...errors import LauncherError
from ...plan.plan import Process
from . import tether
from .members import NODE_TAG, RUN_TAG, of_group

_KILLED_WITHIN_S = 30.0
_TRACKERS_END_WITHIN_S = 5.0
_FIRST_LOOK_S = 0.02
_LONGEST_PAUSE_S = 0.5


class Child:
    """A started process of the plan. Implements `hosts.host.Running`."""

    def __init__(self, spec: Process, process: asyncio.subprocess.Process) -> None:
        self.spec = spec
        self._process = process
        self._is_gone = False
        self._is_asked_to_end = False
        self.died_at: float | None = None
        """When it ended by itself, in seconds since 1970."""

    @classmethod
    async def start(cls, spec: Process, run_id: str, folder: Path) -> "Child":
        """Start it in `folder`, its own; its output goes to its log from the first byte. Raises LauncherError."""
        environment = spec.inherited | spec.environment | {RUN_TAG: run_id, NODE_TAG: spec.name}
        tied = (sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), *spec.command)
        try:
            _make(folder)
            with _appended_to(spec.log) as log:
                process = await asyncio.create_subprocess_exec(
                    *tied,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                    cwd=folder,
                    env=environment,
                    start_new_session=True,  # a Ctrl-C at the terminal is for the launcher, which stops all in order
                )
        except OSError as exc:
            raise LauncherError(f"cannot start {spec.name}: {exc}", f"Its log would be {spec.log}") from exc
        return cls(spec, process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Negative: the number of the signal that ended it. None while it runs."""
        return self._process.returncode

    async def ended(self) -> int:
        code = await self._process.wait()
        if self.died_at is None and not self._is_asked_to_end:
            self.died_at = time.time()  # noqa: TID251  for people, and for the doctor
        return code

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM to the root, which knows how to stop the rest; after `timeout_s` SIGKILL to the whole group.

        Python's resource trackers come last: they unlink the semaphores of the others, which nobody else knows of.
        """
        self._is_asked_to_end = True
        with suppress(ProcessLookupError):
            self._process.terminate()
        stages = (
            (timeout_s, self._kill_all_but_trackers),
            (_TRACKERS_END_WITHIN_S, self.kill),
            (_KILLED_WITHIN_S, self.kill),
        )
        for patience_s, end in stages:
            with suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await self._process.wait()
                    await self._group_is_gone()
                return
            end()

    async def stop_what_is_left(self, timeout_s: float) -> None:
        """Of a tree whose root has died: SIGTERM to all of it, and SIGKILL only to what does not go."""
        self._signal(signal.SIGTERM)
        await self.stop(timeout_s)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    @property
    def is_gone(self) -> bool:
        """All of its group has ended; by now the number may be another's."""
        return self._is_gone

    def _signal(self, number: signal.Signals) -> None:
        if not self._is_gone:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def _kill_all_but_trackers(self) -> None:
        if self._is_gone:
            return
        for one in of_group(self.pid):
            with suppress(psutil.Error, OSError):
                one.send_signal(signal.SIGCONT if _is_tracker(one) else signal.SIGKILL)

    async def _group_is_gone(self) -> None:
        pause_s = _FIRST_LOOK_S
        while any(of_group(self.pid)):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        self._is_gone = True


def _appended_to(log: Path) -> IO[bytes]:
    """For this user only: prompts and keys may be in it. A link that somebody else put there is not followed."""
    return os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "ab")


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def _is_tracker(process: psutil.Process) -> bool:
    """What Python's multiprocessing starts beside its first semaphore, or shared memory."""
    return "from multiprocessing.resource_tracker import main" in " ".join(process.cmdline())
