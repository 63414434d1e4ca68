"""`up --detach`: a launcher of its own, whose screen is a file; what it says is shown until it is ready."""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import yaml
from rich.console import Console

from . import facts, logs, private
from .config import LaunchConfig
from .errors import InterruptedStart, PreflightError
from .reserve import LockFile
from .runs import RunFolder

_LOOK_EVERY_S = 0.2
_STOP_S = 60


def up(config: LaunchConfig, lock: LockFile | None, console: Console) -> None:
    """Returns when the run is ready. Exits with the launcher's own code when it ends before that."""
    run_dir = (config.run_dir or facts.gather(config.device).new_run_dir).expanduser().absolute()
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise PreflightError(f"cannot make {run_dir} for the logs: {exc.strerror}", "Choose with --run-dir") from exc
    folder = RunFolder(run_dir)
    folder.claim()  # a run in that folder would be said by the other launcher only
    folder.set_aside()
    folder.release()
    screen = run_dir / logs.OF_THE_LAUNCHER
    with screen.open("wb") as output:
        launcher = subprocess.Popen(
            [sys.executable, "-P", "-m", "launcher.cli", "up", *_arguments(config, lock, run_dir)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's end is not its end
        )
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)  # who asks us to end means the run as well
    try:
        _show_until_ready(launcher, folder, screen, console)
    except KeyboardInterrupt:
        launcher.terminate()
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(config.stop_timeout_s * 4 + _STOP_S)
        raise InterruptedStart("interrupted before everything was up") from None
    finally:
        signal.signal(signal.SIGTERM, usual)


def _arguments(config: LaunchConfig, lock: LockFile | None, run_dir: Path) -> list[str]:
    """The same run, by a file that only this user can read: `--env` may hold a secret."""
    file = run_dir / ".detached"
    if lock is not None:
        private.write(file, lock.model_dump_json(indent=1))
        return ["--locked", str(file), "--run-dir", str(run_dir)]
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude={"run_dir"})
    private.write(file, yaml.safe_dump(settings))
    return ["--config", str(file), "--run-dir", str(run_dir)]


def _show_until_ready(launcher: "subprocess.Popen[bytes]", folder: RunFolder, screen: Path, console: Console) -> None:
    with screen.open("rb") as output:
        while True:
            state = folder.read()
            is_ready = state is not None and state.launcher == launcher.pid and state.phase == "ready"
            code = launcher.poll()
            console.out(output.read().decode("utf-8", "replace"), end="", highlight=False)
            if code is not None:
                raise SystemExit(code)
            if is_ready:
                console.print("It goes on without you: pd-launch status, logs, stop.", highlight=False)
                return
            time.sleep(_LOOK_EVERY_S)
