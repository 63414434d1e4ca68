"""Busy ports, on real sockets."""

import json
import os
import socket
import subprocess
import sys

import pytest

from launcher.errors import PortBusyError
from launcher.hosts.local.ports import Hold, busy_ports, holder_of, taken
from launcher.plan.seats import Port
from tests.processes import ROOT, free_port, free_range


def api(port: int, bind: str = "127.0.0.1") -> Port:
    return Port(purpose="api", first=port, last=port, bind=bind)


def transfer(first: int, last: int) -> Port:
    return Port(purpose="transfer", first=first, last=last, bind="0.0.0.0")


def test_a_free_port_is_not_busy() -> None:
    assert busy_ports(api(free_port())) == []


@pytest.mark.parametrize("listens_on", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("will_bind", ["127.0.0.1", "0.0.0.0"])
def test_a_listener_is_found_and_named(listens_on: str, will_bind: str) -> None:
    port = free_port()
    with socket.create_server((listens_on, port)):
        (busy,) = busy_ports(api(port, will_bind))
    assert f"pid {os.getpid()}" in busy.holder
    assert "pytest" in busy.holder


def test_a_listener_on_ipv6_is_found_on_ipv6() -> None:
    port = free_port()
    with socket.create_server(("::1", port), family=socket.AF_INET6):
        assert busy_ports(api(port, "::1")) != []


def test_a_listener_of_another_address_family_does_not_count() -> None:
    port = free_port()
    with socket.create_server(("::1", port), family=socket.AF_INET6):
        assert busy_ports(api(port)) == []


def test_a_port_that_is_only_reserved_is_busy() -> None:
    port = free_port()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        (busy,) = busy_ports(api(port))
    assert "reserves it" in busy.holder


def test_a_port_in_time_wait_is_busy_for_the_transfer_engine_only() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(("127.0.0.1", port)) as client:
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first keeps the port in TIME_WAIT
        assert client.recv(1) == b""
    assert busy_ports(api(port)) == []
    (busy,) = busy_ports(transfer(port, port))
    assert "TIME_WAIT" in busy.holder


def test_of_a_slice_only_the_taken_ports_are_named() -> None:
    port = free_port()
    with socket.create_server(("0.0.0.0", port)):
        assert [busy.port for busy in busy_ports(transfer(port, port + 2))] == [port]


def test_of_single_ports_the_one_that_is_taken_is_named() -> None:
    port = free_port()
    assert holder_of([api(port), transfer(port + 1, port + 4)]) == ""
    with socket.create_server(("127.0.0.1", port)):
        assert holder_of([api(port)]).startswith(f"port {port} was taken by pid {os.getpid()}")


def test_an_address_that_is_not_this_hosts_is_a_fact_and_no_port_is_said_to_be_taken() -> None:
    busy, unusable = taken([api(free_port(), "192.0.2.1"), api(free_port())])
    assert busy == {}
    assert unusable == {"192.0.2.1": "cannot use address 192.0.2.1: Cannot assign requested address"}


def test_a_held_port_can_be_bound_by_its_child_and_by_nobody_who_does_not_share() -> None:
    port = free_port()
    hold = Hold([api(port), transfer(port + 1, port + 16)])
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", port))
    with socket.create_server(("127.0.0.1", port)):  # shares the address, as every server does
        with pytest.raises(PortBusyError, match=f"api port {port} on 127.0.0.1 is taken by pid {os.getpid()}"):
            Hold([api(port)])
        hold.release()
    assert busy_ports(api(port)) == []


RACER = """
import json, sys
from launcher.hosts.local.host import LocalHost
from launcher.hosts.reserve import reserve
from launcher.plan.config import load
config = load(json.loads(sys.argv[1]))
sys.stdin.readline()
reserved = reserve(config, LocalHost())
ports = [port for port in reserved.plan.ports if port.purpose != "proxy"]
print(json.dumps([number for port in ports for number in port.numbers]), flush=True)
sys.stdin.readline()
"""


def test_launchers_racing_for_one_range_never_get_the_same_port() -> None:
    """Twenty of them, five at once, as vLLM nodes: API, bootstrap, admin and transfer slices."""
    http, bootstrap, slices = free_range(20), free_range(10), free_range(16 * 20)
    base = {"model": "m", "http_ports": http, "bootstrap_ports": bootstrap, "transfer_ports": slices}
    base["admin_ports"] = free_range(10)
    for _ in range(4):
        racers = [
            subprocess.Popen(
                [sys.executable, "-c", RACER, json.dumps(base | {"proxy_port": free_port()})],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for _ in range(5)
        ]  # fmt: skip
        for racer in racers:
            _tell(racer)
        chosen = [json.loads(_line(racer)) for racer in racers]
        for racer in racers:
            racer.communicate("\n", timeout=60)
        every = [number for ports in chosen for number in ports]
        assert len(every) == len(set(every)) == 5 * (2 + 1 + 1 + 2 * 16)


def _tell(racer: "subprocess.Popen[str]") -> None:
    assert racer.stdin is not None
    racer.stdin.write("\n")
    racer.stdin.flush()


def _line(racer: "subprocess.Popen[str]") -> str:
    assert racer.stdout is not None
    return racer.stdout.readline()
