"""Busy ports, on real sockets."""

import os
import socket

import pytest

from launcher.plan import Port
from launcher.ports import busy_ports
from tests.processes import free_port


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
