"""What is done to a run from outside: stop it, have its launcher change it, clean up behind one that was killed."""

import shutil
import signal
import time
from contextlib import suppress
from typing import Any

import psutil

from . import control, process, runs
from .control import Say
from .errors import LauncherError
from .runs import RunFolder

_LOOK_EVERY_S = 0.2


def tell(run: RunFolder, command: dict[str, Any], say: Say) -> None:
    """Have the run's launcher do it. Raises LauncherError."""
    state = run.read()
    if state is None or not state.control.exists():
        raise LauncherError(f"the run in {run.path} takes no commands yet", "It does when it is ready")
    control.ask(state.control, command, say)


def stop(run: RunFolder, say: Say) -> None:
    """As Ctrl-C at its launcher would, and wait until it is over. Raises LauncherError when it does not end."""
    state = run.read()
    if state is None:
        raise LauncherError(f"the run in {run.path} has just begun", "Try again in a moment")
    if state.machine != runs.this_machine():
        raise LauncherError(f"the run in {run.path} is on another machine, or in another container", "Stop it there")
    say(f"Stopping the run in {run.path} (pid {state.launcher}).")
    with suppress(psutil.NoSuchProcess):  # it has just ended
        psutil.Process(state.launcher).send_signal(signal.SIGTERM)
    deadline = time.monotonic() + state.stops_within_s
    while run.is_alive:
        if time.monotonic() > deadline:
            raise LauncherError(
                f"pid {state.launcher} did not end in {state.stops_within_s:g} s", "kill -9 it, then pd-launch clean"
            )
        time.sleep(_LOOK_EVERY_S)
    say("Stopped.")


def clean(say: Say, *, do_it: bool) -> None:
    """Of runs whose launcher is gone: processes, shared memory, temporary folders; by ownership, never by name."""
    found = list(runs.remains())
    if not found:
        say("Nothing is left behind.")
    for run, state, left, files in found:
        say(f"{run.path}, whose launcher (pid {state.launcher}) has gone:")
        for what in (*map(_described, left), *map(str, files)):
            say(f"  {what}")
        if do_it:
            shared = process.shared_memory(left).union(*(child.shared_memory for child in state.children))
            process.kill(left)
            process.remove_unmapped(shared)
            shutil.rmtree(state.temporary, ignore_errors=True)
            say("  gone")
    if found and not do_it:
        say("`pd-launch clean --yes` takes them away.")


def _described(one: psutil.Process) -> str:
    try:
        return f"pid {one.pid} {one.name()} of user {one.username()}"
    except psutil.Error:
        return f"pid {one.pid}"
