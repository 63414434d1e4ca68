"""Which ports each node gets: from the ranges, in order, passing over what is taken."""

from collections.abc import Iterator, Mapping
from typing import Literal

from engines.base import NodeRole, Parallel, Role
from engines.connectors.names import CONNECTORS
from engines.known import ENGINES

from ..errors import ConfigError, PortBusyError
from .config import LaunchConfig, PortRange, flag_of
from .devices import parallel_of, shares_of
from .facts import Frozen, HostFacts

_MOONCAKE_REFUSES = ((0, 1023), (32768, 60999))
"""A transfer range with an end in here is ignored by Mooncake, silently (config.cpp, ValidatePortRange)."""

_STORE_CLIENT_PORTS = 32
"""A node's: it draws at random, 20 times for each device."""
_SPARE_PORTS = 2
"""What draws ports at random needs a few more than it takes, or it may draw in vain."""
ANY = "0.0.0.0"  # noqa: S104  bound by engines whatever they are told
Purpose = Literal["api", "bootstrap", "transfer", "store", "store client", "proxy", "admin"]


class Port(Frozen):
    """A port, or a slice of them, that a child will listen on."""

    purpose: Purpose
    first: int
    last: int
    bind: str
    """The address the child will bind, which is the one to check."""
    needed: int = 1
    """How many of them must be free: a child draws from a slice, and takes its only port."""

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    @property
    def numbers(self) -> range:
        return range(self.first, self.last + 1)


class Seat(Frozen):
    """A node's share of everything that is handed out in order."""

    name: str
    role: NodeRole
    http_port: int
    bootstrap_port: int | None
    transfer_ports: tuple[int, int]
    store_client_ports: tuple[int, int] | None
    """With a store."""
    devices: tuple[str, ...]
    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def parallel(self) -> Parallel:
        return Parallel(self.tensor, self.pipeline, self.data)


class Room:
    """Gives out the ports of each range in order, passing over those that are taken."""

    def __init__(self, config: LaunchConfig, facts: HostFacts) -> None:
        self._config = config
        self._taken = facts.taken
        self._next: dict[str, int] = {}
        self.passed_over: list[str] = []

    def take(self, name: str, size: int = 1, needed: int | None = None) -> int:
        """The first of `size` ports in a row, of which `needed` are free (all, when not given)."""
        ports: PortRange = getattr(self._config, name)
        passed: list[str] = []
        first = self._next.get(name, ports.first)
        while first + size - 1 <= ports.last:
            self._next[name] = first + size
            busy = [number for number in range(first, first + size) if number in self._taken]
            if size - len(busy) >= (size if needed is None else needed):
                self.passed_over += passed
                return first
            which = f"port {first}" if size == 1 else f"ports {first}-{first + size - 1}"
            passed.append(f"{flag_of(name)}: {which} passed over, {busy[0]} is taken by {self._taken[busy[0]]}")
            first += size
        raise PortBusyError(
            "\n".join((*passed, *self.passed_over, f"no free port is left in {flag_of(name)} {ports}")),
            f"End what holds them, or choose another range with {flag_of(name)}",
        )


def seats_of(config: LaunchConfig, facts: HostFacts, room: Room) -> Iterator[Seat]:
    """Prefill nodes first, each range from its first port: on a quiet host a configuration is always the same plan."""
    shares = shares_of(config, facts)
    seats = [(role, number, devices) for role in NodeRole for number, devices in enumerate(shares[role])]
    slices = [config.transfer_ports_per_node * _parallel(config, role, own).workers for role, _, own in seats]
    _fits(config, "http_ports", config.http_ports, len(seats))
    _fits(config, "bootstrap_ports", config.bootstrap_ports, config.prefill + config.both)
    _fits(config, "transfer_ports", config.transfer_ports, sum(slices))
    if has_store(config):
        _fits(config, "store_ports", config.store_ports, 2)
        _fits(config, "store_client_ports", config.store_client_ports, len(seats) * _STORE_CLIENT_PORTS)
    for role, number, devices in seats:
        yield seat_for(config, room, f"{role}-{number}", role, devices)


def seat_for(config: LaunchConfig, room: Room, name: str, role: NodeRole, devices: tuple[str, ...]) -> Seat:
    """Raises PortBusyError."""
    parallel = _parallel(config, role, devices)
    slice_size = config.transfer_ports_per_node * parallel.workers
    transfer = room.take("transfer_ports", slice_size, transfer_ports_drawn(config, parallel.workers))
    clients = store_client_ports_drawn(parallel.workers)
    client = room.take("store_client_ports", _STORE_CLIENT_PORTS, clients) if has_store(config) else None
    has_bootstrap = role.does(Role.PREFILL) and CONNECTORS[config.connector].has_bootstrap
    return Seat(
        name=name,
        role=role,
        http_port=room.take("http_ports"),
        bootstrap_port=room.take("bootstrap_ports") if has_bootstrap else None,
        transfer_ports=(transfer, transfer + slice_size - 1),
        store_client_ports=(client, client + _STORE_CLIENT_PORTS - 1) if client is not None else None,
        devices=devices,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=parallel.data,
    )


def _parallel(config: LaunchConfig, role: NodeRole, devices: tuple[str, ...]) -> Parallel:
    return parallel_of(config, role, len(devices) or None)


def transfer_ports_drawn(config: LaunchConfig, workers: int) -> int:
    """How many ports of its slice must be free for a node."""
    drawn = ENGINES[config.engine].transfer_ports(CONNECTORS[config.connector], workers)
    return drawn + _SPARE_PORTS if drawn else 0


def store_client_ports_drawn(workers: int) -> int:
    return workers + _SPARE_PORTS


def ranges_of(config: LaunchConfig, addresses: Mapping[str, str]) -> tuple[Port, ...]:
    """All ports that a plan may have, with the addresses that would be bound; those of names are given."""
    host = addresses.get(config.host) or config.host
    found = [
        _port("api", config.http_ports, host),
        _port("bootstrap", config.bootstrap_ports, ANY),
        _port("admin", config.admin_ports, admin_host(config)),
    ]
    if transfer_ports_drawn(config, 1):
        found.append(_port("transfer", config.transfer_ports, ANY))
    if has_store(config):
        found += [
            _port("store", config.store_ports, ANY),
            _port("store client", config.store_client_ports, ANY),
        ]
    proxy = PortRange(first=config.proxy_port, last=config.proxy_port)
    return (*found, _port("proxy", proxy, addresses.get(config.proxy_host) or config.proxy_host))


def _port(purpose: Purpose, ports: PortRange, bind: str) -> Port:
    return Port(purpose=purpose, first=ports.first, last=ports.last, bind=bind)


def admin_host(config: LaunchConfig) -> str:
    """What the proxy's admin listener binds."""
    return config.of_the_proxy("--admin-host", "127.0.0.1")


def has_store(config: LaunchConfig) -> bool:
    """The simulator needs none: it computes what a store does not give it."""
    return CONNECTORS[config.connector].needs_store and not ENGINES[config.engine].is_simulated


def check_ranges(config: LaunchConfig) -> None:
    """Raises ConfigError."""
    proxy = PortRange(first=config.proxy_port, last=config.proxy_port)
    purposes = ["http_ports", "bootstrap_ports", "admin_ports"]
    purposes += ["transfer_ports"] if transfer_ports_drawn(config, 1) else []
    purposes += ["store_ports", "store_client_ports"] if has_store(config) else []
    ranges = {name: getattr(config, name) for name in purposes}
    ranges["proxy_port"] = proxy
    names = list(ranges)
    for position, one in enumerate(names):
        for other in names[position + 1 :]:
            if ranges[one].overlaps(ranges[other]):
                raise ConfigError(
                    f"{flag_of(one)} {ranges[one]} and {flag_of(other)} {ranges[other]} overlap",
                    "Give every purpose a range of its own",
                )
    if drawn := transfer_ports_drawn(config, 1):
        _check_transfer_range(config.transfer_ports)
        if config.transfer_ports_per_node < drawn:
            raise ConfigError(
                f"--transfer-ports-per-node {config.transfer_ports_per_node}: the {config.connector} needs {drawn}"
            )


def _check_transfer_range(ports: PortRange) -> None:
    for first, last in _MOONCAKE_REFUSES:
        if ports.overlaps(PortRange(first=max(1, first), last=last)):
            raise ConfigError(
                f"--transfer-ports {ports} reaches into {first}-{last}, which Mooncake does not take",
                "It would use 15000-17000 instead, without a word; choose from 1024-32767 or 61000-65535",
            )


def _fits(config: LaunchConfig, name: str, ports: PortRange, needed: int) -> None:
    if len(ports) < needed:
        raise ConfigError(
            f"{flag_of(name)} {ports} has {len(ports)} ports, {config.nodes_in_words} need {needed}",
            f"For example {flag_of(name)} {ports.first}-{ports.first + needed - 1}",
        )
