"""What is done to a run from outside: stop it, have its launcher change it, clean up behind one that was killed."""

import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psutil

from ..errors import LauncherError
from ..events.events import Say
from ..hosts.local import members
from ..inspect import runs
from ..inspect.runs import RunFolder, RunState
from ..run import control

_LOOK_EVERY_S = 0.2


def tell(run: RunFolder, command: dict[str, Any], say: Say) -> None:
    """Have the run's launcher do it. Raises LauncherError."""
    state = run.read()
    if state is None or not state.control.exists():
        raise LauncherError(f"the run in {run.path} takes no commands yet", "It does when it is ready")
    control.ask(state.control, command, say)


def stop(running: Sequence[RunFolder], say: Say) -> None:
    """As Ctrl-C at their launchers would, all at once, and wait until they are over. Raises LauncherError else.

    A run that is being stopped is only waited for: asked again, it would kill.
    """
    asked = [(run, _asked_to_stop(run, say)) for run in running]
    began = time.monotonic()
    left = []
    for run, state in asked:
        while run.is_alive and time.monotonic() - began < state.stops_within_s:
            time.sleep(_LOOK_EVERY_S)
        if run.is_alive:
            left.append(f"pid {state.launcher} did not end in {state.stops_within_s:g} s")
    if left:
        raise LauncherError("; ".join(left), "kill -9 it, then pd-launch clean")
    say("Stopped.")


def _asked_to_stop(run: RunFolder, say: Say) -> RunState:
    state = run.read()
    if state is None:
        raise LauncherError(f"the run in {run.path} has just begun", "Try again in a moment")
    if state.phase == "stopping":
        say(f"The run in {run.path} (pid {state.launcher}) is being stopped already.")
        return state
    say(f"Stopping the run in {run.path} (pid {state.launcher}).")
    with suppress(psutil.NoSuchProcess):  # it has just ended
        psutil.Process(state.launcher).send_signal(signal.SIGTERM)
    return state


def say_nothing_runs(say: Say) -> None:
    """... and, where a launcher was killed, that what it started may still do."""
    left = sum(len(processes) for _, _, processes, _ in runs.remains())
    if left:
        say(f"No launcher is running, but {left} processes of one that was killed are: `pd-launch clean`.")
    else:
        say("Nothing is running.")


def clean(say: Say, *, do_it: bool) -> None:
    """Of runs whose launcher is gone: processes, shared memory, temporary folders; by ownership, never by name."""
    found = list(runs.remains())
    if not found:
        say("Nothing is left behind.")
    for run, state, left, files in found:
        say(f"{run.path}, whose launcher (pid {state.launcher}) is gone:")
        for what in (*map(_described, left), *map(str, files)):
            say(f"  {what}")
        if do_it:
            shared = members.shared_memory(left).union(*(child.shared_memory for child in state.children))
            members.kill(left)
            members.remove_unmapped(shared)
            shutil.rmtree(state.temporary, ignore_errors=True)
            say("  removed")
    if found and not do_it:
        say("`pd-launch clean --yes` removes them.")


def _described(one: psutil.Process) -> str:
    try:
        return f"pid {one.pid} {one.name()} of user {one.username()}"
    except psutil.Error:
        return f"pid {one.pid}"
