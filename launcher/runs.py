"""What is known of a run from outside of it: its folder, whether it is alive, its state, what it left behind."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import platformdirs
import psutil
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from . import logs, process
from .errors import ConfigError
from .facts import APPLICATION

_STATE = "state.json"
_LOCK = ".lock"
_TAKES_S = 5


class ChildState(BaseModel):
    """One child of a run."""

    model_config = ConfigDict(frozen=True)

    name: str
    role: str
    """prefill, decode, proxy or service"""
    state: Literal["starting", "ready", "draining", "ended", "given up"]
    pid: int | None
    since: float
    """Seconds since 1970, when this life of it began."""
    restarts: int
    url: str | None
    ports: tuple[str, ...]
    log: Path
    shared_memory: tuple[Path, ...] = ()


class RunState(BaseModel):
    """A run as its launcher last wrote it down."""

    model_config = ConfigDict(frozen=True)

    id: str
    launcher: int
    phase: Literal["starting", "ready", "stopping", "stopped"]
    engine: str
    connector: str
    model: str
    proxy_url: str
    temporary: Path
    control: Path
    began: float
    written: float
    proven: str | None = None
    """What the run's own first request proved: how many of its prompt's tokens moved."""
    children: tuple[ChildState, ...]


class RunFolder:
    """A folder that one launcher at a time may use; whoever holds it is alive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / _LOCK)

    def claim(self) -> None:
        """Until this process ends. Raises ConfigError."""
        try:
            self._lock.acquire(timeout=1)
        except Timeout:
            raise ConfigError(
                f"another run uses {self.path}", f"`pd-launch stop --run-dir {self.path}`, or choose another --run-dir"
            ) from None

    def release(self) -> None:
        self._lock.release()

    @property
    def is_alive(self) -> bool:
        if not (self.path / _LOCK).exists():
            return False
        try:
            with FileLock(self.path / _LOCK, timeout=0):
                return False
        except Timeout:
            return True

    def write(self, state: RunState) -> None:
        """Whole or not at all, and for this user only."""
        unfinished = self.path / f"{_STATE}.unfinished"
        unfinished.touch(mode=0o600)
        unfinished.write_text(state.model_dump_json(indent=1))
        unfinished.rename(self.path / _STATE)

    def read(self) -> RunState | None:
        """None when there is none, or an older version's."""
        with suppress(OSError, ValidationError):
            return RunState.model_validate_json((self.path / _STATE).read_text())
        return None

    def clear(self) -> None:
        """What an earlier run in the same folder wrote would be taken for this one's."""
        for log in (*self.path.glob("*.log"), *self.path.glob("*.log.*")):
            if log.name != logs.OF_THE_LAUNCHER:
                log.unlink()
        (self.path / _STATE).unlink(missing_ok=True)


def folder() -> Path:
    """Where runs are kept that were given no folder of their own."""
    return platformdirs.user_state_path(APPLICATION) / "runs"


def known() -> list[RunFolder]:
    """Newest last."""
    found = [path for path in folder().glob("*") if (path / _STATE).exists()]
    return [RunFolder(path) for path in sorted(found, key=lambda path: (path / _STATE).stat().st_mtime)]


def choose(run_dir: Path | None, *, alive: bool = False) -> RunFolder:
    """The run that is meant: the one named, or the one that runs, or (unless it must be alive) the last one.

    Raises ConfigError.
    """
    if run_dir is not None:
        run = RunFolder(run_dir.expanduser().absolute())
        if run.read() is None or (alive and not run.is_alive):
            raise ConfigError(f"no run {'is alive ' if alive else ''}in {run.path}")
        return run
    living = [run for run in known() if run.is_alive]
    if len(living) > 1:
        listed = "\n".join(f"  --run-dir {run.path}" for run in living)
        raise ConfigError(f"{len(living)} runs are alive; say which:\n{listed}")
    found = living or ([] if alive else known()[-1:])
    if not found:
        raise ConfigError(
            f"no run {'is alive' if alive else 'is known'} in {folder()}", "Name another's with --run-dir"
        )
    return found[0]


def left_behind(state: RunState) -> list[psutil.Process]:
    """Processes of a run whose launcher has gone, by ownership: the run's tag, or the session of one of its children.

    A session's number may be another's by now: only processes as old as the run are taken.
    """
    sessions = {child.pid for child in state.children if child.pid is not None}
    return [
        one
        for one in process.members(state.id, sessions)
        if state.began - _TAKES_S <= one.create_time() <= state.written + _TAKES_S or _has_tag(one, state.id)
    ]


def _has_tag(one: psutil.Process, run_id: str) -> bool:
    with suppress(psutil.Error, OSError):
        return one.environ().get(process.RUN_TAG) == run_id
    return False


def remains() -> Iterator[tuple[RunFolder, RunState, list[psutil.Process]]]:
    """Runs that are over and still have processes."""
    for run in known():
        state = run.read()
        if state is not None and state.launcher != os.getpid() and not run.is_alive:
            left = left_behind(state)
            if left:
                yield run, state, left
