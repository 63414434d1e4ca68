"""One child process of a run: started in its own group with its own log, stopped whole, nothing left behind.

A vLLM node is a tree (API server, engine core, workers). Killing only its root leaves the rest with the ports, the
memory and the GPU. So a run's processes are found by their session, which each node's tree shares, and by a tag in
their environment, for whatever made a session of its own. (vLLM's children rename themselves, which overwrites their
environment in /proc; the tag alone would miss them.)
"""

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from . import tether
from .errors import LauncherError
from .plan import Process

RUN_TAG = "PD_LAUNCH_ID"
NODE_TAG = "PD_LAUNCH_NODE"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  not ours to name
_MADE_BY_AN_ENGINE = re.compile(r"(psm_\w+|sem\.mp-\w+|torch_\d+_\w+|pymp-\w+|nccl-\w+)\Z")
"""By Python's multiprocessing, torch or NCCL. A model that lies in /dev/shm is mapped too, and is not ours."""
_KILLED_WITHIN_S = 30.0
_TRACKERS_END_WITHIN_S = 5.0


class Child:
    """A started process of the plan."""

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
        environment = environment_of(spec) | {RUN_TAG: run_id, NODE_TAG: spec.name}
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
        for one in _of_group(self.pid):
            with suppress(psutil.Error, OSError):
                one.send_signal(signal.SIGCONT if _is_tracker(one) else signal.SIGKILL)

    async def _group_is_gone(self) -> None:
        while any(_of_group(self.pid)):
            await asyncio.sleep(0.1)
        self._is_gone = True


def _appended_to(log: Path) -> IO[bytes]:
    """For this user only: prompts and keys may be in it. A link that somebody else put there is not followed."""
    return os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "ab")


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def environment_of(spec: Process) -> dict[str, str]:
    """The launcher's own, as the plan changes it."""
    return {name: value for name, value in os.environ.items() if name not in spec.unset} | spec.environment


def exit_in_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"killed by {signal.Signals(-code).name}"


def members(run_id: str, sessions: Collection[int]) -> list[psutil.Process]:
    """Every process of a run, whatever became of its parent."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if os.getsid(process.pid) in sessions or process.environ().get(RUN_TAG) == run_id:
                found.append(process)
    return found


def of_session(session: int) -> list[psutil.Process]:
    """The processes of one node: its tree shares the session that it was started in."""
    found = []
    for process in psutil.process_iter():
        with suppress(OSError):
            if os.getsid(process.pid) == session:
                found.append(process)
    return found


def kill(processes: Iterable[psutil.Process]) -> list[str]:
    """End processes at once. Returns what they were, for the user to see."""
    names = []
    for process in processes:
        with suppress(psutil.Error):
            names.append(f"{process.name()} (pid {process.pid})")
            process.kill()
    psutil.wait_procs(processes, timeout=5)
    return names


def shared_memory(processes: Iterable[psutil.Process]) -> set[Path]:
    """Files in /dev/shm that these processes map now: theirs to lose when they are killed."""
    files: set[Path] = set()
    for process in processes:
        with suppress(psutil.Error, OSError):
            files |= _mapped(process.pid)
    return files


def remove_unmapped(files: Iterable[Path]) -> list[Path]:
    """Remove those of the files that still exist and that no process maps any more. Returns them."""
    existing = {file for file in files if file.exists()}
    if not existing:
        return []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            existing -= _mapped(process.pid)
    for file in existing:
        file.unlink(missing_ok=True)
    return sorted(existing)


def _mapped(pid: int) -> set[Path]:
    maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    paths = (Path(line.split(maxsplit=5)[-1].strip()) for line in maps.splitlines())
    return {path for path in paths if path.parent == _SHARED_MEMORY and _MADE_BY_AN_ENGINE.match(path.name)}


def _of_group(group: int) -> Iterator[psutil.Process]:
    """Zombies do not count: where nobody reaps orphans (a container without init) they stay for ever."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _is_tracker(process: psutil.Process) -> bool:
    """What Python's multiprocessing starts beside its first semaphore, or shared memory."""
    return "from multiprocessing.resource_tracker import main" in " ".join(process.cmdline())
