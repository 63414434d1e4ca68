"""Ports and GPUs that one launcher keeps from the others."""

import os
import subprocess
import sys

import pytest

from launcher.errors import PortBusyError
from launcher.hosts.local.locks import Locks, locked_gpus
from launcher.hosts.local.ports import taken
from launcher.plan.seats import Port
from tests.processes import ROOT, free_port


def api(port: int) -> Port:
    return Port(purpose="api", first=port, last=port, bind="127.0.0.1")


def transfer(first: int, last: int) -> Port:
    return Port(purpose="transfer", first=first, last=last, bind="0.0.0.0")


def test_what_one_launcher_keeps_another_cannot_take() -> None:
    port = free_port()
    first, second = Locks(), Locks()
    first.take([api(port), transfer(port + 10, port + 25)])
    for wanted in (api(port), transfer(port + 25, port + 40), api(port + 12)):
        with pytest.raises(PortBusyError, match=f"kept by another pd-launch, pid {os.getpid()}"):
            second.take([api(port + 100), wanted])
    assert taken([api(port), transfer(port + 24, port + 27)])[0] == dict.fromkeys(
        (port, port + 24, port + 25), "another pd-launch"
    )
    first.give_back([api(port)])
    second.take([api(port), api(port + 100)])  # all or none: the refused attempts kept nothing
    first.give_back([transfer(port + 10, port + 25)])
    second.give_back([api(port), api(port + 100)])


def test_a_gpu_is_kept_too_and_two_nodes_of_one_run_may_share_it() -> None:
    gpu = f"GPU-of-test-{os.getpid()}"
    first, second = Locks(), Locks()
    first.take([], [gpu])
    first.take([], [gpu])
    assert locked_gpus()[gpu] == f"another pd-launch, pid {os.getpid()}"
    with pytest.raises(PortBusyError, match=f"GPU {gpu}: kept by another pd-launch"):
        second.take([api(free_port())], [gpu])
    first.give_back([], [gpu])
    second.take([], [gpu])
    second.give_back([], [gpu])
    assert gpu not in locked_gpus()


def test_a_lock_goes_with_its_process() -> None:
    port = free_port()
    program = f"""
from launcher.hosts.local.locks import Locks
from launcher.plan.seats import Port
locks = Locks()
locks.take([Port(purpose="api", first={port}, last={port}, bind="127.0.0.1")])
print("kept", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as keeper:
        assert keeper.stdout is not None
        keeper.stdout.readline()
        with pytest.raises(PortBusyError, match=f"pid {keeper.pid}"):
            Locks().take([api(port)])
        keeper.kill()
    locks = Locks()
    locks.take([api(port)])
    locks.give_back([api(port)])
