"""Children: their log, their end, and what they leave behind."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from launcher.errors import LauncherError
from launcher.hosts.host import exit_in_words
from launcher.hosts.local import members
from launcher.hosts.local.process import Child
from launcher.plan.plan import Process

OBEYS = "import time; print('up', flush=True); time.sleep(600)"
IGNORES = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
TREE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
print('up', child.pid, flush=True)
time.sleep(600)
"""
MAPS = """
import time
import mmap, os
from multiprocessing import shared_memory, resource_tracker
memory = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(memory._name, 'shared_memory')
mapped = mmap.mmap(os.open('FOREIGN', os.O_RDWR), 1)
print('up', memory.name, flush=True)
time.sleep(600)
"""

SEMAPHORE = """
import multiprocessing, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
kept = multiprocessing.get_context('spawn').Semaphore()
print('up', kept._semlock.name, flush=True)
time.sleep(600)
"""

Result = TypeVar("Result")


@asynccontextmanager
async def child(folder: Path, program: str, **environment: str) -> AsyncIterator[Child]:
    spec = Process(
        name="c", kind="service", command=(sys.executable, "-c", program), environment=environment,
        inherited={"PATH": os.environ["PATH"], "INHERITED": "2"}, ports=(), log=folder / "c.log",
    )  # fmt: skip
    started = await Child.start(spec, "run-1", folder)
    try:
        yield started
    finally:
        started.kill()
        await started.ended()


async def said(child: Child, word: str = "up") -> list[str]:
    """The words of the line that begins with `word`, once it is in the log."""
    while True:
        for line in child.spec.log.read_text().splitlines():
            if line.startswith(word):
                return line.split()
        await asyncio.sleep(0.02)


def run(folder: Path, program: str, act: Callable[[Child], Awaitable[Result]]) -> Result:
    async def main() -> Result:
        async with child(folder, program) as started:
            return await act(started)

    return asyncio.run(main())


def test_a_childs_output_is_in_its_log_from_the_first_byte(tmp_path: Path) -> None:
    async def act(started: Child) -> int:
        return await started.ended()

    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert run(tmp_path, program, act) == 3
    assert set((tmp_path / "c.log").read_text().split()) == {"out", "err"}


def test_a_child_gets_the_variables_of_its_plan_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNWANTED", "1")
    program = "import os; print('up', os.environ.get('UNWANTED'), os.environ['INHERITED'], os.environ['PD_LAUNCH_ID'])"
    assert run(tmp_path, program, said) == ["up", "None", "2", "run-1"]


def test_a_command_that_does_not_exist_is_in_the_log(tmp_path: Path) -> None:
    async def main() -> int:
        spec = Process(
            name="c", kind="service", command=("/no/such/program",), environment={}, ports=(), log=tmp_path / "c.log"
        )
        return await (await Child.start(spec, "run-1", tmp_path)).ended()

    assert asyncio.run(main()) == 1
    assert "cannot start /no/such/program: No such file" in (tmp_path / "c.log").read_text()


@pytest.mark.parametrize(("program", "code"), [(OBEYS, -15), (IGNORES, -9)])
def test_stop_asks_first_and_kills_then(tmp_path: Path, program: str, code: int) -> None:
    async def act(started: Child) -> int | None:
        await said(started)
        await started.stop(timeout_s=0.5)
        return started.exit_code

    assert run(tmp_path, program, act) == code


def test_stop_takes_the_whole_tree(tmp_path: Path) -> None:
    async def act(started: Child) -> int:
        grandchild = int((await said(started))[1])
        await started.stop(timeout_s=0.5)
        return grandchild

    grandchild = run(tmp_path, TREE, act)
    assert not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_semaphore_that_only_pythons_resource_tracker_knows_of_goes_with_a_killed_tree(
    tmp_path: Path, is_stopped: bool
) -> None:
    async def act(started: Child) -> Path:
        file = Path("/dev/shm") / f"sem.{(await said(started))[1].removeprefix('/')}"
        assert file.exists()
        if is_stopped:
            os.killpg(started.pid, signal.SIGSTOP)
        await started.stop(timeout_s=0.2)
        assert started.is_gone
        return file

    assert not run(tmp_path, SEMAPHORE, act).exists()


def test_what_is_left_of_a_run_is_found_by_session_and_by_tag(tmp_path: Path) -> None:
    async def act(started: Child) -> tuple[set[int], set[int], set[int]]:
        grandchild = int((await said(started))[1])
        expected = {started.pid, grandchild}
        by_tag = {found.pid for found in members.members("run-1", ())}
        by_session = {found.pid for found in members.members("another", {started.pid})}
        return expected, by_tag, by_session

    expected, by_tag, by_session = run(tmp_path, TREE, act)
    assert by_tag == by_session == expected


def test_shared_memory_of_a_killed_child_is_removed_and_nothing_elses(tmp_path: Path) -> None:
    foreign = Path("/dev/shm") / f"pd-launch-test-{os.getpid()}"  # mapped too, as a model that lies there is
    foreign.write_bytes(b"x")

    async def act(started: Child) -> tuple[Path, list[Path]]:
        file = Path("/dev/shm") / (await said(started))[1]
        files = members.shared_memory(members.members("run-1", {started.pid}))
        assert members.remove_unmapped(files) == []  # still in use
        started.kill()
        await started.ended()
        assert file.exists()
        return file, members.remove_unmapped(files)

    try:
        file, removed = run(tmp_path, MAPS.replace("FOREIGN", str(foreign)), act)
        assert removed == [file]
        assert foreign.exists()
    finally:
        foreign.unlink()


def test_a_child_does_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    """Kill -9 leaves the launcher no time to stop anything; the kernel tells the child."""
    program = f"""
import asyncio, pathlib
from launcher.plan.plan import Process
from launcher.hosts.local.process import Child
async def main():
    folder = pathlib.Path({str(tmp_path)!r})
    command = ({sys.executable!r}, '-c', {OBEYS!r})
    spec = Process(name='c', kind='service', command=command, environment={{}}, ports=(), log=folder / 'c.log')
    child = await Child.start(spec, 'run-1', folder)
    while not spec.log.read_text():
        await asyncio.sleep(0.02)
    print(child.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""

    async def main() -> int:
        launcher = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-c", program, stdout=asyncio.subprocess.PIPE
        )
        assert launcher.stdout is not None
        pid = int(await launcher.stdout.readline())
        assert psutil.pid_exists(pid)
        launcher.kill()
        await launcher.wait()
        return pid

    pid = asyncio.run(main())
    gone, _ = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=30)
    assert gone or not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    ("code", "words"), [(0, "exit code 0"), (3, "exit code 3"), (-9, "killed by SIGKILL"), (-60, "killed by signal 60")]
)
def test_an_exit_is_said_in_words(code: int, words: str) -> None:
    assert exit_in_words(code) == words


def test_a_log_is_for_its_user_only_and_no_link_is_followed(tmp_path: Path) -> None:
    async def story() -> None:
        async with child(tmp_path, OBEYS):
            pass
        assert (tmp_path / "c.log").stat().st_mode & 0o777 == 0o600
        (tmp_path / "c.log").unlink()
        (tmp_path / "c.log").symlink_to(tmp_path / "victim")
        with pytest.raises(LauncherError, match="cannot start c"):
            async with child(tmp_path, OBEYS):
                pass
        assert not (tmp_path / "victim").exists()

    asyncio.run(story())
