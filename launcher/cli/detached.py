"""`up --detach`: a launcher of its own, whose screen is its log; what it tells is shown until it is ready."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import yaml
from rich.console import Console

from .. import private
from ..errors import InterruptedStart, PreflightError
from ..hosts.local.host import LocalHost
from ..inspect import logs
from ..inspect.runs import RunFolder
from ..plan.config import LaunchConfig, variable_of
from ..plan.lockfile import LockFile

_LOOK_EVERY_S = 0.2
_STOP_S = 60
_STDIN = "/dev/stdin"
_STAMP = re.compile(r"(?m)^\d{4}-\d\d-\d\d ")


def up(config: LaunchConfig, lock: LockFile | None, console: Console) -> None:
    """Returns when the run is ready. Exits with the launcher's own code when it ends before that."""
    run_dir = _run_dir(config)
    folder = RunFolder(run_dir)
    folder.claim()  # a run in that folder would be said by the other launcher only
    folder.set_aside()
    screen = run_dir / logs.OF_THE_LAUNCHER
    private.write(screen, "")
    launcher = _started(folder, screen, config, lock)
    folder.release()  # the other launcher holds it
    try:
        _show_until_ready(launcher, folder, screen, console)
    except KeyboardInterrupt:
        _end(launcher, config.stop_timeout_s * 4 + _STOP_S)
        raise InterruptedStart("interrupted before everything was up") from None


def _started(folder: RunFolder, screen: Path, config: LaunchConfig, lock: LockFile | None) -> "subprocess.Popen[str]":
    """It gets the lock of the folder as it is, and the configuration over a pipe: `--env` may hold a secret."""
    told, flag = _told(config, lock)
    command = [sys.executable, "-P", "-m", "launcher.cli", "up", "--no-screen", flag, _STDIN]
    with screen.open("ab") as output:
        launcher = subprocess.Popen(
            [*command, "--run-dir", str(folder.path), "--claimed", str(folder.handle)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env=_without_settings(os.environ),
            pass_fds=[folder.handle],
            start_new_session=True,  # the terminal's end is not its end
        )
    assert launcher.stdin is not None  # noqa: S101  it was asked for
    with suppress(BrokenPipeError), launcher.stdin as pipe:
        pipe.write(told)
    return launcher


def _run_dir(config: LaunchConfig) -> Path:
    """Raises PreflightError."""
    facts = LocalHost().facts(config, engine=False)
    run_dir = (config.run_dir or facts.new_run_dir).expanduser().absolute()
    if facts.run_dir_problem:
        raise PreflightError(f"cannot make {run_dir} for the logs: {facts.run_dir_problem}", "Choose with --run-dir")
    return run_dir


def _told(config: LaunchConfig, lock: LockFile | None) -> tuple[str, str]:
    """(the same run as text, the flag that takes it)."""
    if lock is not None:
        return lock.model_copy(update={"config": config}).model_dump_json(indent=1), "--locked"
    return yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True, exclude={"run_dir"})), "--config"


def _without_settings(variables: Mapping[str, str]) -> dict[str, str]:
    """They are in the configuration already, unless a flag went before them."""
    settings = {variable_of(name) for name in LaunchConfig.model_fields}
    return {name: text for name, text in variables.items() if name not in settings}


def _show_until_ready(launcher: "subprocess.Popen[str]", folder: RunFolder, screen: Path, console: Console) -> None:
    with screen.open("rb") as output:
        while True:
            state = folder.read()
            is_ready = state is not None and state.launcher == launcher.pid and state.phase == "ready"
            code = launcher.poll()
            told = _STAMP.sub("", output.read().decode("utf-8", "replace"))
            console.out(told, end="", highlight=False)
            if code is not None:
                if state is None:
                    _forget(folder, screen)
                raise SystemExit(code if code >= 0 else 128 - code)
            if is_ready:
                console.print("It runs in the background: pd-launch status, logs, stop.", highlight=False)
                return
            time.sleep(_LOOK_EVERY_S)


def _forget(folder: RunFolder, screen: Path) -> None:
    """Nothing was started: what was said is on the screen."""
    screen.unlink(missing_ok=True)
    folder.remove_if_empty()


def _end(launcher: "subprocess.Popen[str]", within_s: float) -> None:
    """Ask it to end its run; asked again, it kills what is left of it."""
    launcher.terminate()
    for _ in range(2):
        try:
            launcher.wait(within_s)
        except subprocess.TimeoutExpired:
            return
        except KeyboardInterrupt:
            launcher.terminate()
        else:
            return
