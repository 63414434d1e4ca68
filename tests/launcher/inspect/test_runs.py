"""A run's folder: whose it is, what an earlier run left in it, locks."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher.errors import ConfigError
from launcher.hosts.local.members import RUN_TAG
from launcher.inspect.runs import ChildState, RunFolder, RunState, left_behind, this_machine


def earlier_run(folder: Path, began: float = 1_796_119_202.0, pid: int | None = None, since: float = 0) -> None:
    """What a run that is over has left in its folder."""
    log = folder / "decode-0.log"
    child = ChildState(
        name="decode-0", role="decode", state="stopped", pid=pid, since=since, restarts=0, url=None, ports=(), log=log
    )
    state = RunState(
        id=f"run of {folder}", machine=this_machine(), launcher=1, phase="ready", engine="vllm",
        connector="MooncakeConnector", model="m", proxy_url="http://127.0.0.1:1", temporary=folder,
        control=folder / "c", began=began, written=began, stops_within_s=1, children=(child,),
    )  # fmt: skip
    RunFolder(folder).write(state)
    log.write_text(f"of the run that began at {began}")
    (folder / "decode-0.log.1").write_text("older")
    (folder / "lock.json").write_text("{}")


def test_what_an_earlier_run_left_is_kept_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """A crash's logs are often read only after something has started the run again."""
    earlier_run(tmp_path)
    (tmp_path / "mine.txt").write_text("not the launcher's")
    RunFolder(tmp_path).set_aside()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "previous"]
    (kept,) = (tmp_path / "previous").iterdir()
    assert sorted(path.name for path in kept.iterdir()) == ["decode-0.log", "decode-0.log.1", "lock.json", "state.json"]


def test_logs_of_nodes_that_came_and_went_are_kept_too(tmp_path: Path) -> None:
    earlier_run(tmp_path)
    for name in ("decode-7.log", "proxy.log", "download.log", "launcher.log.2"):
        (tmp_path / name).write_text("")
    (tmp_path / "mine.log").write_text("not the launcher's")
    RunFolder(tmp_path).set_aside()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.log", "previous"]


def test_what_a_run_started_after_it_last_wrote_is_its_own(tmp_path: Path) -> None:
    """Its disk was full, say."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as left:
        began = psutil.Process(left.pid).create_time()
        earlier_run(tmp_path, began=began - 1, pid=left.pid, since=began)
        state = RunFolder(tmp_path).read()
        assert state is not None
        assert [one.pid for one in left_behind(state)] == [left.pid]
        an_hour_before = state.model_copy(update={"written": began - 3600})
        assert left_behind(an_hour_before) == []
        left.communicate(b"\n")


def test_of_earlier_runs_the_last_few_are_kept(tmp_path: Path) -> None:
    for number in range(8):
        earlier_run(tmp_path, began=1_796_000_000.0 + 1000 * number)
        RunFolder(tmp_path).set_aside()
    kept = sorted((tmp_path / "previous").iterdir())
    assert len(kept) == 5
    assert (kept[-1] / "decode-0.log").read_text().endswith("1796007000.0")


def test_a_folder_whose_processes_still_live_is_not_used_again(tmp_path: Path) -> None:
    """Its state is the only record of them."""
    env = {**os.environ, RUN_TAG: f"run of {tmp_path}"}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=env) as left:
        earlier_run(tmp_path, pid=left.pid)
        with pytest.raises(ConfigError, match=f"still live: {left.pid}") as error:
            RunFolder(tmp_path).set_aside()
        assert "clean --yes" in error.value.hint
        assert (tmp_path / "state.json").exists()
        left.communicate(b"\n")
    RunFolder(tmp_path).set_aside()
    assert not (tmp_path / "state.json").exists()


def test_one_who_only_looks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = RunFolder(tmp_path)
    folder.claim()
    folder.release()
    looking = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN))
    folder.claim()
    folder.release()
    os.close(looking)


def test_a_file_system_without_locks_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ConfigError, match="has no locks: No locks available") as error:
        RunFolder(tmp_path).claim()
    assert "--run-dir" in error.value.hint
    assert not RunFolder(tmp_path).is_alive


def test_another_run_in_the_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    first = RunFolder(tmp_path)
    first.claim()
    assert first.is_alive
    with pytest.raises(ConfigError, match="another run uses"):
        RunFolder(tmp_path).claim()
    first.release()
