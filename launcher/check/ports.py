"""Ports: is each of the plan free, and will it be."""

from collections.abc import Iterator

from ..errors import PortBusyError
from ..plan.config import LaunchConfig, flag_of
from ..plan.facts import HostFacts
from ..plan.plan import Plan
from ..plan.seats import Port
from .findings import Finding, error, warning

_FLAG_OF_PURPOSE = {
    "api": "http_ports",
    "bootstrap": "bootstrap_ports",
    "transfer": "transfer_ports",
    "store": "store_ports",
    "store client": "store_client_ports",
    "proxy": "proxy_port",
    "admin": "admin_ports",
}

_USED_BY_OTHERS = (
    (6379, 6379, "Ray's and Redis' default"),
    (8265, 8265, "Ray's dashboard"),
    (10002, 19999, "Ray's workers"),
    (15000, 17000, "the transfer engine of a vLLM that was given no range"),
    (29500, 29500, "torch's rendezvous"),
    (29550, 29550, "vLLM's data-parallel RPC"),
    (30000, 32767, "Kubernetes' NodePorts"),
)


def check(config: LaunchConfig, plan: Plan, facts: HostFacts) -> tuple[str, Iterator[Finding]] | None:
    del config
    single = [str(port) for port in plan.ports if port.first == port.last]
    return f"{', '.join(single)}, and the slices of {len(plan.nodes)} nodes", _found(plan, facts)


def _found(plan: Plan, facts: HostFacts) -> Iterator[Finding]:
    yield from _ephemeral(plan, facts)
    problems: list[str] = []
    flags: list[str] = []
    for process in plan.processes:
        for port in process.ports:
            if reason := facts.unusable.get(port.bind):
                yield error(f"{process.name}: {reason}", "", "Is it one of this host's?")
                continue
            busy = {number: facts.taken[number] for number in port.numbers if number in facts.taken}
            if len(port.numbers) - len(busy) < port.needed:
                problems.append(f"{process.name}: {_in_words(port, busy)}")
                flags.append(flag_of(_FLAG_OF_PURPOSE[port.purpose]))
            yield from _used_by_others(process.name, port)
    if problems:
        fix = f"End what holds it, or choose with {', '.join(dict.fromkeys(flags))}"
        yield Finding("error", "\n".join(problems), "", fix, PortBusyError.exit_code)


def _ephemeral(plan: Plan, facts: HostFacts) -> Iterator[Finding]:
    first, last = facts.ephemeral_ports

    def is_at_risk(number: int) -> bool:
        return first <= number <= last and not any(low <= number <= high for low, high in facts.reserved_ports)

    at_risk = [port for port in plan.ports if is_at_risk(port.first) or is_at_risk(port.last)]
    if at_risk:
        listed = ", ".join(f"{port.purpose} {port}" for port in at_risk[:3]) + (" ..." if len(at_risk) > 3 else "")
        yield warning(
            f"{listed}: in {first}-{last}, from which the kernel takes ports for outgoing connections",
            "Any program may take one at any moment",
            "Choose ports outside it, or reserve them: sysctl net.ipv4.ip_local_reserved_ports",
        )


def _used_by_others(name: str, port: Port) -> Iterator[Finding]:
    for first, last, whose in _USED_BY_OTHERS:
        if first <= port.last and port.first <= last:
            yield warning(
                f"{name}: {port.purpose} {port} is where {whose} may turn up",
                "Free now is not free later",
                f"Choose another range with {flag_of(_FLAG_OF_PURPOSE[port.purpose])}, if that runs here",
            )
            return


def _in_words(port: Port, busy: dict[int, str]) -> str:
    number, holder = next(iter(busy.items()))
    if port.first == port.last:
        return f"{port.purpose} port {port.first} on {port.bind} is taken by {holder}"
    return f"{len(busy)} of the {len(port.numbers)} {port.purpose} ports {port} are taken, {number} by {holder}"
