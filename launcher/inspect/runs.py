"""What is known of a run from outside of it: its folder, whether it is alive, its state, what it left behind."""

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Literal

import platformdirs
import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from .. import private
from ..errors import ConfigError, PreflightError
from ..hosts.local import members
from ..plan.facts import APPLICATION

_STATE = "state.json"
_LOCK = ".lock"
_PREVIOUS = "previous"
_PREVIOUS_KEPT = 5
_KEPT_WITH_IT = ("lock.json", "topology.json", "mooncake.json")
_TRIES = 3
_BETWEEN_TRIES_S = 0.02
_TAKES_S = 5
_UNWRITTEN_S = 60
"""A launcher writes its state every few seconds, if it can; what was started since is its child's, too."""
_RUNS_KEPT = 50
_OF_A_RUN = re.compile(r"((prefill|decode)-\d+|proxy|store|launcher|download|transfer)\.log(\.\d+)?")
"""Logs of this or another run in the folder: of nodes that came and went, too."""


State = Literal["starting", "ready", "hung", "draining", "restarting", "stopped", "given up"]
"""Of a child. restarting: it has ended, and is started again in a moment."""


Phase = Literal["starting", "ready", "stopping", "stopped", "killed", "elsewhere"]
"""Of a run, seen from outside. killed: its launcher is gone, and did not stop it. elsewhere: that machine can tell."""


class Death(BaseModel):
    """An end of a child that nobody had asked for."""

    model_config = ConfigDict(frozen=True)

    at: float
    """Seconds since 1970."""
    how: str


class ChildState(BaseModel):
    """One child of a run."""

    model_config = ConfigDict(frozen=True)

    name: str
    role: str
    """prefill, decode, proxy or service"""
    state: State
    pid: int | None
    since: float
    """Seconds since 1970, when this life of it began."""
    restarts: int
    url: str | None
    ports: tuple[str, ...]
    log: Path
    shared_memory: tuple[Path, ...] = ()
    deaths: tuple[Death, ...] = ()
    """The last ones, oldest first."""


class RunState(BaseModel):
    """A run as its launcher last wrote it down."""

    model_config = ConfigDict(frozen=True)

    id: str
    machine: str
    """Where its process numbers mean something: this boot of this host, in this process namespace."""
    host: str = ""
    """Its name, for people."""
    launcher: int
    phase: Literal["starting", "ready", "stopping", "stopped"]
    engine: str
    connector: str
    model: str
    proxy_url: str
    admin_url: str = ""
    admin_key: str = ""
    """What its page's listener is asked with; the file is for this user only."""
    temporary: Path
    control: Path
    began: float
    written: float
    stops_within_s: float
    proven: str | None = None
    """What the run's own first request proved: how many of its prompt's tokens moved."""
    keyed: bool = False
    """Whether the proxy wants a key."""
    children: tuple[ChildState, ...]

    @property
    def is_here(self) -> bool:
        """Its processes are this machine's, in this container: a home folder may be shared by many."""
        return self.machine == this_machine()


def page_url(admin_url: str, admin_key: str) -> str:
    """What opens the page: a browser tells nobody what is behind the `#`."""
    return f"{admin_url}/#key={admin_key}"


def this_machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"


def _lock_exclusively(lock: int) -> None:
    """Whoever only looks whether a run is alive holds it for a moment. Raises BlockingIOError, OSError."""
    for _ in range(_TRIES):
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_BETWEEN_TRIES_S)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


class NoRunError(ConfigError):
    """There is none that could be meant."""


class RunFolder:
    """A folder that one launcher at a time may use; whoever holds it is alive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def claim(self) -> None:
        """Until this process ends, and where `known` finds it. Raises ConfigError, PreflightError."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            hint = "Choose another place with --run-dir"
            raise PreflightError(f"cannot make {self.path} for the logs: {exc.strerror}", hint) from exc
        try:
            lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise ConfigError(f"cannot use {self.path} for a run: {exc.strerror}", "Choose another --run-dir") from exc
        try:
            _lock_exclusively(lock)
        except BlockingIOError:
            os.close(lock)
            raise ConfigError(
                f"another run uses {self.path}", f"`pd-launch stop --run-dir {self.path}`, or choose another --run-dir"
            ) from None
        except OSError as exc:
            os.close(lock)
            hint = "Choose a --run-dir on another file system, a local one"
            raise ConfigError(f"the file system of {self.path} has no locks: {exc.strerror}", hint) from exc
        self._lock = lock
        self._register()

    def adopt(self, handle: int) -> None:
        """The claim of the process that started this one."""
        os.set_inheritable(handle, False)  # noqa: FBT003  as it is called
        self._lock = handle

    @property
    def handle(self) -> int:
        """Of the claim: whoever has it open keeps the folder."""
        assert self._lock is not None  # noqa: S101  it was claimed
        return self._lock

    def remove_if_empty(self) -> None:
        """But for the lock: nothing was started in it."""
        with suppress(OSError):
            if {path.name for path in self.path.iterdir()} <= {_LOCK}:
                (self.path / _LOCK).unlink(missing_ok=True)
                self.path.rmdir()

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _register(self) -> None:
        """A run with a folder of its own is to be found without being named, too."""
        if self.path.parent == folder():
            return
        link = folder() / f"elsewhere-{hashlib.sha256(str(self.path).encode()).hexdigest()[:12]}"
        with suppress(OSError):
            link.parent.mkdir(parents=True, exist_ok=True)
            for old in link.parent.glob("elsewhere-*"):
                if not old.exists():  # that run's folder has been removed
                    old.unlink()
            link.unlink(missing_ok=True)
            link.symlink_to(self.path)

    @property
    def is_alive(self) -> bool:
        """Whether a launcher holds it. Looking takes a moment, in which one that wants to tries again."""
        try:
            lock = os.open(self.path / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no locks there, so no run
            return False
        finally:
            os.close(lock)
        return False

    def write(self, state: RunState) -> None:
        """Raises OSError."""
        private.write(self.path / _STATE, state.model_dump_json(indent=1))

    def read(self) -> RunState | None:
        """None when there is none, or an older version's."""
        with suppress(OSError, ValidationError):
            return RunState.model_validate_json((self.path / _STATE).read_text())
        return None

    def set_aside(self) -> None:
        """What an earlier run left here goes into a folder of its own, the last few of which are kept.

        Its logs would be taken for this run's, and they may be all that tells of a crash. Nothing else is touched.
        Raises ConfigError when processes of it still live: with its state the only record of them would be gone.
        """
        earlier = self.read()
        if earlier is None:
            return
        left = left_behind(earlier) if earlier.is_here else []
        if left:
            pids = ", ".join(str(one.pid) for one in left)
            hint = "`pd-launch clean` shows them, `pd-launch clean --yes` ends them"
            raise ConfigError(f"processes of an earlier run in {self.path} still live: {pids}", hint)
        members.remove_unmapped(file for child in earlier.children for file in child.shared_memory)
        began = datetime.fromtimestamp(earlier.began).astimezone()
        kept = self.path / _PREVIOUS / began.strftime("%Y%m%d-%H%M%S")
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        logs = [file for file in self.path.iterdir() if _OF_A_RUN.fullmatch(file.name)]
        others = (self.path / name for name in (_STATE, *_KEPT_WITH_IT))
        for file in (*logs, *others):
            if file.exists():
                file.replace(kept / file.name)
        for old in sorted((self.path / _PREVIOUS).iterdir())[:-_PREVIOUS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)


def folder() -> Path:
    """Where runs are kept that were given no folder of their own."""
    return platformdirs.user_state_path(APPLICATION) / "runs"


def known() -> list[RunFolder]:
    """Newest last."""
    found: dict[Path, float] = {}
    for path in folder().glob("*"):
        with suppress(OSError):  # another launcher may be taking it away just now
            found[path.resolve()] = (path / _STATE).stat().st_mtime
    return [RunFolder(path) for path in sorted(found, key=lambda path: found[path])]


def choose(run_dir: Path | None, *, alive: bool = False) -> RunFolder:
    """The run that is meant: the one named, or the one that runs here, or (unless it must be alive) the last one.

    Raises ConfigError.
    """
    if run_dir is not None:
        return _named(RunFolder(run_dir.expanduser().absolute()), alive=alive)
    mine = [run for run in known() if (state := run.read()) is not None and state.is_here]
    living = [run for run in mine if run.is_alive]
    if len(living) > 1:
        listed = "\n".join(f"  --run-dir {run.path}" for run in living)
        raise ConfigError(f"{len(living)} runs are alive; say which:\n{listed}")
    found = living or ([] if alive else mine[-1:])
    if not found:
        raise NoRunError(f"no run {'is alive' if alive else 'is known'} in {folder()}", "Name another's with --run-dir")
    return found[0]


def _named(run: RunFolder, *, alive: bool) -> RunFolder:
    state = run.read()
    if state is None:
        raise ConfigError(f"no run is known in {run.path}")
    if alive and not state.is_here:
        raise ConfigError(
            f"the run in {run.path} is on another machine or in another container ({state.host})", "Ask for it there"
        )
    if alive and not run.is_alive:
        raise NoRunError(f"the run in {run.path} is over")
    return run


def phase_of(run: RunFolder, state: RunState) -> Phase:
    """What its launcher last wrote, unless that is gone, or another machine's."""
    if state.phase == "stopped":
        return "stopped"
    if not state.is_here:
        return "elsewhere"
    return state.phase if run.is_alive else "killed"


def left_behind(state: RunState) -> list[psutil.Process]:
    """Processes of a run whose launcher has gone, by ownership: the run's tag, or the session of one of its children.

    A session's number may be another's by now: only processes as old as that child are taken.
    """
    since = {child.pid: child.since for child in state.children if child.pid is not None}
    found = []
    for one in members.members(state.id, since.keys()):
        with suppress(psutil.Error, OSError):
            if members.has_tag(one, state.id) or (
                since.get(os.getsid(one.pid), 0) - _TAKES_S <= one.create_time() <= state.written + _UNWRITTEN_S
            ):
                found.append(one)
    return found


def remains() -> Iterator[tuple[RunFolder, RunState, list[psutil.Process], list[Path]]]:
    """Runs of this machine that are over and were not cleaned up: what still runs, and what still lies about.

    Processes are looked for only of a run that has not said itself that all of it is down.
    """
    for run in known():
        state = run.read()
        if state is None or state.phase == "stopped" or not state.is_here or run.is_alive:
            continue
        left = left_behind(state)
        files = [file for child in state.children for file in child.shared_memory if file.exists()]
        files += [state.temporary] if state.temporary.exists() else []
        if left or files:
            yield run, state, left, files


def forget_old() -> None:
    """Of runs in the user's state folder the last ones are kept; one that left something behind is not touched."""
    mine = [run for run in known() if run.path.parent == folder().resolve()]
    for run in mine[:-_RUNS_KEPT]:
        state = run.read()
        if state is not None and state.phase == "stopped" and not run.is_alive:
            shutil.rmtree(run.path, ignore_errors=True)
