"""Whose processes are these, and whose shared memory: by ownership, never by a name.

A vLLM node is a tree (API server, engine core, workers). Killing only its root leaves the rest with the ports, the
memory and the GPU. So a run's processes are found by their session, which each node's tree shares, and by a tag in
their environment, for whatever made a session of its own. (vLLM's children rename themselves, which overwrites their
environment in /proc; the tag alone would miss them.)
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

RUN_TAG = "PD_LAUNCH_ID"
NODE_TAG = "PD_LAUNCH_NODE"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  not ours to name
_MADE_BY_AN_ENGINE = re.compile(r"(psm_\w+|sem\.mp-\w+|torch_\d+_\w+|pymp-\w+|nccl-\w+)\Z")
"""By Python's multiprocessing, torch or NCCL. A model that lies in /dev/shm is mapped too, and is not ours."""


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


def has_tag(process: psutil.Process, run_id: str) -> bool:
    with suppress(psutil.Error, OSError):
        return process.environ().get(RUN_TAG) == run_id
    return False


def of_sessions(sessions: Collection[int]) -> list[psutil.Process]:
    """The processes of nodes: the tree of each shares the session that it was started in."""
    found = []
    for pid in psutil.pids():
        with suppress(psutil.Error, OSError):
            if os.getsid(pid) in sessions:
                found.append(psutil.Process(pid))
    return found


def of_group(group: int) -> Iterator[psutil.Process]:
    """Zombies do not count: where nobody reaps orphans (a container without init) they stay for ever."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:  # the usual case, without a look at every process of the machine
        return
    except PermissionError:
        pass
    for pid in psutil.pids():
        with suppress(psutil.Error, OSError):
            if os.getpgid(pid) == group and (process := psutil.Process(pid)).status() != psutil.STATUS_ZOMBIE:
                yield process


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
    for pid in psutil.pids():
        with suppress(psutil.Error, OSError):
            existing -= _mapped(pid)
    for file in existing:
        file.unlink(missing_ok=True)
    return sorted(existing)


def _mapped(pid: int) -> set[Path]:
    maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    paths = (Path(line.split(maxsplit=5)[-1].strip()) for line in maps.splitlines() if f"{_SHARED_MEMORY}/" in line)
    return {path for path in paths if path.parent == _SHARED_MEMORY and _MADE_BY_AN_ENGINE.match(path.name)}
