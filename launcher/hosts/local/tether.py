"""Ties a child's life to the launcher's: `python tether.py PARENT_PID COMMAND...`.

Runs between fork and exec, as a program of its own, so that nothing has to happen in a forked copy of the launcher.
Should the launcher be killed outright, the kernel sends the child SIGTERM. It reaches the first process of a node;
vLLM's API server stops its engine core on it.
"""

import ctypes
import os
import resource
import signal
import sys
from contextlib import suppress

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, *command = sys.argv[1:]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        raise SystemExit("pd-launch has already gone")
    with suppress(OSError, ValueError):  # RDMA locks the whole KV cache in memory
        _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    try:
        os.execvp(command[0], command)  # noqa: S606  this is what it is for
    except OSError as exc:
        raise SystemExit(f"cannot start {command[0]}: {exc.strerror}") from exc


if __name__ == "__main__":
    main()
