"""What will be started: a pure function from the configuration and facts about the host."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from engines import mooncake, mooncake_store, topology, vllm
from engines.base import Role
from engines.connectors import CONNECTORS, ConnectorName

from .config import TINY_MODEL, LaunchConfig, PortRange, flag_of
from .errors import ConfigError
from .facts import HostFacts

UNPINNED_PORTS = (
    "prefill nodes: one ephemeral port a device for the hand-off's side channel (ZMQ), dialled by decode nodes",
    "every node: about a dozen ephemeral ports a device for gloo and NCCL, between the node's own processes",
)
"""vLLM has no setting for these; a firewall between hosts must let the ephemeral range through, decode to prefill."""

_MOONCAKE_REFUSES = ((0, 1023), (32768, 60999))
"""A transfer range with an end in here is ignored by Mooncake, silently (config.cpp, ValidatePortRange)."""


_STORE_FILE = "mooncake.json"
_STORE_CLIENT_PORTS = 32
"""A node's: it draws at random, 20 times for each device."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class Port(_Model):
    """A port, or a slice of them, that a child will listen on."""

    purpose: Literal["api", "bootstrap", "transfer", "store", "store client", "proxy"]
    first: int
    last: int
    bind: str
    """The address the child will bind, which is the one to check."""

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


class Process(_Model):
    """One child."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    """Set for the child, on top of the launcher's own environment."""
    unset: tuple[str, ...] = ()
    ports: tuple[Port, ...]
    log: Path


class NodeProcess(Process):
    """A serving engine."""

    role: Role
    url: str
    bootstrap: str | None
    devices: tuple[str, ...] = ()


class Plan(_Model):
    """Everything that will be started: the nodes side by side, then the proxy."""

    engine: Literal["vllm", "sim"]
    connector: ConnectorName
    model: str
    served_model_name: str
    run_dir: Path
    temporary: Path
    """Folder of sockets and the like, removed at the end. Its name is short: a Unix socket's path is <= 107 bytes."""
    services: tuple[Process, ...]
    """What the nodes need before they start, and after they stop."""
    nodes: tuple[NodeProcess, ...]
    proxy: Process
    proxy_url: str
    files: dict[str, str]
    """Configuration files written into the run directory, by name."""
    unpinned_ports: tuple[str, ...] = UNPINNED_PORTS

    @property
    def topology_file(self) -> Path:
        return self.run_dir / "topology.json"

    @property
    def processes(self) -> tuple[Process, ...]:
        return (*self.services, *self.nodes, self.proxy)

    def topology(self) -> topology.Topology:
        nodes = (
            topology.Node(name=node.name, role=node.role, url=node.url, bootstrap=node.bootstrap) for node in self.nodes
        )
        return topology.Topology(connector=self.connector, nodes=tuple(nodes))

    def as_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2)


def make_plan(config: LaunchConfig, facts: HostFacts) -> Plan:
    """Raises ConfigError when the configuration cannot be carried out on any host, or not on this one."""
    _check_ranges(config, facts)
    run_dir = (config.run_dir or facts.new_run_dir).expanduser().absolute()
    temporary = facts.temporary / f"pdl-{run_dir.name[-24:]}"
    seats = list(_seats(config))
    nodes = tuple(_node(config, facts, seat, run_dir, temporary) for seat in seats)
    return Plan(
        engine=config.engine,
        connector=config.connector,
        services=tuple(_services(config, facts, run_dir)),
        files=_files(config, facts),
        model=_model_argument(config, facts),
        served_model_name=_served_name(config),
        run_dir=run_dir,
        temporary=temporary,
        nodes=nodes,
        proxy=_proxy(config, facts, run_dir),
        proxy_url=_url(config.proxy_host, config.proxy_port),
    )


@dataclass(frozen=True, slots=True)
class _Seat:
    """A node's share of everything that is handed out in order."""

    name: str
    role: Role
    http_port: int
    bootstrap_port: int | None
    transfer_ports: tuple[int, int]
    store_client_ports: tuple[int, int]
    devices: tuple[str, ...]


def _seats(config: LaunchConfig) -> Iterator[_Seat]:
    """Prefill nodes first, each range from its first port: the same configuration is always the same plan."""
    roles = [(Role.PREFILL, n) for n in range(config.prefill)] + [(Role.DECODE, n) for n in range(config.decode)]
    devices = _devices_a_node(config, len(roles))
    slice_size = config.transfer_ports_per_node * max(1, devices)
    _fits(config, "http_ports", config.http_ports, len(roles))
    _fits(config, "bootstrap_ports", config.bootstrap_ports, config.prefill)
    _fits(config, "transfer_ports", config.transfer_ports, len(roles) * slice_size)
    if _has_store(config):
        _fits(config, "store_client_ports", config.store_client_ports, len(roles) * _STORE_CLIENT_PORTS)
    has_bootstrap = CONNECTORS[config.connector].has_bootstrap
    for place, (role, number) in enumerate(roles):
        first = config.transfer_ports.first + place * slice_size
        client = config.store_client_ports.first + place * _STORE_CLIENT_PORTS
        yield _Seat(
            name=f"{role}-{number}",
            role=role,
            http_port=config.http_ports.first + place,
            bootstrap_port=config.bootstrap_ports.first + number if role is Role.PREFILL and has_bootstrap else None,
            transfer_ports=(first, first + slice_size - 1),
            store_client_ports=(client, client + _STORE_CLIENT_PORTS - 1),
            devices=config.devices[place * devices : (place + 1) * devices],
        )


def _node(config: LaunchConfig, facts: HostFacts, seat: _Seat, run_dir: Path, temporary: Path) -> NodeProcess:
    role_args = config.prefill_args if seat.role is Role.PREFILL else config.decode_args
    launch = vllm.Launch(
        role=seat.role,
        model=_model_argument(config, facts),
        served_model_name=_served_name(config),
        host=config.host,
        port=seat.http_port,
        device=config.device,
        protocol=_protocol(config, facts),
        transfer_ports=seat.transfer_ports,
        bootstrap_port=seat.bootstrap_port,
        transfer_timeout_s=config.transfer_timeout_s,
        store=vllm.Store(str(run_dir / _STORE_FILE), seat.store_client_ports) if _has_store(config) else None,
        max_model_len=config.max_model_len,
        devices=seat.devices,
        extra_args=(*config.args, *role_args),
    )
    own_folder = str(temporary / seat.name)
    environment = vllm.environment(launch) | {"TMPDIR": own_folder, "VLLM_RPC_BASE_PATH": own_folder}
    if config.device == "cpu" and config.engine == "vllm":
        environment["PYTHONPATH"] = str(facts.plugins)
    if config.model == TINY_MODEL:
        environment["HF_HUB_OFFLINE"] = "1"
    return NodeProcess(
        name=seat.name,
        role=seat.role,
        command=(*_engine_command(config, facts), *vllm.arguments(launch)),
        environment=environment | config.env,
        unset=vllm.UNSET,
        ports=tuple(_ports(config, seat)),
        url=_url(config.host, seat.http_port),
        bootstrap=_url(config.host, seat.bootstrap_port) if seat.bootstrap_port else None,
        devices=seat.devices,
        log=run_dir / f"{seat.name}.log",
    )


def _ports(config: LaunchConfig, seat: _Seat) -> Iterator[Port]:
    yield Port(purpose="api", first=seat.http_port, last=seat.http_port, bind=config.host)
    if seat.bootstrap_port is not None:  # vLLM binds it on every address, whatever the node's own
        yield Port(purpose="bootstrap", first=seat.bootstrap_port, last=seat.bootstrap_port, bind="0.0.0.0")  # noqa: S104
    if config.engine == "vllm":
        first, last = seat.transfer_ports
        yield Port(purpose="transfer", first=first, last=last, bind="0.0.0.0")  # noqa: S104  so does the transfer engine
    if _has_store(config):
        first, last = seat.store_client_ports
        yield Port(purpose="store client", first=first, last=last, bind="0.0.0.0")  # noqa: S104


def _services(config: LaunchConfig, facts: HostFacts, run_dir: Path) -> Iterator[Process]:
    if not _has_store(config):
        return
    _fits(config, "store_ports", config.store_ports, 2)
    rpc, metrics = config.store_ports.first, config.store_ports.first + 1
    master = Path(_engine_python(config, facts)).with_name(mooncake_store.MASTER)
    yield Process(
        name="store",
        command=(str(master), *mooncake_store.master_arguments(config.host, rpc, metrics)),
        environment={},
        ports=tuple(
            Port(purpose="store", first=port, last=port, bind=bind)
            for port, bind in ((rpc, config.host), (metrics, "0.0.0.0"))  # noqa: S104  its metrics, on every address
        ),
        log=run_dir / "store.log",
    )


def _files(config: LaunchConfig, facts: HostFacts) -> dict[str, str]:
    if not _has_store(config):
        return {}
    protocol = _protocol(config, facts)
    return {_STORE_FILE: mooncake_store.store_config(config.host, config.store_ports.first, protocol)}


def _has_store(config: LaunchConfig) -> bool:
    """The simulator needs none: it computes what a store does not give it."""
    return config.connector == "MooncakeStoreConnector" and config.engine == "vllm"


def _engine_command(config: LaunchConfig, facts: HostFacts) -> tuple[str, ...]:
    if config.engine == "sim":
        return facts.our_python, "-P", "-m", "engines.sim"
    return _engine_python(config, facts), "-m", "vllm.entrypoints.openai.api_server"


def _engine_python(config: LaunchConfig, facts: HostFacts) -> str:
    return str(config.engine_python.expanduser().absolute()) if config.engine_python else facts.engine_python


def _proxy(config: LaunchConfig, facts: HostFacts, run_dir: Path) -> Process:
    command = (facts.our_python, "-P", "-m", "proxy.cli", "--topology", str(run_dir / "topology.json"))
    port = Port(purpose="proxy", first=config.proxy_port, last=config.proxy_port, bind=config.proxy_host)
    return Process(
        name="proxy",
        command=(*command, "--host", config.proxy_host, "--port", str(config.proxy_port), *config.proxy_args),
        environment={"PYTHONUNBUFFERED": "1"},
        ports=(port,),
        log=run_dir / "proxy.log",
    )


def _check_ranges(config: LaunchConfig, facts: HostFacts) -> None:
    proxy = PortRange(first=config.proxy_port, last=config.proxy_port)
    purposes = ("http_ports", "bootstrap_ports", "transfer_ports", "store_ports", "store_client_ports")
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
    ephemeral = PortRange(first=facts.ephemeral_ports[0], last=facts.ephemeral_ports[1])
    for name, ports in ranges.items():
        if ports.overlaps(ephemeral):
            raise ConfigError(
                f"{flag_of(name)} {ports} overlaps {ephemeral}, from which the kernel takes ports for outgoing "
                "connections",
                "Any program may take one at any moment; choose ports outside it",
            )
    if config.engine == "vllm":
        _check_transfer_range(config.transfer_ports)


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
            f"{flag_of(name)} {ports} has {len(ports)} ports, {config.prefill} prefill and {config.decode} decode "
            f"nodes need {needed}",
            f"For example {flag_of(name)} {ports.first}-{ports.first + needed - 1}",
        )


def _devices_a_node(config: LaunchConfig, nodes: int) -> int:
    """How many devices each node gets; more than one is tensor parallelism."""
    if not config.devices:
        return 0
    if config.device != "cuda":
        raise ConfigError("--devices are GPUs, and --device is cpu", "Add --device cuda, or leave --devices away")
    if len(config.devices) % nodes:
        raise ConfigError(
            f"--devices {','.join(config.devices)}: {len(config.devices)} devices cannot be shared out evenly to "
            f"{nodes} nodes",
            "Name one (or two, four ...) for each node; name one twice to put two nodes on it",
        )
    return len(config.devices) // nodes


def _protocol(config: LaunchConfig, facts: HostFacts) -> mooncake.Protocol:
    if config.transfer_protocol != "auto":
        return config.transfer_protocol
    return "rdma" if config.device == "cuda" and facts.has_rdma else "tcp"


def _model_argument(config: LaunchConfig, facts: HostFacts) -> str:
    if config.engine == "sim":
        return config.model
    if config.model == TINY_MODEL:
        return str(facts.tiny_model)
    return str(Path(config.model).expanduser().absolute()) if is_local_path(config.model) else config.model


def _served_name(config: LaunchConfig) -> str:
    if config.served_model_name:
        return config.served_model_name
    return Path(config.model).name if is_local_path(config.model) else config.model


def is_local_path(model: str) -> bool:
    """A path, and not a name like `Qwen/Qwen3-8B` that the engine looks up."""
    return model.startswith(("/", "./", "../", "~")) or model in (".", "..")


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
